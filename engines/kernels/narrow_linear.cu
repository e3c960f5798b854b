// Products of a small model's few tokens on tensor cores, in place of those of tiled_linear.cu. In fp16
// alone.
//
// Reading a matrix of few columns is little beside what a kernel takes to begin and end, and a warp would
// have less on its way than the memory needs. So a warp's next weights, of this tile and of those after it,
// are always on their way; tiles are half as high, so that more thread blocks share a matrix of few rows, and
// warps wait for one another after several; and the norm before a product is part of it: another kernel would
// take more than every thread block takes to normalise a few tokens. Spans, and what is multiplied with them,
// are as in tiled_linear.cu. bench/NOTES.md has what else was tried.
#include "activation.cuh"
#include "staging.cuh"

#if HALF
constexpr int NARROW_ROWS = 8;  // of a tile: one product, of eight places for two rows each
// Spans of a warp that are on their way: as many as registers are left for.
template <int GROUPS>
constexpr int NARROW_AHEAD = GROUPS == 1 ? 4 : 3;
// Tiles after which warps wait for one another.
template <int GROUPS>
constexpr int NARROW_BATCH = GROUPS == 1 ? 4 : 2;
constexpr int NARROW_WARPS = 12, NARROW_THREADS = NARROW_WARPS * LANES;
#define INLINE __attribute__((always_inline))
// From a token's sums to the next: those of eight lanes are in different banks.
constexpr int NARROW_SUMS = NARROW_ROWS + 4;

// A lane's weights of a span: of two rows.
struct NarrowWeights {
    Chunk rows[2];
};

// Inputs [tokens, columns] that are there as products take them.
struct Given {
    const Element* x;
    int columns;

    __device__ __forceinline__ int needed(int) const { return 0; }
    __device__ __forceinline__ void before(float*) const {}
    __device__ __forceinline__ void stage(Element* inputs, int apart, int tokens, int spans, float*) const {
        stage_inputs<NARROW_WARPS>(inputs, apart, x, columns, tokens, {0, spans});
    }
};

template <class Number>
struct alignas(2 * sizeof(Number)) Two {
    Number values[2];
};

__device__ __forceinline__ Two<float> two_at(const float* at) {
    return *reinterpret_cast<const Two<float>*>(at);
}

// Hidden states [tokens, width] that are normalised on the way, rounded, with zeros beyond the width, a
// multiple of 4; without a weight x / rms. `room` holds [2 + tokens, width]: weight, bias, the hidden states
// (registers hold weights of the product), then mean and scale of each token.
struct Normed {
    const float *hidden, *weight, *bias;
    float epsilon;
    int width;

    // Numbers that find room.
    __device__ __forceinline__ int needed(int tokens) const { return (2 + tokens) * width + 2 * tokens; }

    // The norm's weight and bias into shared memory: they don't depend on the kernel before.
    __device__ __forceinline__ void before(float* room) const {
        for (int i = threadIdx.x * 4; i < width; i += NARROW_THREADS * 4) {
            if (weight) copy_async<16>(room + i, weight + i, true);
            if (bias) copy_async<16>(room + width + i, bias + i, true);
        }
    }

