// Products with quantised matrices for steps of 3 to 32 tokens, of which there are too many for their inputs
// to lie in shared memory beforehand: inputs come with the weights that they are multiplied with.
//
// A thread block takes some tiles at a time over all columns, so that inputs are read once for all of them. Each
// of its warps takes a step of these tiles at a time, in turn with the others, and brings what it needs itself:
// warps wait for one another only at the end of the tiles.
#include "quantised_products.cuh"

#if HALF && WEIGHT_BITS
namespace quantised {
// As in ojfa_export/backends/tensorrt/quantised_room.py, by the tokens that a kernel is made for: warps of a
// thread block, and tiles that are taken together at most; steps of a warp that are on their way (measured:
// bench/gpu/products.py).
#ifndef BATCH_RING
#define WARPS_8 12
#define WARPS_16 8
#define WARPS_32 8
#define TILES_8 2
#define TILES_16 4
#define TILES_32 2
#define BATCH_RING 2
#endif
// Registers as of more threads, so that an exit's check (exit_check.cu) finds some beside the thread block.
constexpr int BOUND_8 = (WARPS_8 + 2) * LANES, BOUND_16 = (WARPS_16 + 2) * LANES,
              BOUND_32 = (WARPS_32 + 2) * LANES;
constexpr int TOKEN_BYTES = STEP * sizeof(Element);  // of a token's inputs of a step
constexpr int CHUNKS = STEP / WIDE;                  // of 16 bytes

// A warp's inputs of a step, [tokens, STEP]. Chunks of every other token are exchanged with those of the other
// half of 128 bytes, so that what eight lanes read is in different banks.
struct StepInputs {
    static constexpr int AT_ONCE = LANES / CHUNKS;  // tokens that lanes bring
    const Element* x;                               // a lane's first chunk of the columns
    int columns, tokens;

    __device__ __forceinline__ static int place(int token, int chunk) {
        return token * TOKEN_BYTES + (chunk ^ token % 2 * 4) * 16;
    }

    __device__ __forceinline__ StepInputs(const Element* all, int columns, int tokens)
        : x(all + static_cast<long long>(threadIdx.x % LANES / CHUNKS) * columns +
            threadIdx.x % CHUNKS * WIDE),
          columns(columns),
          tokens(tokens) {}

    // Zeros beyond the columns.
    template <int MOST>
    __device__ __forceinline__ void copy(SharedAddress slot, int step) const {
        const int token = threadIdx.x % LANES / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const bool valid = step * STEP + chunk * WIDE < columns;
        const Element* from = x + (valid ? step * STEP : 0);
        const SharedAddress to = slot + place(token, chunk);
#pragma unroll
        for (int i = 0; i < MOST; i += AT_ONCE)
            copy_wide_if(i + token < tokens, to + i * TOKEN_BYTES, from + static_cast<long long>(i) * columns,
                         valid);
    }
};

// Where a lane reads them, of the tokens that it has; tokens beyond are the last one again.
template <int GROUPS>
struct LaneInputs {
    // Bytes to those of even pairs of products and of odd ones, less 64 a pair.
    int even[GROUPS], odd[GROUPS];
    const unsigned char* step;

    __device__ __forceinline__ explicit LaneInputs(int tokens) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const int token = min(group * 8 + lane / 4, tokens - 1);
            even[group] = StepInputs::place(token, lane % 4);
            odd[group] = StepInputs::place(token, 4 + lane % 4) - 64;
        }
    }

    __device__ __forceinline__ uint4 operator()(int group, int pair) const {
        return *reinterpret_cast<const uint4*>(step + (pair % 2 ? odd : even)[group] + pair * 64);
    }
};

// A step of so many tiles, which is known while the kernel runs: sums.add() is compiled for each number.
template <int TILES, class Sums, class Inputs>
__device__ __forceinline__ void add_step(Sums& sums, int tiles, const unsigned char* slot,
                                         const Inputs& inputs) {
    if (tiles == TILES)
        sums.template add<TILES>(slot, inputs);
    else if constexpr (TILES > 1)
        add_step<TILES - 1>(sums, tiles, slot, inputs);
}

