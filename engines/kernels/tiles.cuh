// Attention of a warp's sixteen rows of queries to keys and values in shared memory, on tensor cores, with
// the softmax kept in fp32 as it goes on (FlashAttention-2, arXiv 2307.08691).
//
// A row is a query: token `row / GROUP`, and head `row % GROUP` of those that share keys and values.
#pragma once
#include "instructions.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr int TILE_ROWS = 16;
constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;  // features with those that are zero, for whole tiles
constexpr int ROW_BYTES = DIM * sizeof(Element);
// Elements from a row to the next in shared memory, so that eight rows lie in different banks.
constexpr int STRIDE = DIM + WIDE;
constexpr float LOG2_E = 1.44269504f;
constexpr float NONE = -1e30f;  // of a score: less than any

// Feature `i` of a head, rotated with its partner half of ROTARY_DIM away, as transformers lays them out.
__device__ __forceinline__ float rotated(const float* head, int i, const float* cosines, const float* sines) {
    constexpr int HALF_DIM = ROTARY_DIM / 2;
    if (i >= ROTARY_DIM) return head[i];
    if (i < HALF_DIM) return head[i] * cosines[i] - head[i + HALF_DIM] * sines[i];
    return head[i] * cosines[i - HALF_DIM] + head[i - HALF_DIM] * sines[i - HALF_DIM];
}

// What the kernels are given: qkv [tokens, QKV_WIDTH] and the cache, [sequences, KV_HEADS, capacity,
// HEAD_DIM] keys and values; positions and sequences of the tokens; cosines and sines [rows, ROTARY_DIM / 2].
struct Inputs {
    const float* qkv;
    Element *keys, *values;
    const float *cosines, *sines;
    const int *positions, *sequences;
    int capacity;

    __device__ const float* token(int token) const { return qkv + static_cast<long long>(token) * QKV_WIDTH; }
    __device__ const float* cosine(int token) const { return cosines + positions[token] * (ROTARY_DIM / 2); }
    __device__ const float* sine(int token) const { return sines + positions[token] * (ROTARY_DIM / 2); }
    // Where the rows of a head begin in the cache.
    __device__ long long base(int token, int kv_head) const {
        return (static_cast<long long>(sequences[token]) * KV_HEADS + kv_head) * capacity * HEAD_DIM;
    }
    __device__ float query(int token, int head, int feature) const {
        return rotated(this->token(token) + head * HEAD_DIM, feature, cosine(token), sine(token));
    }
    __device__ float key(int token, int kv_head, int feature) const {
        return query(token, HEADS + kv_head, feature);
    }
    __device__ float value(int token, int kv_head, int feature) const {
        return this->token(token)[(HEADS + KV_HEADS + kv_head) * HEAD_DIM + feature];
    }
};

// Starts copies of keys and values `first` to `first` + COUNT to shared memory; those from `stop` on are
// zeros, as nothing is known of that memory. By `lanes` threads, of which this is the `lane`th.
template <int COUNT>
__device__ __forceinline__ void copy_rows(Element* to_keys, Element* to_values, const Element* keys,
                                          const Element* values, int first, int stop, int lane, int lanes) {
    constexpr int BYTES = HEAD_DIM * sizeof(Element);
    constexpr int COPY = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : 4;
    constexpr int EACH = COPY / sizeof(Element), COPIES = HEAD_DIM / EACH;
    static_assert(BYTES % 4 == 0, "a head must have an even number of features");
#pragma unroll 4
    for (int i = lane; i < COUNT * COPIES; i += lanes) {
        const int row = i / COPIES, feature = i % COPIES * EACH;
        const long long from = static_cast<long long>(min(first + row, stop - 1)) * HEAD_DIM + feature;
        copy_async<COPY>(to_keys + row * STRIDE + feature, keys + from, first + row < stop);
        copy_async<COPY>(to_values + row * STRIDE + feature, values + from, first + row < stop);
    }
}

