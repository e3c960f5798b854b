// The folded exit head and what it chooses, in one kernel: z = hidden project^T + bias, logits =
// z / rms(z) vocabulary^T (+ bias), and an answer. Two products, of which the second needs all of the
// first: thread blocks wait for one another in between, so all must be resident at once, one on each
// multiprocessor.
#include "choose.cuh"

constexpr int CHECK_THREADS = 512;
constexpr int CHECK_WARPS = CHECK_THREADS / LANES;
constexpr int MOST_RANK = 128;
constexpr int RANKS_PER_WARP = MOST_RANK / CHECK_WARPS;
constexpr int SUM_GROUPS = CHECK_THREADS / MOST_RANK;

__device__ inline unsigned load_acquire(const unsigned* at) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

// Waits for all thread blocks of the grid.
__device__ inline void grid_barrier(Desk* desk) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned round = load_acquire(&desk->round);
        __threadfence();
        if (atomicInc(&desk->arrived, gridDim.x - 1) == gridDim.x - 1)
            atomicAdd(&desk->round, 1);
        else
            while (load_acquire(&desk->round) == round) {
            }
        __threadfence();
    }
    __syncthreads();
}

// This thread block's part of z, [TOKENS, MOST_RANK], over tiles of LANES features.
template <int TOKENS>
__device__ void project_part(float* part, const float* hidden, const float* project, int features, int rank) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float sums[RANKS_PER_WARP][TOKENS] = {}, weights[RANKS_PER_WARP] = {};
    const auto load_weights = [&](int feature) {
#pragma unroll
        for (int i = 0; i < RANKS_PER_WARP; ++i) {
            const int row = warp + i * CHECK_WARPS;
            const bool inside = row < rank && feature < features;
            weights[i] = inside ? project[static_cast<long long>(row) * features + feature] : 0.0f;
        }
    };
    int feature = blockIdx.x * LANES + lane;
    load_weights(feature);  // does not depend on the kernel before
    wait_for_previous();
    let_next_start();
    for (; feature - lane < features;) {
        float x[TOKENS];
#pragma unroll
        for (int token = 0; token < TOKENS; ++token)
            x[token] = feature < features ? hidden[token * features + feature] : 0.0f;
#pragma unroll
        for (int i = 0; i < RANKS_PER_WARP; ++i)
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) sums[i][token] += weights[i] * x[token];
        feature += gridDim.x * LANES;
        if (feature - lane < features) load_weights(feature);
    }
#pragma unroll
    for (int i = 0; i < RANKS_PER_WARP; ++i) {
        const int row = warp + i * CHECK_WARPS;
        if (row >= rank) break;
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const float sum = lanes_sum(sums[i][token]);
            if (lane == 0) part[token * MOST_RANK + row] = sum;
        }
    }
}

// z from all parts, always added in the same order, into shared memory; 1 / rms of each token.
template <int TOKENS>
__device__ void gather(float (&z)[TOKENS][MOST_RANK], float (&scales)[TOKENS], const float* parts, int count,
                       const float* bias, int rank, float epsilon) {
    __shared__ float sums[SUM_GROUPS][MOST_RANK];
    const int group = threadIdx.x / MOST_RANK, row = threadIdx.x % MOST_RANK;
    for (int token = 0; token < TOKENS; ++token) {
        float sum = 0.0f;
        if (row < rank)
#pragma unroll 8
            for (int part = group; part < count; part += SUM_GROUPS)
                sum += __ldcg(parts + (static_cast<long long>(part) * TOKENS + token) * MOST_RANK + row);
        sums[group][row] = sum;
        __syncthreads();
        if (group == 0) {
            float whole = row < rank ? bias[row] : 0.0f;
            if (row < rank)
                for (int i = 0; i < SUM_GROUPS; ++i) whole += sums[i][row];
            z[token][row] = whole;
        }
        __syncthreads();
        float square = 0.0f;
        for (int i = threadIdx.x % LANES; i < rank; i += LANES) square += z[token][i] * z[token][i];
        scales[token] = 1.0f / sqrtf(lanes_sum(square) / rank + epsilon);
    }
}

//   project     [rank, features] fp32
//   vocabulary  [outputs, columns], columns at least rank and filled up with zeros
//   z_parts     [thread blocks, TOKENS, MOST_RANK]
//   logits      [TOKENS, outputs], or null where nobody reads them
template <int TOKENS>
__device__ void exit_check(float* logits, const float* hidden, const float* project, const float* bias,
                           const Element* vocabulary, const float* vocabulary_bias, float* z_parts, int features,
                           int rank, int columns, int outputs, float epsilon, const Asked& asked) {
    __shared__ float z[TOKENS][MOST_RANK];
    const int each = (outputs + gridDim.x - 1) / gridDim.x;
    const int first = min(static_cast<int>(blockIdx.x) * each, outputs), stop = min(first + each, outputs);
    constexpr int LINE = 128 / sizeof(Element);
    const Element* mine = vocabulary + static_cast<long long>(first) * columns;
    for (int at = threadIdx.x * LINE; at < (stop - first) * columns; at += CHECK_THREADS * LINE)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(mine + at));
    project_part<TOKENS>(z_parts + static_cast<long long>(blockIdx.x) * TOKENS * MOST_RANK, hidden, project, features,
                         rank);
    grid_barrier(asked.desk);
    float scales[TOKENS];
    const int busy = min(static_cast<int>(gridDim.x), (features + LANES - 1) / LANES);
    gather<TOKENS>(z, scales, z_parts, busy, bias, rank, epsilon);
    Summary seen[TOKENS];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
        seen[token] = Summary::nothing(min(first + static_cast<int>(threadIdx.x), outputs - 1));
    for (int row = first + threadIdx.x; row < stop; row += CHECK_THREADS) {
        const Element* weights = vocabulary + static_cast<long long>(row) * columns;
        float sums[TOKENS] = {};
#pragma unroll 6
        for (int at = 0; at < columns; at += WIDE) {
            const Chunk chunk = load(weights + at);
#pragma unroll
            for (int i = 0; i < WIDE; ++i)
#pragma unroll
                for (int token = 0; token < TOKENS; ++token) sums[token] += to_float(chunk.values[i]) * z[token][at + i];
        }
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const float logit = sums[token] * scales[token] + (vocabulary_bias ? vocabulary_bias[row] : 0.0f);
            if (logits) logits[static_cast<long long>(token) * outputs + row] = logit;
            seen[token].add(logit, row);
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        const Summary all = block_summary(seen[token]);
        if (threadIdx.x == 0) asked.desk->parts[token * gridDim.x + blockIdx.x] = all;
    }
    if (last_to_finish(&asked.desk->finished, gridDim.x)) answer(asked, TOKENS, gridDim.x);
}

#define CHECK_FOR_TOKENS(TOKENS)                                                                                \
    extern "C" __global__ void __launch_bounds__(CHECK_THREADS, 1) exit_check_##TOKENS(                         \
        float* logits, const float* hidden, const float* project, const float* bias, const Element* vocabulary, \
        const float* vocabulary_bias, float* z_parts, int features, int rank, int columns, int outputs,         \
        float epsilon, Desk* desk, Mail* mail, int measure, double threshold, int sampled) {                    \
        exit_check<TOKENS>(logits, hidden, project, bias, vocabulary, vocabulary_bias, z_parts, features, rank, \
                           columns, outputs, epsilon, {desk, mail, measure, threshold, sampled});               \
    }

CHECK_FOR_TOKENS(1)
CHECK_FOR_TOKENS(2)
