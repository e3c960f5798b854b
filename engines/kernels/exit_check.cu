// The folded exit head and what it chooses, in one kernel: z = hidden project^T + bias, logits =
// z / rms(z) vocabulary^T (+ bias), and an answer. The second product needs all of the first: each thread
// block looks until the others' words are there, so all must be resident at once, one on each multiprocessor.
//
// Two sizes: many threads where all else waits for the answer; few, which find room on a multiprocessor that a
// matrix-vector product (linear.cu) fills, where the next block runs beside the check. Such a check may call
// that block off in the middle of its kernels.
#include "choose.cuh"
#include "instructions.cuh"

constexpr int CHECK_THREADS = 512, BESIDE_THREADS = 128;
// Of the smaller ones, so many would fit on a multiprocessor: 64 registers a thread.
constexpr int BESIDE_RESIDENT = 8;
constexpr int MOST_RANK = 128;
constexpr int TILE = 4 * LANES;  // features that a thread block takes at a time
constexpr int ROWS_AT_ONCE = 8, PARTS_AT_ONCE = 8;

// Loads this lane's part of a warp's rows of the projection, `step` rows apart.
__device__ __forceinline__ void load_projection(float4 (&weights)[ROWS_AT_ONCE], const float* project, int features,
                                                int rank, int first, int step, int feature) {
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
        const int row = first + i * step;
        weights[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < rank && feature < features)
            weights[i] = *reinterpret_cast<const float4*>(project + static_cast<long long>(row) * features + feature);
    }
}

// A warp's rows of this thread block's part of z; `weights` are those of its first tile.
template <int TOKENS>
__device__ __forceinline__ void project_rows(Word* part, float4 (&weights)[ROWS_AT_ONCE], const float* hidden,
                                             const float* project, int features, int rank, int first, int step,
                                             unsigned answer) {
    const int lane = threadIdx.x % LANES;
    float sums[ROWS_AT_ONCE][TOKENS] = {};
    int feature = (blockIdx.x * LANES + lane) * 4;
    for (int tile = blockIdx.x; tile * TILE < features; tile += gridDim.x) {
        float4 x[TOKENS];
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            x[token] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (feature < features)
                x[token] = fresh(reinterpret_cast<const float4*>(hidden + static_cast<long long>(token) * features + feature));
        }
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; ++i)
#pragma unroll
            for (int token = 0; token < TOKENS; ++token)
                sums[i][token] += weights[i].x * x[token].x + weights[i].y * x[token].y + weights[i].z * x[token].z +
                                  weights[i].w * x[token].w;
        feature += gridDim.x * TILE;
        if (feature - lane * 4 < features)
            load_projection(weights, project, features, rank, first, step, feature);
    }
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
        const int row = first + i * step;
        if (row >= rank) break;
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const float sum = lanes_sum(sums[i][token]);
            if (lane == 0) store_word(part + token * MOST_RANK + row, word(sum, answer));
        }
    }
}

// This thread block's part of z, words [TOKENS, MOST_RANK]; the answer's number.
template <int TOKENS, int THREADS>
__device__ unsigned project_part(Word* part, const float* hidden, const float* project, int features, int rank,
                                 const Desk* desk) {
    constexpr int WARPS = THREADS / LANES;
    const int feature = (blockIdx.x * LANES + threadIdx.x % LANES) * 4;
    int row = threadIdx.x / LANES;
    float4 weights[ROWS_AT_ONCE];
    load_projection(weights, project, features, rank, row, WARPS, feature);  // does not depend on the kernel before
    wait_for_previous();
    let_next_start();
    const unsigned answer = fresh(&desk->answers) + 1;
    if (static_cast<int>(blockIdx.x) * TILE >= features) return answer;
    for (;;) {
        project_rows<TOKENS>(part, weights, hidden, project, features, rank, row, WARPS, answer);
        if ((row += ROWS_AT_ONCE * WARPS) >= rank) return answer;
        load_projection(weights, project, features, rank, row, WARPS, feature);
    }
}

// The sum of a number of z over every `step`th part from `part` on.
__device__ __forceinline__ float sum_of_parts(const Word* words, int part, int step, int count, int stride,
                                              unsigned answer) {
    float sum = 0.0f;
    for (; part < count; part += step * PARTS_AT_ONCE) {
        Word found[PARTS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; ++i) found[i] = load_word(words + min(part + i * step, count - 1) * stride);
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; ++i) {
            if (part + i * step >= count) break;
            while (!belongs_to(found[i], answer)) found[i] = load_word(words + (part + i * step) * stride);
            sum += float_of(found[i]);
        }
    }
    return sum;
}