    // A warp finds mean and scale of a token, and then normalises the columns that it takes itself, of all.
    __device__ __forceinline__ void stage(Element* inputs, int apart, int tokens, int spans,
                                          float* room) const {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        float *const states = room + 2 * width, *const found = states + tokens * width;
        for (int token = warp; token < tokens; token += NARROW_WARPS)
            for (int i = lane * 4; i < width; i += LANES * 4)
                copy_async<16>(states + token * width + i, hidden + token * width + i, true);
        copies_end();
        copies_wait<0>();
        for (int token = warp; token < tokens; token += NARROW_WARPS)
            find(found + 2 * token, states + token * width);
        __syncthreads();  // what other warps have brought and found is there
        for (int column = warp * SPAN + lane * 2; column < spans * SPAN; column += NARROW_WARPS * SPAN) {
            const bool valid = column < width;
            const int at = valid ? column : 0;
            const Two<float> factors = weight ? two_at(room + at) : Two<float>{1.0f, 1.0f};
            const Two<float> shifts = bias ? two_at(room + width + at) : Two<float>{};
            for (int token = 0; token < tokens; ++token) {
                const Two<float> state = two_at(states + token * width + at), of = two_at(found + 2 * token);
                Two<Element> normed;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float y = (state.values[i] - of.values[0]) * of.values[1] * factors.values[i] +
                                    shifts.values[i];
                    store(&normed.values[i], valid ? y : 0.0f);
                }
                *reinterpret_cast<Two<Element>*>(inputs + token * apart + column) = normed;
            }
        }
        __syncwarp();
    }

    // Mean (0 for x / rms) and scale of a token, of which each lane has copied what it reads.
    __device__ __forceinline__ void find(float* found, const float* state) const {
        const int first = threadIdx.x % LANES * 4;
        float mean = 0.0f, square = 0.0f;
#pragma unroll 4
        for (int i = first; i < width; i += LANES * 4) {
            const float4 x = *reinterpret_cast<const float4*>(state + i);
            mean += x.x + x.y + (x.z + x.w);
            square += x.x * x.x + x.y * x.y + (x.z * x.z + x.w * x.w);
        }
#if NORM_LAYER
        mean = weight ? lanes_sum(mean) / width : 0.0f;
        if (weight) square = 0.0f;
        for (int i = first; weight && i < width; i += LANES * 4)
#pragma unroll
            for (int j = 0; j < 4; ++j) square += (state[i + j] - mean) * (state[i + j] - mean);
#else
        mean = 0.0f;
#endif
        const float scale = 1.0f / sqrtf(lanes_sum(square) / width + epsilon);
        if (first == 0) found[0] = mean, found[1] = scale;
    }
};

// What a thread adds to the sums of a row: loaded before they are there.
struct Added {
    float first, second;
};

// Products of a warp's lanes with a tile, for up to GROUPS * 8 tokens.
template <int GROUPS>
struct NarrowSums {
    float values[GROUPS][4] = {};

    // `inputs` begin with the span's.
    __device__ __forceinline__ void add(const NarrowWeights& weights, const Element* inputs, int apart,
                                        int tokens) {
        const int lane = threadIdx.x % LANES;
        const uint4 low = *reinterpret_cast<const uint4*>(&weights.rows[0]);
        const uint4 high = *reinterpret_cast<const uint4*>(&weights.rows[1]);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {  // places
            const unsigned mine = lane / 4 % 2 == odd ? 0xffffffffu : 0u;
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
                const int token = min(group * 8 + lane / 4, tokens - 1);
                const uint4 right = *reinterpret_cast<const uint4*>(inputs + token * apart +
                                                                    odd * (SPAN / 2) + lane % 4 * WIDE);
                multiply_half(values[group], {low.x & mine, high.x & mine, low.y & mine, high.y & mine},
                              {right.x, right.y});
                multiply_half(values[group], {low.z & mine, high.z & mine, low.w & mine, high.w & mine},
                              {right.z, right.w});
            }
        }
    }

    // Leaves the warp's sums [tokens, NARROW_SUMS], and is zero again.
    __device__ __forceinline__ void keep(float* warp_sums) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = group * 8 + lane % 4 * 2 + i % 2, row = i / 2 * 4 + lane / 8;
                const float sum = values[group][i] + __shfl_xor_sync(ALL, values[group][i], 4);
                if (lane / 4 % 2 == 0) warp_sums[token * NARROW_SUMS + row] = sum;
                values[group][i] = 0.0f;
            }
    }
};

// The sum of a row of a tile, for a token, over the columns of all warps that have any.
template <int GROUPS>
struct NarrowRowSum {
    const float* sums;  // the token's, of the first warp
    int warps;

    __device__ __forceinline__ float operator()(int row) const {
        float total = 0.0f;
#pragma unroll 8
        for (int warp = 0; warp < NARROW_WARPS; ++warp)
            if (warp < warps) total += sums[warp * GROUPS * 8 * NARROW_SUMS + row];
        return total;
    }
};

// Weights of a warp in the order in which it takes them: of a tile its spans, then of the thread block's
// next.
template <class RowOf>
struct Weighing {
    const Element* matrix;
    int columns, tiles, turns;
    RowOf row_of;  // row_of(tile, i) names a tile's rows
    int tile = blockIdx.x, turn = 0;

