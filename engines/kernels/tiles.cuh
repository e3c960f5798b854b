// What attention's kernels share: queries, keys and values as they get to shared memory, and from there, in
// tiles, to the tensor cores.
//
// Queries of a sequence are counted over its tokens and the heads that share keys and values: query q is
// of token q / GROUP, head q % GROUP of the group.
#pragma once
#include "float8.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;  // features with those that are zero, for whole tiles
constexpr int ROW_BYTES = DIM * sizeof(Element);
// Elements from a row to the next in shared memory, so that eight rows lie in different banks.
constexpr int STRIDE = DIM + WIDE;
// The number that keys and values are stored as, in the cache and on their way from it.
#if FP8_CACHE
typedef Fp8 Cached;
#else
typedef Element Cached;
#endif
constexpr int CACHED_WIDE = 16 / sizeof(Cached), CACHED_STRIDE = DIM + CACHED_WIDE;
struct alignas(16) CachedChunk {
    Cached values[CACHED_WIDE];
};
constexpr float NONE = -1e30f;  // of a score: less than any
constexpr int PAGE = 64;        // positions of a page of the cache

// Features that are loaded, rotated and stored at once.
constexpr int HALF_ROTARY = ROTARY_DIM / 2;
constexpr int VECTOR = HEAD_DIM % 4 == 0 && HALF_ROTARY % 4 == 0 ? 4 : HEAD_DIM % 2 == 0 && HALF_ROTARY % 2 == 0 ? 2 : 1;
constexpr int VECTORS = HEAD_DIM / VECTOR;

// Scores in powers of 2; of a model that caps them, tanh(score / cap) * cap.
__device__ __forceinline__ float softcapped(float score) {
#if SOFTCAP
    const float cap = __uint_as_float(SOFTCAP) * LOG2_E;
    return tanhf(score / cap) * cap;
#else
    return score;
#endif
}

template <class Number>
struct alignas(VECTOR * sizeof(Number)) Vector {
    Number values[VECTOR];
};
typedef Vector<float> Features;

__device__ __forceinline__ Features features_at(const float* at) { return *reinterpret_cast<const Features*>(at); }

__device__ __forceinline__ void store_features(Cached* at, const Features& features) {
    Vector<Cached> stored;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) store(&stored.values[i], features.values[i]);
    *reinterpret_cast<Vector<Cached>*>(at) = stored;
}

// Where a query's feature lies in shared memory. A lane's four consecutive ones of a key of fp8 are those that it
// multiplies with features 2 (lane % 4), the next, and the two 8 further on: the queries' lie as they do.
__device__ __forceinline__ int query_place(int feature) {
#if FP8_CACHE
    return feature / 16 * 16 + feature % 4 / 2 * 8 + feature % 16 / 4 * 2 + feature % 2;
#else
    return feature;
#endif
}

// Stores features of a query times a factor.
__device__ __forceinline__ void store_query(Element* row, int feature, const Features& features, float factor) {
#if FP8_CACHE
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) store(row + query_place(feature + i), features.values[i] * factor);
#else
    Vector<Element> stored;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) store(&stored.values[i], features.values[i] * factor);
    *reinterpret_cast<Vector<Element>*>(row + feature) = stored;
#endif
}

// Features of a head from `i` on, rotated with their partners half of ROTARY_DIM away, as transformers lays
// them out.
__device__ __forceinline__ Features rotated(const float* head, int i, const float* cosines, const float* sines) {
    Features own = features_at(head + i);
    if (i >= ROTARY_DIM) return own;
    const bool second = i >= HALF_ROTARY;
    const int angle = second ? i - HALF_ROTARY : i;
    const Features partner = features_at(head + (second ? angle : i + HALF_ROTARY));
    const Features cosine = features_at(cosines + angle), sine = features_at(sines + angle);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j)
        own.values[j] = own.values[j] * cosine.values[j] +
                        (second ? partner.values[j] : -partner.values[j]) * sine.values[j];
    return own;
}

// What the kernels are given: qkv [tokens, QKV_WIDTH] and the cache, [pages, KV_HEADS, PAGE, HEAD_DIM] keys and
// values; positions and sequences of the tokens; cosines and sines [rows, ROTARY_DIM / 2]. The table
// [sequences, most_pages] names the pages of each sequence, in order; without one they are its own in a row.
struct Inputs {
    const float* qkv;
    Cached *keys, *values;
    const float *cosines, *sines;
    const int *positions, *sequences, *table;
    int most_pages;