// Zeros in the features that only make tiles whole.
__device__ __forceinline__ void clear_padding(Element* rows, int count, int lane, int lanes) {
    constexpr int PADDING = DIM - HEAD_DIM, EACH = PADDING ? PADDING : 1;
    for (int i = lane; i < count * PADDING; i += lanes)
        store(rows + i / EACH * STRIDE + HEAD_DIM + i % EACH, 0.0f);
}

// Operands of one product [16, DEPTH] [DEPTH, 8] as a warp's lanes hold them.
#if HALF
constexpr int DEPTH = 16;
struct Left {
    unsigned words[4];
};
struct Right {
    unsigned words[2];
};

__device__ __forceinline__ void multiply(float (&sums)[4], const Left& a, const Right& b) {
    multiply_half(sums, a.words, b.words);
}

// Rows of 16 features.
__device__ __forceinline__ Left load_left(const Element* at) {
    const int lane = threadIdx.x % LANES;
    Left left;
    load_matrices<false>(left.words, at + lane % 16 * STRIDE + lane / 16 * 8);
    return left;
}

// 16 features of 16 keys.
__device__ __forceinline__ void load_keys(Right (&two)[2], const Element* at) {
    const int lane = threadIdx.x % LANES;
    unsigned words[4];
    load_matrices<false>(words, at + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8);
    two[0] = {words[0], words[1]}, two[1] = {words[2], words[3]};
}

// 16 features of 16 values, as DEPTH rows.
__device__ __forceinline__ void load_values(Right (&two)[2], const Element* at) {
    const int lane = threadIdx.x % LANES;
    unsigned words[4];
    load_matrices<true>(words, at + lane % 16 * STRIDE + lane / 16 * 8);
    two[0] = {words[0], words[1]}, two[1] = {words[2], words[3]};
}

// Sums of products as the left operand: DEPTH columns are those of two of them.
template <int TILES>
__device__ __forceinline__ Left as_left(const float (&sums)[TILES][4], int step) {
    const auto &one = sums[2 * step], &other = sums[2 * step + 1];
    return {pack(one[0], one[1]), pack(one[2], one[3]), pack(other[0], other[1]), pack(other[2], other[3])};
}
#else
constexpr int DEPTH = 8;
struct Left {
    float values[4];
};
struct Right {
    float values[2];
};

// A number as the sum of two of 11 bits each: what is left over is less than 2^-22 of it.
__device__ __forceinline__ float leading(float x) {
    return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
}

// In fp32 but for the product of the trailing parts.
__device__ __forceinline__ void multiply(float (&sums)[4], const Left& a, const Right& b) {
    float high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) high_a[i] = leading(a.values[i]), low_a[i] = leading(a.values[i] - high_a[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) high_b[i] = leading(b.values[i]), low_b[i] = leading(b.values[i] - high_b[i]);
    multiply_tf32(sums, low_a, high_b);
    multiply_tf32(sums, high_a, low_b);
    multiply_tf32(sums, high_a, high_b);
}

__device__ __forceinline__ Left load_left(const Element* at) {
    const int lane = threadIdx.x % LANES;
    at += lane / 4 * STRIDE + lane % 4;
    return {at[0], at[8 * STRIDE], at[4], at[8 * STRIDE + 4]};
}

// 8 features of 16 keys.
__device__ __forceinline__ void load_keys(Right (&two)[2], const Element* at) {
    const int lane = threadIdx.x % LANES;
    at += lane / 4 * STRIDE + lane % 4;
    two[0] = {at[0], at[4]}, two[1] = {at[8 * STRIDE], at[8 * STRIDE + 4]};
}

// 16 features of 8 values, in the order of as_left.
__device__ __forceinline__ void load_values(Right (&two)[2], const Element* at) {
    const int lane = threadIdx.x % LANES;
    at += lane % 4 * 2 * STRIDE + lane / 4;
    two[0] = {at[0], at[STRIDE]}, two[1] = {at[8], at[STRIDE + 8]};
}