    // The next ones; zeros beyond the columns and after the last tile.
    __device__ __forceinline__ void load(NarrowWeights& weights) {
        const int lane = threadIdx.x % LANES;
        const int column = (turn * NARROW_WARPS + threadIdx.x / LANES) * SPAN + lane % 8 * WIDE;
        const bool valid = tile < tiles && column < columns;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = row_of(tile, lane / 8 + 4 * i) * columns + column;
            weights.rows[i] = load_once(matrix + at, valid);
        }
        if (++turn == turns) turn = 0, tile += gridDim.x;
    }
};

// Calls use(tile, row of the tile, token, sum of a row and token, added) by a thread for each of USED rows of
// a tile and token, where added(tile, row, token) was asked before. Shared memory: inputs, what a norm needs,
// sums of all warps [2, batch, NARROW_WARPS, tokens of the groups, NARROW_SUMS]. Warps wait for one another
// after a batch of tiles.
template <int GROUPS, int USED, class From, class RowOf, class Adding, class Use>
__device__ __forceinline__ void each_narrow_tile(const From& from, const Element* matrix, int columns,
                                                 int tiles, int tokens, int batch, RowOf row_of, Adding added,
                                                 Use use) {
    constexpr int WARP_SUMS = GROUPS * 8 * NARROW_SUMS, TILE_SUMS = NARROW_WARPS * WARP_SUMS;
    constexpr int OF_TILE = USED * GROUPS * 8;  // sums, of which a thread has one of a batch at most
    static_assert(NARROW_BATCH<GROUPS> * OF_TILE <= NARROW_THREADS, "there are as many threads");
    const int spans = (columns + SPAN - 1) / SPAN, turns = (spans + NARROW_WARPS - 1) / NARROW_WARPS;
    const int warp = threadIdx.x / LANES, apart = spans * SPAN + INPUTS_SHIFT;
    Element* const inputs = reinterpret_cast<Element*>(shared_memory);
    float* const room = reinterpret_cast<float*>(inputs + tokens * apart);
    float* const buffers = room + from.needed(tokens);
    Weighing<RowOf> weighing{matrix, columns, tiles, turns, row_of};
    constexpr int AHEAD = NARROW_AHEAD<GROUPS>;
    NarrowWeights weights[AHEAD];
    const bool has_columns = warp < spans;
    // A branch, beyond which the compiler does not put the loads: they are to come before the wait.
    if (has_columns) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) weighing.load(weights[i]);
    }
    from.before(room);
    wait_for_previous();
    let_next_start();
    const bool not_wanted = is_called_off();  // comes while the inputs do
    // The last warps, which may have no columns, add up what the others leave: a thread a row of the `own`th
    // tile of each batch, for a token.
    const int mine = NARROW_THREADS - 1 - threadIdx.x, own = mine / OF_TILE, row = mine % OF_TILE % USED,
              token = own < batch ? mine % OF_TILE / USED : tokens;
    int tile = blockIdx.x + own * gridDim.x;
    Added add = token < tokens && tile < tiles ? added(tile, row, token) : Added{};
    from.stage(inputs, apart, tokens, spans, room);

    NarrowSums<GROUPS> sums;
    const int each = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;  // tiles of this thread block
    int done = 0, kept = 0, turn = 0, side = 0;
    const auto is_last = [&](NarrowWeights& ready) INLINE {
        const int span = turn * NARROW_WARPS + warp;
        if (span < spans) sums.add(ready, inputs + span * SPAN, apart, tokens);
        if (has_columns) weighing.load(ready);
        if (++turn < turns) return false;
        turn = 0;
        float* const buffer = buffers + side * batch * TILE_SUMS;
        if (has_columns) sums.keep(buffer + kept * TILE_SUMS + warp * WARP_SUMS);
        ++done;
        if (++kept < batch && done < each) return false;
        const bool first = done == kept;
        if (first && __syncthreads_or(not_wanted)) return true;
        if (!first) __syncthreads();
        if (own < kept && token < tokens) {
            const float* from_here = buffer + own * TILE_SUMS + token * NARROW_SUMS;
            use(tile, row, token, NarrowRowSum<GROUPS>{from_here, min(spans, NARROW_WARPS)}, add);
            tile += batch * gridDim.x;
            if (tile < tiles) add = added(tile, row, token);
        }
        kept = 0, side ^= 1;
        return done == each;
    };
    // Not a loop, which the compiler may leave one: weights stay in registers only where all places are
    // known.
    static_assert(AHEAD == 3 || AHEAD == 4, "each is named");
    while (!is_last(weights[0]) && !is_last(weights[1]) && !is_last(weights[2]) &&
           (AHEAD == 3 || !is_last(weights[AHEAD - 1]))) {
    }
}

