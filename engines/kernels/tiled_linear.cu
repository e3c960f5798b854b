// Products with matrices for steps of a few tokens, more than linear.cu takes, on tensor cores. As there, the
// memory that holds the weights [outputs, columns] is the limit: each is read once, and goes straight to the
// registers that a product takes it from. In fp16 and bf16 alone.
//
// A thread block takes TILED_ROWS rows at a time. Its warps share the columns, in turn, SPAN at a time, and
// add up their sums in shared memory. A warp loads whole 128-byte lines: with half ones memory gave a fifth
// less (bench/NOTES.md). So eight lanes have a row's span, where a product takes a row's columns from four,
// and the other four stand for a row of their own: even places of a product sum up the first half of the
// span, odd places the second half, of the same row. A product is done twice, with the inputs of either half
// and the weights of its places, the others zero. Within a half the columns are permuted, for weights and
// inputs alike.
#include "activation.cuh"
#include "staging.cuh"

#if HALF
constexpr int TILED_ROWS = 16;  // of a tile: two products, of eight places for two rows each
constexpr int LANE_ROWS = 4;    // of a tile that a lane has weights of
// Spans that are on their way together, of a warp: as many as registers are left for.
template <int GROUPS>
constexpr int SPANS = GROUPS == 1 ? 4 : 2;
// Sums of a token, the rows of a tile, lie so far apart that eight lanes' are in different banks.
constexpr int SUMS_APART = TILED_ROWS + 4;

// A lane's weights on their way.
template <int GROUPS>
struct Weights {
    Chunk rows[SPANS<GROUPS>][LANE_ROWS];
};

// What a warp does with a tile, for up to GROUPS * 8 tokens.
template <int GROUPS>
struct Tile {
    const Element* matrix;
    int columns, tokens;
    const Element* rows[LANE_ROWS];  // where this lane's rows begin, every fourth of the tile
    float sums[2][GROUPS][4];        // of the first eight rows and the others

    // row_of(tile, i) names a tile's rows.
    template <class RowOf>
    __device__ __forceinline__ void go_to(int tile, RowOf row_of) {
        const int first = threadIdx.x % LANES / 8;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
            rows[i] = matrix + static_cast<long long>(row_of(tile, first + 4 * i)) * columns;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[half][group][i] = 0.0f;
    }

    // From a span on, this warp's; zeros from `stop` on and beyond the columns.
    __device__ __forceinline__ void load(Weights<GROUPS>& weights, int span, int stop) const {
        const int part = threadIdx.x % 8 * WIDE;
#pragma unroll
        for (int i = 0; i < SPANS<GROUPS>; ++i)
#pragma unroll
            for (int row = 0; row < LANE_ROWS; ++row) {
                const int at = span + TILED_WARPS * i, column = at * SPAN + part;
                weights.rows[i][row] = load_once(rows[row] + column, at < stop && column < columns);
            }
    }

    // `inputs` begin with those of the pass's first span.
    __device__ __forceinline__ void add(const Weights<GROUPS>& weights, const Element* inputs, int apart,
                                        int span, const Pass& pass) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int i = 0; i < SPANS<GROUPS>; ++i) {
            const int at = span + TILED_WARPS * i - pass.first_span;
            if (pass.first_span + at >= pass.stop_span) break;
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {  // places
                const unsigned mine = lane / 4 % 2 == odd ? 0xffffffffu : 0u;
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) {
                    const int token = min(group * 8 + lane / 4, tokens - 1);
                    const uint4 right = *reinterpret_cast<const uint4*>(inputs + token * apart + at * SPAN +
                                                                        odd * (SPAN / 2) + lane % 4 * WIDE);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint4 low = *reinterpret_cast<const uint4*>(&weights.rows[i][2 * half]);
                        const uint4 high = *reinterpret_cast<const uint4*>(&weights.rows[i][2 * half + 1]);
                        multiply_half(sums[half][group],
                                      {low.x & mine, high.x & mine, low.y & mine, high.y & mine},
                                      {right.x, right.y});
                        multiply_half(sums[half][group],
                                      {low.z & mine, high.z & mine, low.w & mine, high.w & mine},
                                      {right.z, right.w});
                    }
                }
            }
        }
    }

    // Adds the sums to those of the warp, or puts them there.
    __device__ __forceinline__ void keep(float* warp_sums, bool added) const {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = group * 8 + lane % 4 * 2 + i % 2, row = half * 8 + i / 2 * 4 + lane / 8;
                    const float sum = sums[half][group][i] + __shfl_xor_sync(ALL, sums[half][group][i], 4);
                    float* at = warp_sums + token * SUMS_APART + row;
                    if (lane / 4 % 2 == 0) *at = sum + (added ? *at : 0.0f);
                }
    }
};

template <int GROUPS>
constexpr int WARP_SUMS = GROUPS * 8 * SUMS_APART;  // elements of a warp's sums

// The sum of a row of a tile, for a token, over all warps' columns.
template <int GROUPS>
struct RowSum {
    const float* sums;  // the token's, of the first warp

    __device__ __forceinline__ float operator()(int row) const {
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < TILED_WARPS; ++warp) total += sums[warp * WARP_SUMS<GROUPS> + row];
        return total;
    }
};

