// Draws tokens from a head's distribution after temperature, top-k and top-p, as decoding/sampling.py does.
//
// Weights exp((logit - largest) / temperature) are whole numbers of 2^-40, so that every order of adding
// them gives the same sums, and a seed the same tokens.
#include "choose.cuh"
#include "instructions.cuh"

constexpr int SAMPLE_THREADS = 1024;
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / LANES;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;
// Of the first parts that logits are sorted into, where the largest is 0: narrow, so that few threads add to
// the same bin at once; all logits that lie farther below are in the lowest.
constexpr float PARTS_PER_UNIT = 32.0f;
typedef unsigned long long Mass;

struct Token {
    int index;
    float logit;

    // Increases with the logit.
    __device__ unsigned key() const {
        const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
        return bits >> 31 ? ~bits : bits | 0x80000000u;
    }
};

struct Row {
    const float* logits;
    int vocabulary;
    float largest, powers;  // powers of 2 that a unit of the logits stands for

    __device__ Mass mass(Token token) const {
        return static_cast<Mass>(power_of_2((token.logit - largest) * powers) * 1099511627776.0f);
    }

    // The same or higher for a larger logit.
    __device__ int part(Token token) const {
        return BINS - 1 - static_cast<int>(fminf((largest - token.logit) * PARTS_PER_UNIT, BINS - 1));
    }
};

__device__ inline Mass lanes_total(Mass x) {
    for (int offset = LANES / 2; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

// This lane's number and those of the lanes before it.
__device__ inline Mass lanes_upto(Mass x) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) {
        const Mass left = __shfl_up_sync(ALL, x, offset);
        if (lane >= offset) x += left;
    }
    return x;
}

// What the threads before this one have.
__device__ inline Mass before_this_thread(Mass x) {
    __shared__ Mass warps[SAMPLE_WARPS];
    const int warp = threadIdx.x / LANES;
    const Mass upto = lanes_upto(x);
    __syncthreads();  // those of a call before may still be read
    if (threadIdx.x % LANES == LANES - 1) warps[warp] = upto;
    __syncthreads();
    Mass before = upto - x;
    for (int i = 0; i < warp; ++i) before += warps[i];
    return before;
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

// Calls use(token) for the tokens from `first` to `stop`, every `step`th of them; several are on their way.
template <class Use>
__device__ __forceinline__ void each_token(const Row& row, int first, int stop, int step, Use use) {
    constexpr int AT_ONCE = 8;
    for (; first < stop; first += AT_ONCE * step) {
        float logits[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) logits[i] = fresh(row.logits + min(first + i * step, stop - 1));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i * step < stop) use(Token{first + i * step, logits[i]});
    }
}

template <class Weight>
__device__ Mass sum_of(const Row& row, Weight weight) {
    Mass sum = 0;
    each_token(row, threadIdx.x, row.vocabulary, SAMPLE_THREADS, [&](Token token) { sum += weight(token); });
    return block_total(sum);
}

// Where the weights of tokens, from the most likely on, first reach a goal.
struct Border {
    unsigned key;       // of the tokens there
    Mass above, equal;  // what those of larger keys weigh, and those of this one
};

// In shared memory, once for all that use it.
struct Bins {
    Mass weights[BINS];
    Mass above;
    int result;
};

// Sorts tokens into bins, those with a negative one into none, and finds the highest bin from which on they
// reach the goal; the border's weights become those above and in that bin. Every thread gets it.
template <class Bin, class Weight>
__device__ int narrow(Border& border, Bins& shared, const Row& row, Mass goal, Bin bin_of, Weight weight) {
    Mass(&bins)[BINS] = shared.weights;
    for (int i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) bins[i] = 0;
    if (threadIdx.x == 0) shared.result = 0, shared.above = border.above;
    __syncthreads();
    // A bin's weight is held until another one's comes: where most logits are equal, as those far below the
    // likely ones may be, additions to their bin would wait for each other.
    int held_bin = 0;
    Mass held = 0;
    each_token(row, threadIdx.x, row.vocabulary, SAMPLE_THREADS, [&](Token token) {
        const int bin = bin_of(token);
        const Mass each = bin < 0 ? 0 : weight(token);
        if (!each) return;
        if (bin != held_bin) {
            if (held) atomicAdd(&bins[held_bin], held);
            held_bin = bin, held = 0;
        }
        held += each;
    });
    if (held) atomicAdd(&bins[held_bin], held);
    __syncthreads();
    constexpr int EACH = BINS / SAMPLE_THREADS;
    int bin = BINS - 1 - static_cast<int>(threadIdx.x) * EACH;  // the first thread has the highest
    Mass own = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) own += bins[bin - i];
    Mass reached = border.above + before_this_thread(own);
    if (reached < goal && reached + own >= goal) {  // one thread
        while (reached + bins[bin] < goal) reached += bins[bin--];
        shared.result = bin, shared.above = reached;
    }
    __syncthreads();
    bin = shared.result;
    border.above = shared.above, border.equal = bins[bin];
    __syncthreads();  // all of this is used again
    return bin;
}

// Bins are parts of the logits' range first, and then, of the tokens in one of them, digits of their keys.
template <class Weight>
__device__ Border border_at(Bins& bins, const Row& row, Mass goal, Weight weight) {
    Border border{};
    const int part = narrow(border, bins, row, goal, [&](Token token) { return row.part(token); }, weight);
    for (int shift = 2 * BIN_BITS; shift >= 0; shift -= BIN_BITS) {
        const auto digit = [&](Token token) {
            const unsigned place = token.key() >> shift;
            return row.part(token) == part && place / BINS == border.key ? static_cast<int>(place % BINS) : -1;
        };
        border.key = border.key * BINS + narrow(border, bins, row, goal, digit, weight);
    }
    return border;
}