    // Where the rows of a head begin in a sequence's page.
    __device__ __forceinline__ long long page(int sequence, int kv_head, int index) const {
        const int at = sequence * most_pages + index, page = table ? table[at] : at;
        return (static_cast<long long>(page) * KV_HEADS + kv_head) * (PAGE * HEAD_DIM);
    }
    // Where the row of a position lies.
    __device__ __forceinline__ long long place(int sequence, int kv_head, int position) const {
        return page(sequence, kv_head, position / PAGE) + position % PAGE * HEAD_DIM;
    }
    // Features of a head of queries or, from HEADS on, keys, rotated for a position.
    __device__ Features turned(int token, int head, int feature, int position) const {
#if UNROTATED
        if (!cosines) return features_at(row(token, head) + feature);
#endif
        return rotated(row(token, head), feature, cosines + position * HALF_ROTARY, sines + position * HALF_ROTARY);
    }
    __device__ Features value(int token, int kv_head, int feature) const {
        return features_at(row(token, HEADS + KV_HEADS + kv_head) + feature);
    }
    __device__ const float* row(int token, int head) const {
        return qkv + static_cast<long long>(token) * QKV_WIDTH + head * HEAD_DIM;
    }
};

// Starts copies of COUNT keys and values to shared memory, from position `first` of a sequence on, a multiple of
// COUNT: all of one page. Those from `stop` on are zeros, as nothing is known of that memory. By `lanes`
// threads, of which this is the `lane`th.
template <int COUNT>
__device__ __forceinline__ void copy_rows(Cached* to_keys, Cached* to_values, const Inputs& in, int sequence,
                                          int kv_head, int first, int stop, int lane, int lanes) {
    constexpr int BYTES = HEAD_DIM * sizeof(Cached);
    constexpr int COPY = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : 4;
    constexpr int EACH = COPY / sizeof(Cached), COPIES = HEAD_DIM / EACH;
    static_assert(BYTES % 4 == 0, "a head's features must fill words");
    static_assert(PAGE % COUNT == 0, "keys that are copied together lie in one page");
    const long long start = in.place(sequence, kv_head, first);
#pragma unroll 4
    for (int i = lane; i < COUNT * COPIES; i += lanes) {
        const int row = i / COPIES, feature = i % COPIES * EACH;
        const long long from = start + min(row, stop - 1 - first) * HEAD_DIM + feature;
        copy_async<COPY>(to_keys + row * CACHED_STRIDE + feature, in.keys + from, first + row < stop);
        copy_async<COPY>(to_values + row * CACHED_STRIDE + feature, in.values + from, first + row < stop);
    }
}

// Consecutive tokens of one sequence, of a pass: [chunks, 2] first token and how many; without such a list each
// has `tokens`.
struct Chunks {
    const int* list;
    int tokens;

    __device__ __forceinline__ int first(int chunk) const { return list ? list[2 * chunk] : chunk * tokens; }
    __device__ __forceinline__ int count(int chunk) const { return list ? list[2 * chunk + 1] : tokens; }
};

// Zeros in the features that only make tiles whole.
__device__ __forceinline__ void clear_padding(Cached* rows, int count, int lane, int lanes) {
    constexpr int PADDING = DIM - HEAD_DIM, EACH = PADDING ? PADDING : 1;
    for (int i = lane; i < count * PADDING; i += lanes)
        store(rows + i / EACH * CACHED_STRIDE + HEAD_DIM + i % EACH, 0.0f);
}