// Calls use(tile, row of the tile, token, sum of a row and token) by a thread for each of USED rows of a tile
// and token. Shared memory: inputs of a pass, then sums of all warps [buffers, TILED_WARPS, tokens of the
// groups, SUMS_APART]; more than two buffers where there are several passes, one for each tile of a block.
template <int GROUPS, int USED, class RowOf, class Use>
__device__ __forceinline__ void each_tile(const Element* x, const Element* matrix, int columns, int tiles,
                                          int tokens, int pass_spans, RowOf row_of, Use use) {
    constexpr int BUFFER = TILED_WARPS * WARP_SUMS<GROUPS>;
    const int spans = (columns + SPAN - 1) / SPAN, warp = threadIdx.x / LANES;
    const int apart = min(pass_spans, spans) * SPAN + INPUTS_SHIFT;
    Element* inputs = reinterpret_cast<Element*>(shared_memory);
    float* buffers = reinterpret_cast<float*>(inputs + tokens * apart);
    Tile<GROUPS> work{matrix, columns, tokens};
    Weights<GROUPS> weights;
    const auto begin = [&](int tile, int first_span) {
        if (tile >= tiles) return;
        work.go_to(tile, row_of);
        work.load(weights, first_span + warp, min(first_span + pass_spans, spans));
    };
    begin(blockIdx.x, 0);
    wait_for_previous();
    let_next_start();
#if SMALL
    const bool not_wanted = is_called_off();  // comes while the inputs do
#endif
    for (Pass pass{0, min(pass_spans, spans)}; pass.first_span < spans;) {
        __syncwarp();  // the inputs before are no longer read
        stage_inputs<TILED_WARPS>(inputs, apart, x, columns, tokens, pass);
        const bool last = pass.stop_span == spans;
        int turn = 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
            work.clear();
            for (int span = pass.first_span + warp;;) {
                work.add(weights, inputs, apart, span, pass);
                span += TILED_WARPS * SPANS<GROUPS>;
                if (span >= pass.stop_span) break;
                work.load(weights, span, pass.stop_span);
            }
            const int next = tile + gridDim.x;
            if (next < tiles)
                begin(next, pass.first_span);
            else if (!last)
                begin(blockIdx.x, pass.stop_span);
            float* buffer = buffers + (pass_spans < spans ? turn : turn % 2) * BUFFER;
            work.keep(buffer + warp * WARP_SUMS<GROUPS>, pass.first_span);
            if (!last) continue;
#if SMALL
            if (turn > 0)
                __syncthreads();
            else if (__syncthreads_or(not_wanted))
                return;
#else
            // No exit's check calls these off, and it would cost them a tenth of their time.
            __syncthreads();
#endif
            for (int i = threadIdx.x; i < USED * tokens; i += TILED_THREADS) {
                const int row = i % USED, token = i / USED;
                use(tile, row, token, RowSum<GROUPS>{buffer + token * SUMS_APART});
            }
        }
        pass = {pass.stop_span, min(pass.stop_span + pass_spans, spans)};
    }
}

// out [tokens, outputs] fp32 = residual + x matrix^T + bias; out may be the residual itself
template <int GROUPS>
__device__ void tiled_linear(float* out, const float* residual, const Element* x, const Element* matrix,
                             const float* bias, int columns, int outputs, int tokens, int pass_spans) {
    each_tile<GROUPS, TILED_ROWS>(
        x, matrix, columns, (outputs + TILED_ROWS - 1) / TILED_ROWS, tokens, pass_spans,
        [=](int tile, int i) { return min(tile * TILED_ROWS + i, outputs - 1); },
        [=](int tile, int i, int token, const RowSum<GROUPS>& sum) {
            const int row = tile * TILED_ROWS + i, at = token * outputs + row;
            if (row < outputs)
                out[at] = sum(i) + (bias ? bias[row] : 0.0f) + (residual ? fresh(residual + at) : 0.0f);
        });
}

// inner [tokens, width_out] = act(x gate^T) * (x up^T), gate's rows before up's; without a gate act(x up^T)
template <int GROUPS>
__device__ void tiled_up(Element* inner, const Element* x, const Element* matrix, const float* bias,
                         int columns, int width_out, int tokens, int pass_spans) {
    constexpr int FEATURES = GATED ? TILED_ROWS / 2 : TILED_ROWS;  // of a tile: gates before ups
    each_tile<GROUPS, FEATURES>(
        x, matrix, columns, (width_out + FEATURES - 1) / FEATURES, tokens, pass_spans,
        [=](int tile, int i) {
            const int feature = min(tile * FEATURES + i % FEATURES, width_out - 1);
            return i < FEATURES ? feature : width_out + feature;
        },
        [=](int tile, int i, int token, const RowSum<GROUPS>& sum) {
            const int feature = tile * FEATURES + i;
            if (feature >= width_out) return;
            float y = activate(sum(i) + (bias ? bias[feature] : 0.0f));
            if (GATED) y *= sum(i + TILED_ROWS - FEATURES) + (bias ? bias[width_out + feature] : 0.0f);
            store(inner + token * width_out + feature, y);
        });
}

#define FOR_TOKENS_UP_TO(TOKENS)                                                                          \
    extern "C" __global__ void __launch_bounds__(TILED_THREADS, 1)                                        \
        tiled_linear_##TOKENS(float* out, const float* residual, const Element* x, const Element* matrix, \
                              const float* bias, int columns, int outputs, int tokens, int pass_spans) {  \
        tiled_linear<TOKENS / 8>(out, residual, x, matrix, bias, columns, outputs, tokens, pass_spans);   \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(TILED_THREADS, 1)                                        \
        tiled_up_##TOKENS(Element* inner, const Element* x, const Element* matrix, const float* bias,     \
                          int columns, int width_out, int tokens, int pass_spans) {                       \
        tiled_up<TOKENS / 8>(inner, x, matrix, bias, columns, width_out, tokens, pass_spans);             \
    }

FOR_TOKENS_UP_TO(8)
FOR_TOKENS_UP_TO(16)
#undef FOR_TOKENS_UP_TO
#endif
