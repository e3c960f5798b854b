// From logits to tokens and confidence, and how they come to the host.
#pragma once
#include "common.cuh"

constexpr int MAIL_SLOTS = 8;   // answers that may be on their way at once
constexpr int MAIL_ROWS = 16;   // rows of one answer
constexpr int CHOOSE_THREADS = 512;
constexpr int MOST_PARTS = 2048;

// What the host reads of a row. Confidence as in runtime/policy.py.
struct Answer {
    int token, likeliest;
    double top, margin, entropy;
};

// Host memory that the device reads and writes: answers and what they depend on, slot after slot.
struct Mail {
    Answer answers[MAIL_SLOTS][MAIL_ROWS];
    double draws[MAIL_SLOTS][MAIL_ROWS];
    unsigned ready[MAIL_SLOTS];  // how many answers were given when this one was
};

// What has been seen of a row's logits; sums are of exp(logit - largest).
struct Summary {
    float largest, second;
    int index;
    double total, products;  // products: of exp(below) * below, below = logit - largest

    // Nothing yet; a token that stands for the answer where no logit is a number.
    static __device__ Summary nothing(int index) { return {-1e30f, -1e30f, index, 0.0, 0.0}; }

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
            total += 1.0;
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
    all.total = related.total, all.products = related.products;
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) {
        all.total += __shfl_xor_sync(ALL, all.total, offset);
        all.products += __shfl_xor_sync(ALL, all.products, offset);
    }
    return all;
}

// Of a thread block; threads of the first warp get it.
__device__ inline Summary block_summary(const Summary& mine) {
    __shared__ Summary warps[LANES];
    const Summary warp = lanes_summary(mine);
    __syncthreads();
    if (threadIdx.x % LANES == 0) warps[threadIdx.x / LANES] = warp;
    __syncthreads();
    if (threadIdx.x >= LANES) return warp;
    return lanes_summary(threadIdx.x < blockDim.x / LANES ? warps[threadIdx.x] : Summary::nothing(warp.index));
}

// Device memory that answers are made in; all zero at first.
struct Desk {
    int tokens[MAIL_ROWS];  // the last answer's, for the embedding of the next step
    unsigned turn;          // answers given so far
    unsigned finished;      // thread blocks that are done; zero before and after a kernel
    unsigned arrived, round;  // of a barrier
    Summary seen[MAIL_ROWS];
    Summary parts[MOST_PARTS];  // [rows, parts] of thread blocks
};

// What is asked of an answer.
struct Asked {
    Desk* desk;
    Mail* mail;  // in host memory
    int measure;  // of the exit's check: 0 top, 1 margin, 2 entropy; -1: no check
    double threshold;
    int sampled;  // whether another kernel chooses the tokens and gives the answer
};

__device__ inline void give(Desk* desk, Mail* mail) {
    const unsigned turn = desk->turn;
    __threadfence_system();
    *reinterpret_cast<volatile unsigned*>(&mail->ready[turn % MAIL_SLOTS]) = turn + 1;
    desk->turn = turn + 1;
}

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

// By the last thread block: answers from `parts` parts of each row.
__device__ inline void answer(const Asked& asked, int rows, int parts) {
    Desk* desk = asked.desk;
    __shared__ unsigned sure;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (threadIdx.x == 0) sure = 0;
    __syncthreads();
    for (int row = warp; row < rows; row += blockDim.x / LANES) {
        const Summary* given = desk->parts + row * parts;
        Summary mine = Summary::nothing(given->index);
        for (int part = lane; part < parts; part += LANES) {
            Summary other = given[part];
            const float largest = fmaxf(mine.largest, other.largest);
            mine.relate_to(largest);
            other.relate_to(largest);
            mine.rank(other.largest, other.second, other.index);
            mine.total += other.total, mine.products += other.products;
        }
        const Summary all = lanes_summary(mine);
        if (lane) continue;
        Answer result;
        result.token = result.likeliest = all.index;
        result.top = 1.0 / all.total;
        result.margin = (1.0 - expf(all.second - all.largest)) / all.total;
        result.entropy = all.products / all.total - log(all.total);
        asked.mail->answers[desk->turn % MAIL_SLOTS][row] = result;
        desk->seen[row] = all;
        desk->tokens[row] = all.index;
        const double said = asked.measure == 0 ? result.top : asked.measure == 1 ? result.margin : result.entropy;
        if (asked.measure >= 0 && said >= asked.threshold) atomicAdd(&sure, 1);
    }
    __syncthreads();
    if (threadIdx.x) return;
    if (sure == rows) called_off = 1;
    if (!asked.sampled) give(desk, asked.mail);
}