// The first token at which the weights of those up to it exceed `goal`, less than all weigh: first among the
// warps' equal shares of the tokens, then within one.
template <class Weight>
__device__ int find(const Row& row, Mass goal, Weight weight) {
    __shared__ Mass shares[SAMPLE_WARPS];
    __shared__ int result;
    const int warp = threadIdx.x / LANES, each = (row.vocabulary + SAMPLE_WARPS - 1) / SAMPLE_WARPS;
    Mass sum = 0;
    each_token(row, warp * each + threadIdx.x % LANES, min((warp + 1) * each, row.vocabulary), LANES,
               [&](Token token) { sum += weight(token); });
    sum = lanes_total(sum);
    if (threadIdx.x % LANES == 0) shares[warp] = sum;
    if (threadIdx.x == 0) result = 0;
    __syncthreads();
    Mass reached = 0;
    int share = 0;
    while (share < SAMPLE_WARPS - 1 && reached + shares[share] <= goal) reached += shares[share++];
    const int stop = min((share + 1) * each, row.vocabulary);
    for (int at = share * each; at < stop; at += SAMPLE_THREADS) {
        const int i = at + static_cast<int>(threadIdx.x);
        const Mass own = i < stop ? weight(Token{i, fresh(row.logits + i)}) : 0;
        const Mass before = reached + before_this_thread(own);
        if (before <= goal && goal < before + own) result = i;  // one thread
        reached += block_total(own);
    }
    __syncthreads();
    const int found = result;
    __syncthreads();  // all of this is used again
    return found;
}

// Which tokens may be drawn: keys above `key`, and of those that equal it the ones up to `last`.
struct Kept {
    unsigned key;
    int last;

    __device__ bool operator()(Token token) const {
        const unsigned mine = token.key();
        return mine > key || (mine == key && token.index <= last);
    }
};

__device__ inline Kept all_with_key(const Row& row, unsigned key, Mass count) {
    return {key, find(row, count - 1, [&](Token token) -> Mass { return token.key() == key; })};
}

__device__ Kept most_likely(Bins& bins, const Row& row, int top_k) {
    if (top_k >= row.vocabulary) return {0u, row.vocabulary};
    const Border border = border_at(bins, row, top_k, [](Token) -> Mass { return 1; });
    return all_with_key(row, border.key, top_k - border.above);
}

__device__ Kept nucleus(Bins& bins, const Row& row, const Kept& kept, double top_p) {
    const auto weight = [&](Token token) -> Mass { return kept(token) ? row.mass(token) : 0; };
    const Mass total = sum_of(row, weight);
    const Mass goal = max(static_cast<Mass>(1), static_cast<Mass>(ceil(top_p * static_cast<double>(total))));
    const Border border = border_at(bins, row, goal, weight);
    const Mass ties = sum_of(row, [&](Token token) -> Mass { return token.key() == border.key && kept(token); });
    const Mass one = max(static_cast<Mass>(1), border.equal / max(static_cast<Mass>(1), ties));
    const Mass count = (goal - border.above + one - 1) / one;
    return all_with_key(row, border.key, max(static_cast<Mass>(1), min(ties, count)));
}

// The token that is drawn from a row.
__device__ int drawn_from(const Row& row, const Drawing& how) {
    __shared__ Bins bins;
    Kept kept = most_likely(bins, row, how.top_k > 0 ? how.top_k : row.vocabulary);
    if (how.top_p < 1.0) kept = nucleus(bins, row, kept, how.top_p);
    const auto weight = [&](Token token) -> Mass { return kept(token) ? row.mass(token) : 0; };
    const Mass total = sum_of(row, weight);
    const Mass goal = static_cast<Mass>(how.draw * static_cast<double>(total));
    return find(row, min(goal, total - 1), weight);
}

// Grid (rows). After `choose` or an exit's check, whose answer it completes.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    sample(const float* logits, int vocabulary, Desk* desk, Mail* mail) {
    wait_for_previous();
    let_next_start();
    const int at = blockIdx.x;
    const unsigned answer = fresh(&desk->answers) + 1, slot = (answer - 1) % MAIL_SLOTS;
    // One thread reads the host's memory, as each warp that does waits for it.
    __shared__ Drawing how;
    if (threadIdx.x == 0) {
        const volatile Drawing& left = mail->drawings[slot][at];
        how.draw = left.draw, how.top_p = left.top_p;
        how.temperature = left.temperature, how.top_k = left.top_k;
    }
    __syncthreads();
    const Row row{logits + static_cast<long long>(at) * vocabulary, vocabulary, fresh(desk->largest + at),
                  LOG2_E / how.temperature};
    // `choose` has left the likeliest.
    const int token = how.temperature > 0.0f ? drawn_from(row, how) : fresh(desk->tokens + at);
    __syncthreads();
    if (threadIdx.x == 0) {
        store_word_for_host(&mail->answers[slot][at][TOKEN], word(token, answer));
        desk->tokens[at] = desk->chosen[slot][at] = token;
    }
    if (last_to_finish(&desk->finished, gridDim.x) && threadIdx.x == 0) desk->answers = answer;
}