// The same of queries.
__device__ __forceinline__ void clear_query_padding(Element* rows, int count, int lane, int lanes) {
    constexpr int PADDING = DIM - HEAD_DIM, EACH = PADDING ? PADDING : 1;
    for (int i = lane; i < count * PADDING; i += lanes)
        store(rows + i / EACH * STRIDE + query_place(HEAD_DIM + i % EACH), 0.0f);
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

// DEPTH features of 16 rows.
__device__ __forceinline__ Left load_left(const Element* at) {
    const int lane = threadIdx.x % LANES;
    Left left;
    load_matrices<false>(left.words, at + lane % 16 * STRIDE + lane / 16 * 8);
    return left;
}

// The same of 8 rows, as columns.
__device__ __forceinline__ Right load_right(const Element* at) {
    const int lane = threadIdx.x % LANES;
    at += lane / 4 * STRIDE + lane % 4 * 2;
    return {*reinterpret_cast<const unsigned*>(at), *reinterpret_cast<const unsigned*>(at + 8)};
}

#if FP8_CACHE
// Tiles of a load of values: of rows, and of columns.
constexpr int ROW_TILES = 2, COLUMN_TILES = 4;

// DEPTH features of 16 keys, in the queries' order.
__device__ __forceinline__ Left load_left_keys(const Fp8* at) {
    const int lane = threadIdx.x % LANES;
    at += lane / 4 * CACHED_STRIDE + lane % 4 * 4;
    const unsigned one = *reinterpret_cast<const unsigned*>(at),
                   other = *reinterpret_cast<const unsigned*>(at + 8 * CACHED_STRIDE);
    return {two_floats<0>(one), two_floats<0>(other), two_floats<1>(one), two_floats<1>(other)};
}

// DEPTH rows of values, of which 32 features become rows of two: of each 16 the even ones, then the odd ones.
__device__ __forceinline__ void load_left_values(Left (&two)[ROW_TILES], const Fp8* at) {
    const int lane = threadIdx.x % LANES;
    unsigned words[4];  // of two features two keys each
    load_matrices<true>(words, at + lane % 16 * CACHED_STRIDE + lane / 16 * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned pairs = __byte_perm(words[2 * i + half], 0, 0x3120);
            two[i].words[2 * half] = two_floats<0>(pairs);
            two[i].words[2 * half + 1] = two_floats<1>(pairs);
        }
}

// Which feature of 16 a row of those is.
__device__ __forceinline__ int feature_of_row(int row) { return row % 8 * 2 + row / 8; }

// 16 features of 16 keys, in the queries' order.
__device__ __forceinline__ void load_keys(Right (&two)[2], const Fp8* at) {
    const Left both = load_left_keys(at);
    two[0] = {both.words[0], both.words[2]}, two[1] = {both.words[1], both.words[3]};
}

// 32 features of 16 values, as DEPTH rows: of each 16 the even ones, then the odd ones.
__device__ __forceinline__ void load_values(Right (&four)[COLUMN_TILES], const Fp8* at) {
    Left two[2];
    load_left_values(two, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = {two[i / 2].words[i % 2], two[i / 2].words[i % 2 + 2]};
}

// Which feature of 16 a column of two tiles of those is.
__device__ __forceinline__ int feature_of_column(int tile, int column) { return column * 2 + tile; }
#else
// DEPTH rows, of which 16 features become rows.
__device__ __forceinline__ Left load_left_transposed(const Element* at) {
    const int lane = threadIdx.x % LANES;
    Left left;
    load_matrices<true>(left.words, at + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8);
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
#endif

// Sums of products as the left operand: DEPTH columns are those of two of them.
template <int TILES>
__device__ __forceinline__ Left as_left(const float (&sums)[TILES][4], int step) {
    const auto &one = sums[2 * step], &other = sums[2 * step + 1];
    return {pack(one[0], one[1]), pack(one[2], one[3]), pack(other[0], other[1]), pack(other[2], other[3])};
}

// Sums as the right operand: DEPTH rows of them.
__device__ __forceinline__ Right as_right(const float (&sums)[4], int) {
    return {transpose(pack(sums[0], sums[1])), transpose(pack(sums[2], sums[3]))};
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

__device__ __forceinline__ Right load_right(const Element* at) {
    const int lane = threadIdx.x % LANES;
    at += lane / 4 * STRIDE + lane % 4;
    return {at[0], at[4]};
}

// DEPTH rows in the order 0, 2, 4, 6, 1, 3, 5, 7, of which 16 features become rows.
__device__ __forceinline__ Left load_left_transposed(const Element* at) {
    const int lane = threadIdx.x % LANES;
    at += lane % 4 * 2 * STRIDE + lane / 4;
    return {at[0], at[8], at[STRIDE], at[STRIDE + 8]};
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

// Sums as the right operand, rows in the order of load_left_transposed.
__device__ __forceinline__ Right as_right(const float (&sums)[4], int step) {
    const int lane = threadIdx.x % LANES, from = lane % 4 * 8 + lane / 8;
    const bool odd = lane / 4 % 2;
    Right right;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float even_column = __shfl_sync(ALL, sums[2 * step], from + 4 * i);
        const float odd_column = __shfl_sync(ALL, sums[2 * step + 1], from + 4 * i);
        right.values[i] = odd ? odd_column : even_column;
    }
    return right;
}
#endif

#if !FP8_CACHE
constexpr int ROW_TILES = 1, COLUMN_TILES = 2;
__device__ __forceinline__ Left load_left_keys(const Element* at) { return load_left(at); }
__device__ __forceinline__ void load_left_values(Left (&one)[ROW_TILES], const Element* at) {
    one[0] = load_left_transposed(at);
}
__device__ __forceinline__ int feature_of_row(int row) { return row; }
__device__ __forceinline__ int feature_of_column(int tile, int column) { return tile * 8 + column; }
#endif