// Calls use(tile, row of the tile, token, sums) as use_sums() does. Shared memory: of each warp, BATCH_RING
// steps of the tiles that are taken together and of the inputs; sums [together, warps, tokens, SUMS].
template <int GROUPS, int WARPS, int TILES, int USED, class Use>
__device__ __forceinline__ void each_tile_of_batch(const Element* x, const unsigned char* matrix, int columns,
                                                   int all_tiles, int tokens, int together, Use use) {
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), inputs_at = together * STORED_BYTES;
    const int slot_bytes = inputs_at + tokens * TOKEN_BYTES;
    unsigned char* slots = shared_memory + warp * BATCH_RING * slot_bytes;
    float* sums = reinterpret_cast<float*>(shared_memory + WARPS * BATCH_RING * slot_bytes);
    WarpSteps next(matrix, all_tiles, columns, together);
    const WarpSteps first = next;
    const StepInputs inputs(x, columns, tokens);
    LaneInputs<GROUPS> lane_inputs(tokens);
#pragma unroll 1
    for (int slot = 0; slot < BATCH_RING && !next.done(); ++slot)
        next.copy<TILES>(shared_address(slots + slot * slot_bytes)), next.next();
    wait_for_previous();
    let_next_start();
    const bool not_wanted = is_called_off();  // comes while the inputs do
    next = first;
#pragma unroll 1
    for (int slot = 0; slot < BATCH_RING; ++slot) {
        if (!next.done())
            inputs.copy<GROUPS * 8>(shared_address(slots + slot * slot_bytes + inputs_at), next.step),
                next.next();
        copies_end();
    }
    if (__syncthreads_or(not_wanted)) {
        copies_wait<0>();
        return;
    }
    unsigned char* slot = slots;
    int step = warp;
#pragma unroll 1
    for (int tile = 0; tile < next.tiles; tile += together) {
        const int count = min(next.tiles - tile, together);
        TileSums<GROUPS, TILES> tile_sums;
#pragma unroll 1
        for (; step < next.steps; step += WARPS) {
            copies_wait<BATCH_RING - 1>();
            __syncwarp();  // other lanes have brought some of it
            lane_inputs.step = slot + inputs_at;
            add_step<TILES>(tile_sums, count, slot, lane_inputs);
            __syncwarp();  // and have read theirs
            if (!next.done()) {
                const SharedAddress to = shared_address(slot);
                next.copy<TILES>(to);
                inputs.copy<GROUPS * 8>(to + inputs_at, next.step);
                next.next();
            }
            copies_end();
            slot += slot_bytes;
            if (slot == slots + BATCH_RING * slot_bytes) slot = slots;
        }
        step -= next.steps;
        if (tile) __syncthreads();  // the sums before have been read
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            if (i < count) tile_sums.keep(i, sums + (i * WARPS + warp) * tokens * SUMS, tokens);
        __syncthreads();
        use_sums<WARPS, GROUPS * 8, USED>(sums, tile, count, tokens, use);
    }
}

#define FOR_TOKENS_UP_TO(TOKENS)                                                                             \
    extern "C" __global__ void __launch_bounds__(BOUND_##TOKENS, 1) quantised_batch_linear_##TOKENS(         \
        float* out, const float* residual, const Element* x, const unsigned char* matrix, const float* bias, \
        int columns, int outputs, int tokens, int together) {                                                \
        each_tile_of_batch<TOKENS / 8, WARPS_##TOKENS, TILES_##TOKENS, TILE_ROWS>(                           \
            x, matrix, columns, tiles_of(outputs, TILE_ROWS), tokens, together,                              \
            Added{out, residual, bias, outputs});                                                            \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(BOUND_##TOKENS, 1) quantised_batch_up_##TOKENS(             \
        Element* inner, const Element* x, const unsigned char* matrix, const float* bias, int columns,       \
        int width_out, int tokens, int together) {                                                           \
        each_tile_of_batch<TOKENS / 8, WARPS_##TOKENS, TILES_##TOKENS, FEATURES>(                            \
            x, matrix, columns, tiles_of(width_out, FEATURES), tokens, together,                             \
            Activated{inner, bias, width_out});                                                              \
    }

FOR_TOKENS_UP_TO(8)
FOR_TOKENS_UP_TO(16)
FOR_TOKENS_UP_TO(32)
#undef FOR_TOKENS_UP_TO

constexpr int GATHER_THREADS = 256;

// Grid (tokens). out [tokens, columns] = x's columns in the order in which a matrix has them.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    gather_columns(Element* out, const Element* x, const int* order, int columns) {
    let_next_start();
    wait_for_previous();
    const long long first = static_cast<long long>(blockIdx.x) * columns;
    unsigned short* to = reinterpret_cast<unsigned short*>(out + first);
    const unsigned short* from = reinterpret_cast<const unsigned short*>(x + first);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) to[i] = fresh(from + order[i]);
}
}  // namespace quantised
#endif
