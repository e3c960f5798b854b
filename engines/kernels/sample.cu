// Draws tokens from a head's distribution after temperature, top-k and top-p, as runtime/sampling.py does.
//
// Weights exp((logit - largest) / temperature) are whole numbers of 2^-40, so that every order of adding
// them gives the same sums, and a seed the same tokens.
#include "choose.cuh"

constexpr int SAMPLE_THREADS = 1024;
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / LANES;
constexpr int DIGIT_BITS = 2, HIGHER = (1 << DIGIT_BITS) - 1;
typedef unsigned long long Mass;

struct Row {
    const float* logits;
    int vocabulary;
    float largest, temperature;

    // Increases with the logit.
    __device__ unsigned key(int i) const {
        const unsigned bits = __float_as_uint(fresh(logits + i) + 0.0f);  // -0 becomes 0
        return bits >> 31 ? ~bits : bits | 0x80000000u;
    }

    __device__ Mass mass(int i) const {
        return static_cast<Mass>(expf((fresh(logits + i) - largest) / temperature) * 1099511627776.0f);
    }
};

__device__ inline Mass lanes_total(Mass x) {
    for (int offset = LANES / 2; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

// Sum over the thread block; every thread gets it.
__device__ inline Mass block_total(Mass x) {
    __shared__ Mass sums[SAMPLE_WARPS];
    x = lanes_total(x);
    __syncthreads();
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = x;
    __syncthreads();
    return lanes_total(sums[threadIdx.x % LANES]);
}

template <class Weight>
__device__ Mass sum_of(int vocabulary, Weight weight) {
    Mass sum = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < vocabulary; i += SAMPLE_THREADS) sum += weight(i);
    return block_total(sum);
}

// The largest key such that tokens from it upwards weigh at least `goal`, digit by digit.
template <class Weight>
__device__ unsigned border(const Row& row, Mass goal, Weight weight) {
    unsigned found = 0;
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        Mass sums[HIGHER] = {};
#pragma unroll 8
        for (int i = threadIdx.x; i < row.vocabulary; i += SAMPLE_THREADS) {
            const unsigned key = row.key(i);
            const Mass each = weight(i);
#pragma unroll
            for (int digit = 1; digit <= HIGHER; ++digit)
                if (key >= found + (static_cast<unsigned>(digit) << shift)) sums[digit - 1] += each;
        }
        unsigned digit = 0;
#pragma unroll
        for (int i = 0; i < HIGHER; ++i)
            if (block_total(sums[i]) >= goal) digit = i + 1;
        found += digit << shift;
    }
    return found;
}

// The first token at which the weights of those up to it exceed `goal`; the last with a weight if none does.
template <class Weight>
__device__ int find(int vocabulary, Mass goal, Weight weight) {
    __shared__ Mass before[SAMPLE_WARPS];
    __shared__ int result;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int each = (vocabulary + SAMPLE_WARPS - 1) / SAMPLE_WARPS;
    const int first = min(warp * each, vocabulary), stop = min(first + each, vocabulary);
    // A lane's part of the warp's.
    const int own = (each + LANES - 1) / LANES;
    const int from = min(first + lane * own, stop), to = min(from + own, stop);
    Mass sum = 0;
#pragma unroll 8
    for (int i = from; i < to; ++i) sum += weight(i);
    Mass upto = sum;
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) {
        const Mass left = __shfl_up_sync(ALL, upto, offset);
        if (lane >= offset) upto += left;
    }
    __syncthreads();
    if (lane == LANES - 1) before[warp] = upto;
    if (threadIdx.x == 0) result = 0;
    __syncthreads();
    Mass reached = upto - sum;
    for (int i = 0; i < warp; ++i) reached += before[i];
    if (reached <= goal && goal < reached + sum) {
        for (int i = from; i < to; ++i) {
            reached += weight(i);
            if (reached > goal) {
                result = i;
                break;
            }
        }
    }
    __syncthreads();
    return result;
}

// Which tokens may be drawn: keys above `key`, and of those that equal it the ones up to `last`.
struct Kept {
    unsigned key;
    int last;

    __device__ bool operator()(const Row& row, int i) const {
        const unsigned mine = row.key(i);
        return mine > key || (mine == key && i <= last);
    }
};

__device__ inline Kept all_with_key(const Row& row, unsigned key, Mass count) {
    return {key, find(row.vocabulary, count - 1, [&](int i) -> Mass { return row.key(i) == key; })};
}

__device__ Kept most_likely(const Row& row, int top_k) {
    if (top_k >= row.vocabulary) return {0u, row.vocabulary};
    const unsigned key = border(row, top_k, [](int) -> Mass { return 1; });
    const Mass above = sum_of(row.vocabulary, [&](int i) -> Mass { return row.key(i) > key; });
    return all_with_key(row, key, top_k - above);
}

__device__ Kept nucleus(const Row& row, const Kept& kept, double top_p) {
    const auto weight = [&](int i) -> Mass { return kept(row, i) ? row.mass(i) : 0; };
    const Mass total = sum_of(row.vocabulary, weight);
    const Mass goal = max(static_cast<Mass>(1), static_cast<Mass>(ceil(top_p * static_cast<double>(total))));
    const unsigned key = border(row, goal, weight);
    const Mass above = sum_of(row.vocabulary, [&](int i) -> Mass { return row.key(i) > key ? weight(i) : 0; });
    const Mass equal = sum_of(row.vocabulary, [&](int i) -> Mass { return row.key(i) == key ? weight(i) : 0; });
    const Mass ties = sum_of(row.vocabulary, [&](int i) -> Mass { return row.key(i) == key && kept(row, i); });
    const Mass one = max(static_cast<Mass>(1), equal / max(static_cast<Mass>(1), ties));
    return all_with_key(row, key, max(static_cast<Mass>(1), min(ties, (goal - above + one - 1) / one)));
}

// Grid (rows). After `choose` or an exit's check, whose answer it completes.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    sample(const float* logits, int vocabulary, float temperature, int top_k, double top_p, Desk* desk,
           Mail* mail) {
    wait_for_previous();
    let_next_start();
    const int at = blockIdx.x;
    const Row row{logits + static_cast<long long>(at) * vocabulary, vocabulary, fresh(desk->largest + at), temperature};
    Kept kept = most_likely(row, top_k);
    if (top_p < 1.0) kept = nucleus(row, kept, top_p);
    const auto weight = [&](int i) -> Mass { return kept(row, i) ? row.mass(i) : 0; };
    const Mass total = sum_of(vocabulary, weight);
    const unsigned answer = fresh(&desk->answers) + 1, slot = (answer - 1) % MAIL_SLOTS;
    const Mass goal = static_cast<Mass>(*const_cast<const volatile double*>(&mail->draws[slot][at]) * static_cast<double>(total));
    const int token = find(vocabulary, min(goal, total - 1), weight);
    if (threadIdx.x == 0) {
        store_word_for_host(&mail->answers[slot][at][TOKEN], word(token, answer));
        desk->tokens[at] = token;
    }
    if (last_to_finish(&desk->finished, gridDim.x) && threadIdx.x == 0) desk->answers = answer;
}
