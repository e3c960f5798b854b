// From logits to tokens and confidence, and how they come to the host.
#pragma once
#include "words.cuh"

constexpr int MAIL_SLOTS = 8;  // answers that may be on their way at once
constexpr int MAIL_ROWS = 64;  // rows of one answer
constexpr int CHOOSE_THREADS = 512;
constexpr int MOST_PARTS = 2048;  // of all rows of an answer

// What is kept of an answer of a row, for the host. Confidence as in decoding/confidence.py.
enum { TOKEN, LIKELIEST, TOP, MARGIN, ENTROPY, ANSWER_WORDS };

// How a row's token is drawn: by a number from [0, 1). The likeliest where the temperature is 0; of all tokens
// where top_k is.
struct Drawing {
    double draw, top_p;
    float temperature;
    int top_k;
};

// Host memory that the device reads and writes: answers and what they depend on, slot after slot.
struct Mail {
    Word answers[MAIL_SLOTS][MAIL_ROWS][ANSWER_WORDS];
    Drawing drawings[MAIL_SLOTS][MAIL_ROWS];
};

// What has been seen of a row's logits; sums are of exp(logit - largest).
struct Summary {
    float largest, second;
    int index;
    float total, products;  // products: of exp(below) * below, below = logit - largest

    // Nothing yet; a token that stands for the answer where no logit is a number.
    static __device__ Summary nothing(int index) { return {-1e30f, -1e30f, index, 0.0f, 0.0f}; }

    __device__ void relate_to(float other) {
        const float below = largest - other, weight = expf(below);
        products = weight * (products + total * below);
        total *= weight;
    }

    __device__ void add(float logit, int at) {
        if (logit > largest) {
            relate_to(logit);
            second = largest;
            largest = logit;
            index = at;
            total += 1.0f;
        } else {
            const float weight = expf(logit - largest);
            total += weight;
            products += weight * (logit - largest);
            second = fmaxf(second, logit);
        }
    }

    // Takes another's maxima; the lower index among equals.
    __device__ void rank(float other_largest, float other_second, int other_index) {
        second = fmaxf(fminf(largest, other_largest), fmaxf(second, other_second));
        if (other_largest > largest || (other_largest == largest && other_index < index)) index = other_index;
        largest = fmaxf(largest, other_largest);
    }

    // Takes another's tokens, which are others than those of this one.
    __device__ void add(Summary other) {
        const float most = fmaxf(largest, other.largest);
        relate_to(most);
        other.relate_to(most);
        rank(other.largest, other.second, other.index);
        total += other.total;
        products += other.products;
    }
};

// Of a warp; every lane gets it. Sums are related to the largest once and then added.
__device__ inline Summary lanes_summary(const Summary& mine) {
    Summary all = mine;
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2)
        all.rank(__shfl_xor_sync(ALL, all.largest, offset), __shfl_xor_sync(ALL, all.second, offset),
                 __shfl_xor_sync(ALL, all.index, offset));
    Summary related = mine;
    related.relate_to(all.largest);
    all.total = lanes_sum(related.total);
    all.products = lanes_sum(related.products);
    return all;
}

// Of a thread block; threads of the first warp get it.
__device__ inline Summary block_summary(const Summary& mine) {
    __shared__ Summary warps[LANES];
    const Summary warp = lanes_summary(mine);
    __syncthreads();  // those of a call before may still be read
    if (threadIdx.x % LANES == 0) warps[threadIdx.x / LANES] = warp;
    __syncthreads();
    if (threadIdx.x >= LANES) return warp;
    return lanes_summary(threadIdx.x < blockDim.x / LANES ? warps[threadIdx.x] : Summary::nothing(warp.index));
}

// What thread blocks tell one another of a summary.
struct Part {
    Word words[5];

    __device__ void tell(const Summary& summary, unsigned answer) {
        store_word(words, word(summary.largest, answer));
        store_word(words + 1, word(summary.second, answer));
        store_word(words + 2, word(summary.index, answer));
        store_word(words + 3, word(summary.total, answer));
        store_word(words + 4, word(summary.products, answer));
    }

    __device__ Summary await(unsigned answer) const {
        Word found[5];
#pragma unroll
        for (int i = 0; i < 5; ++i) found[i] = load_word(words + i);
#pragma unroll
        for (int i = 0; i < 5; ++i)
            while (!belongs_to(found[i], answer)) found[i] = load_word(words + i);
        return {float_of(found[0]), float_of(found[1]), static_cast<int>(bits_of(found[2])), float_of(found[3]),
                float_of(found[4])};
    }
};

// kept [rows, capacity, features] at a token's sequence and position = hidden [token, features].
__device__ inline void keep_token(float* kept, const float* hidden, const int* positions, const int* sequences,
                                  int capacity, int features, int token, int thread, int threads) {
    const long long place = static_cast<long long>(fresh(sequences + token)) * capacity + fresh(positions + token);
    for (int i = thread; i < features; i += threads)
        kept[place * features + i] = fresh(hidden + static_cast<long long>(token) * features + i);
}

// Device memory that answers are made in; all zero at first.
struct Desk {
    int tokens[MAIL_ROWS];   // the last answer's, for the embedding of the next step
    unsigned answers;        // given so far
    unsigned finished;       // thread blocks that are done; zero before and after a kernel
    float largest[MAIL_ROWS];
    Part parts[MOST_PARTS];  // [rows, parts] of thread blocks
    int chosen[MAIL_SLOTS][MAIL_ROWS];  // tokens of the last answers, for embeddings that name them by place
};

// What is asked of an answer.
struct Asked {
    Desk* desk;
    Mail* mail;
    unsigned answer;  // its number
    int measure;      // of the exit's check: 0 top, 1 margin, 2 entropy; -1: no check
    double threshold;
    int sampled;  // whether another kernel chooses the tokens

    // Writes a row's answer; whether the check finds it sure. By one thread.
    __device__ bool give(int row, const Summary& all) const {
        Word* words = mail->answers[(answer - 1) % MAIL_SLOTS][row];
        const double total = all.total;
        const float said[] = {static_cast<float>(1.0 / total),
                              static_cast<float>((1.0 - expf(all.second - all.largest)) / total),
                              static_cast<float>(all.products / total - log(total))};
        if (!sampled) store_word_for_host(words + TOKEN, word(all.index, answer));
        store_word_for_host(words + LIKELIEST, word(all.index, answer));
        store_word_for_host(words + TOP, word(said[0], answer));
        store_word_for_host(words + MARGIN, word(said[1], answer));
        store_word_for_host(words + ENTROPY, word(said[2], answer));
        desk->tokens[row] = desk->chosen[(answer - 1) % MAIL_SLOTS][row] = all.index;
        desk->largest[row] = all.largest;
        return measure >= 0 && static_cast<double>(said[max(measure, 0)]) >= threshold;
    }

    // After the last row. By one thread.
    __device__ void end(bool all_sure) const {
        if (all_sure) called_off = 1;
        if (!sampled) desk->answers = answer;
    }
};

// Whether this thread block is the last of `blocks` to come here. What the others wrote before is seen.
__device__ inline bool last_to_finish(unsigned* finished, unsigned blocks) {
    __shared__ unsigned is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(finished, blocks - 1) == blocks - 1;
    __syncthreads();
    if (is_last) __threadfence();
    return is_last;
}