// z from all parts, always added in the same order, into shared memory; 1 / rms of each token.
template <int TOKENS, int THREADS>
__device__ void gather(float (&z)[TOKENS][MOST_RANK], float (&scales)[TOKENS], const Word* parts, int count,
                       unsigned answer, const float* bias, int rank, float epsilon) {
    __shared__ float sums[THREADS > MOST_RANK ? THREADS : MOST_RANK];
    const int width = min((rank + LANES - 1) / LANES * LANES, THREADS), groups = THREADS / width;
    const int group = threadIdx.x / width;
    for (int token = 0; token < TOKENS; ++token) {
        const Word* mine = parts + token * MOST_RANK;
        if (group < groups)
            for (int row = threadIdx.x % width; row < rank; row += width)
                sums[group * width + row] = sum_of_parts(mine + row, group, groups, count, TOKENS * MOST_RANK, answer);
        __syncthreads();
        for (int row = threadIdx.x; row < MOST_RANK; row += THREADS) {
            float whole = 0.0f;
            if (row < rank) {
                whole = bias[row];
                for (int i = 0; i < groups; ++i) whole += sums[i * width + row];
            }
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
//   z_parts     words [thread blocks, TOKENS, MOST_RANK]
//   logits      [TOKENS, outputs], or null where nobody reads them
//   kept        as of `keep`, for hidden states that are also kept; or null
template <int TOKENS, int THREADS>
__device__ void exit_check(float* logits, const float* hidden, const float* project, const float* bias,
                           const Element* vocabulary, const float* vocabulary_bias, Word* z_parts, int features,
                           int rank, int columns, int outputs, float epsilon, float* kept, const int* positions,
                           const int* sequences, int capacity, Asked asked) {
    __shared__ float z[TOKENS][MOST_RANK];
    const int each = (outputs + gridDim.x - 1) / gridDim.x;
    const int first = min(static_cast<int>(blockIdx.x) * each, outputs), stop = min(first + each, outputs);
    constexpr int LINE = 128 / sizeof(Element);
    const Element* mine = vocabulary + static_cast<long long>(first) * columns;
    for (int at = threadIdx.x * LINE; at < (stop - first) * columns; at += THREADS * LINE)
        prefetch(mine + at);
    const unsigned answer = asked.answer = project_part<TOKENS, THREADS>(
        z_parts + static_cast<long long>(blockIdx.x) * TOKENS * MOST_RANK, hidden, project, features, rank, asked.desk);
    const int token_to_keep = gridDim.x - 1 - blockIdx.x;  // the last thread blocks have least to do
    if (kept && token_to_keep < TOKENS)
        keep_token(kept, hidden, positions, sequences, capacity, features, token_to_keep, threadIdx.x, THREADS);
    float scales[TOKENS];
    const int busy = min(static_cast<int>(gridDim.x), (features + TILE - 1) / TILE);
    gather<TOKENS, THREADS>(z, scales, z_parts, busy, answer, bias, rank, epsilon);
    Summary summaries[TOKENS];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
        summaries[token] = Summary::nothing(min(first + static_cast<int>(threadIdx.x), outputs - 1));
    for (int row = first + threadIdx.x; row < stop; row += THREADS) {
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
            summaries[token].add(logit, row);
        }
    }
    Part* parts = asked.desk->parts;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        const Summary all = block_summary(summaries[token]);
        if (threadIdx.x == 0) parts[token * gridDim.x + blockIdx.x].tell(all, answer);
    }
    if (blockIdx.x) return;
    bool sure = true;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        Summary part = Summary::nothing(outputs - 1);
        for (int i = threadIdx.x; i < gridDim.x; i += THREADS) part.add(parts[token * gridDim.x + i].await(answer));
        const Summary all = block_summary(part);
        if (threadIdx.x == 0) sure &= asked.give(token, all);
    }
    if (threadIdx.x == 0) asked.end(sure);
}

#define CHECK(KIND, TOKENS, THREADS, RESIDENT)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) exit_check##KIND##_##TOKENS(                \
        float* logits, const float* hidden, const float* project, const float* bias, const Element* vocabulary, \
        const float* vocabulary_bias, Word* z_parts, int features, int rank, int columns, int outputs,          \
        float epsilon, float* kept, const int* positions, const int* sequences, int capacity, Desk* desk,       \
        Mail* mail, int measure, double threshold, int sampled) {                                               \
        exit_check<TOKENS, THREADS>(logits, hidden, project, bias, vocabulary, vocabulary_bias, z_parts,        \
                                    features, rank, columns, outputs, epsilon, kept, positions, sequences,      \
                                    capacity, {desk, mail, 0, measure, threshold, sampled});                    \
    }

CHECK(, 1, CHECK_THREADS, 1)
CHECK(, 2, CHECK_THREADS, 1)
CHECK(_beside, 1, BESIDE_THREADS, BESIDE_RESIDENT)
CHECK(_beside, 2, BESIDE_THREADS, BESIDE_RESIDENT)