// Sums of products as the left operand, columns 0, 2, 4, 6, 1, 3, 5, 7: those that each lane holds.
template <int TILES>
__device__ __forceinline__ Left as_left(const float (&sums)[TILES][4], int step) {
    const auto& one = sums[step];
    return {one[0], one[2], one[1], one[3]};
}
#endif

// The queries of a warp: in registers, where they fit there.
struct Queries {
#if HALF
    Left steps[DIM / DEPTH];

    __device__ __forceinline__ explicit Queries(const Element* rows) {
#pragma unroll
        for (int step = 0; step < DIM / DEPTH; ++step) steps[step] = load_left(rows + step * DEPTH);
    }
    __device__ __forceinline__ Left at(int step) const { return steps[step]; }
#else
    const Element* rows;

    __device__ __forceinline__ explicit Queries(const Element* rows) : rows(rows) {}
    __device__ __forceinline__ Left at(int step) const { return load_left(rows + step * DEPTH); }
#endif
};

// What a warp has seen for its rows; a lane holds of rows lane / 4 and lane / 4 + 8, of every 8 columns
// 2 (lane % 4) and the next.
struct Seen {
    int position[2];               // of the rows' tokens; -1 where there is no row
    float largest[2] = {NONE, NONE};  // score, in powers of 2
    float total[2] = {};           // of 2^(score - largest), this lane's part
    float mixed[DIM / 8][4] = {};  // values weighted by it

    // Attends to KEYS keys from `first` on; `partly` where some rows don't see all of them.
    template <int KEYS>
    __device__ __forceinline__ void attend(const Queries& queries, const Element* keys, const Element* values,
                                           int first, bool partly) {
        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < DIM / DEPTH; ++step) {
            const Left query = queries.at(step);
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; tile += 2) {
                Right key[2];
                load_keys(key, keys + tile * 8 * STRIDE + step * DEPTH);
                multiply(score[tile], query, key[0]);
                multiply(score[tile + 1], query, key[1]);
            }
        }
        if (partly) mask<KEYS>(score, first);
        weigh<KEYS>(score);
#pragma unroll
        for (int step = 0; step < KEYS / DEPTH; ++step) {
            const Left weights = as_left(score, step);
#pragma unroll
            for (int tile = 0; tile < DIM / 8; tile += 2) {
                Right value[2];
                load_values(value, values + step * DEPTH * STRIDE + tile * 8);
                multiply(mixed[tile], weights, value[0]);
                multiply(mixed[tile + 1], weights, value[1]);
            }
        }
    }

    template <int KEYS>
    __device__ __forceinline__ void mask(float (&score)[KEYS / 8][4], int first) const {
#pragma unroll
        for (int tile = 0; tile < KEYS / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first + tile * 8 + threadIdx.x % 4 * 2 + i % 2, at = position[i / 2];
                if (key > at || (WINDOW && key + WINDOW <= at)) score[tile][i] = -__int_as_float(0x7f800000);
            }
    }

    // Scores to weights, relative to the largest so far.
    template <int KEYS>
    __device__ __forceinline__ void weigh(float (&score)[KEYS / 8][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = largest[half];
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; ++tile)
                most = fmaxf(most, fmaxf(score[tile][2 * half], score[tile][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            const float kept = power_of_2(largest[half] - most);
            largest[half] = most;
            total[half] *= kept;
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; ++tile)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i)
                    total[half] += score[tile][i] = power_of_2(score[tile][i] - most);
#pragma unroll
            for (int tile = 0; tile < DIM / 8; ++tile)
                mixed[tile][2 * half] *= kept, mixed[tile][2 * half + 1] *= kept;
        }
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) total[half] = lanes_sum<4>(total[half]);
    }
};