// out [tokens, outputs] fp32 = residual + inputs matrix^T + bias; out may be the residual itself
template <int GROUPS, class From>
__device__ __forceinline__ void narrow_linear(float* out, const float* residual, const From& from,
                                              const Element* matrix, const float* bias, int columns,
                                              int outputs, int tokens, int batch) {
    each_narrow_tile<GROUPS, NARROW_ROWS>(
        from, matrix, columns, (outputs + NARROW_ROWS - 1) / NARROW_ROWS, tokens, batch,
        [=](int tile, int i) { return min(tile * NARROW_ROWS + i, outputs - 1); },
        [=](int tile, int i, int token) {
            const int row = min(tile * NARROW_ROWS + i, outputs - 1);
            return Added{bias ? bias[row] : 0.0f, residual ? fresh(residual + token * outputs + row) : 0.0f};
        },
        [=](int tile, int i, int token, const NarrowRowSum<GROUPS>& sum, const Added& add) {
            const int row = tile * NARROW_ROWS + i;
            if (row < outputs) out[token * outputs + row] = sum(i) + add.first + add.second;
        });
}

// inner [tokens, width_out] = act(inputs gate^T) * (inputs up^T), gate's rows before up's; without a gate
// act(inputs up^T)
template <int GROUPS, class From>
__device__ __forceinline__ void narrow_up(Element* inner, const From& from, const Element* matrix,
                                          const float* bias, int columns, int width_out, int tokens,
                                          int batch) {
    constexpr int FEATURES = GATED ? NARROW_ROWS / 2 : NARROW_ROWS;  // of a tile: gates before ups
    each_narrow_tile<GROUPS, FEATURES>(
        from, matrix, columns, (width_out + FEATURES - 1) / FEATURES, tokens, batch,
        [=](int tile, int i) {
            const int feature = min(tile * FEATURES + i % FEATURES, width_out - 1);
            return i < FEATURES ? feature : width_out + feature;
        },
        [=](int tile, int i, int) {
            const int feature = min(tile * FEATURES + i, width_out - 1);
            return Added{bias ? bias[feature] : 0.0f, GATED && bias ? bias[width_out + feature] : 0.0f};
        },
        [=](int tile, int i, int token, const NarrowRowSum<GROUPS>& sum, const Added& add) {
            const int feature = tile * FEATURES + i;
            if (feature >= width_out) return;
            float y = activate(sum(i) + add.first);
            if (GATED) y *= sum(i + NARROW_ROWS - FEATURES) + add.second;
            store(inner + token * width_out + feature, y);
        });
}

#define FOR_TOKENS_UP_TO(TOKENS)                                                                             \
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS)                                             \
        narrow_linear_##TOKENS(float* out, const float* residual, const Element* x, const Element* matrix,   \
                               const float* bias, int columns, int outputs, int tokens, int batch) {         \
        narrow_linear<TOKENS / 8>(out, residual, Given{x, columns}, matrix, bias, columns, outputs, tokens,  \
                                  batch);                                                                    \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS)                                             \
        norm_narrow_linear_##TOKENS(float* out, const float* hidden, const float* norm_weight,               \
                                    const float* norm_bias, float epsilon, int width, const Element* matrix, \
                                    const float* bias, int columns, int outputs, int tokens, int batch) {    \
        const Normed from{hidden, norm_weight, norm_bias, epsilon, width};                                   \
        narrow_linear<TOKENS / 8>(out, nullptr, from, matrix, bias, columns, outputs, tokens, batch);        \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS)                                             \
        norm_narrow_up_##TOKENS(Element* inner, const float* hidden, const float* norm_weight,               \
                                const float* norm_bias, float epsilon, int width, const Element* matrix,     \
                                const float* bias, int columns, int width_out, int tokens, int batch) {      \
        const Normed from{hidden, norm_weight, norm_bias, epsilon, width};                                   \
        narrow_up<TOKENS / 8>(inner, from, matrix, bias, columns, width_out, tokens, batch);                 \
    }

FOR_TOKENS_UP_TO(8)
FOR_TOKENS_UP_TO(16)
#undef FOR_TOKENS_UP_TO
#endif
