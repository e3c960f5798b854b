// What products with quantised matrices share, of few tokens (quantised_linear.cu) and of more
// (quantised_batch.cu): a warp's part of tiles on tensor cores, and what sums become.
#pragma once
#include "activation.cuh"
#include "numbers.cuh"

#if HALF && WEIGHT_BITS
namespace quantised {
constexpr int STORED_BYTES = NUMBER_BYTES + SCALE_BYTES;  // of a tile's step
constexpr int SCALE_LOADS = SCALE_BYTES / 16;             // of lanes, of its scales
// Sums of a token lie so far apart that those of two are in different banks.
constexpr int SUMS = TILE_ROWS + 4;

// The steps of a warp, in turn with the other warps of its thread block: of some tiles that are taken
// together, one after the other, then of the next ones. Brings them into shared memory, of each tile numbers
// and scales, STORED_BYTES.
struct WarpSteps {
    const unsigned char *numbers, *scales;  // a lane's, of the next step
    int tiles, steps, together;             // of the thread block; of a tile; tiles
    int tile, step;                         // the next one, of the first of its tiles

    __device__ __forceinline__ WarpSteps(const unsigned char* matrix, int all_tiles, int columns,
                                         int together)
        : numbers(matrix + threadIdx.x % LANES * 16),
          scales(matrix + static_cast<long long>(all_tiles) * steps_of(columns) * NUMBER_BYTES +
                 static_cast<long long>(threadIdx.x % LANES / SCALE_LOADS * gridDim.x * steps_of(columns)) *
                     SCALE_BYTES +
                 threadIdx.x % SCALE_LOADS * 16),
          tiles((all_tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x),
          steps(steps_of(columns)),
          together(together),
          tile(0),
          step(__shfl_sync(ALL, threadIdx.x / LANES, 0)) {
        move(blockIdx.x * steps + step);
        settle();
    }

    __device__ __forceinline__ bool done() const { return tile >= tiles; }

    __device__ __forceinline__ void next() {
        const int warps = blockDim.x / LANES;
        move(warps);
        step += warps;
        settle();
    }

    // Of at most MOST tiles.
    template <int MOST>
    __device__ __forceinline__ void copy(SharedAddress slot) const {
        const int lane = threadIdx.x % LANES, there = min(tiles - tile, together);
        const int tile_steps = gridDim.x * steps;  // from one of the thread block's to the next
        const SharedAddress to = slot + lane * 16;
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            const unsigned char* from = numbers + static_cast<long long>(i * tile_steps) * NUMBER_BYTES;
#pragma unroll
            for (int j = 0; j < LOADS; ++j)
                copy_wide_if(i < there, to + (i * STORED_BYTES + j * LANES * 16), from + j * LANES * 16);
        }
        constexpr int AT_ONCE = LANES / SCALE_LOADS;  // tiles
        const SharedAddress scales_to = slot + lane / SCALE_LOADS * STORED_BYTES + lane % SCALE_LOADS * 16;
#pragma unroll
        for (int i = 0; i < MOST; i += AT_ONCE)
            copy_wide_if(i + lane / SCALE_LOADS < there, scales_to + (i * STORED_BYTES + NUMBER_BYTES),
                         scales + static_cast<long long>(i * tile_steps) * SCALE_BYTES);
    }

 private:
    __device__ __forceinline__ void move(int by) {
        numbers += static_cast<long long>(by) * NUMBER_BYTES,
            scales += static_cast<long long>(by) * SCALE_BYTES;
    }

    // Goes on to the next step that there is.
    __device__ __forceinline__ void settle() {
        while (step >= steps && !done()) {
            move((together * gridDim.x - 1) * steps);
            step -= steps, tile += together;
        }
    }
};

// Sums of a warp's part of up to TOGETHER tiles, for up to GROUPS * 8 tokens.
template <int GROUPS, int TOGETHER>
struct TileSums {
    float total[TOGETHER][GROUPS][4] = {};

    // A step of TILES of them. `slot` is where WarpSteps brought it; inputs(group, pair) are a lane's of
    // two products.
    template <int TILES, class Inputs>
    __device__ __forceinline__ void add(const unsigned char* slot, const Inputs& inputs) {
        const int lane = threadIdx.x % LANES;
        unsigned words[TILES][LOADS * 4];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                *reinterpret_cast<uint4*>(words[tile] + 4 * i) =
                    reinterpret_cast<const uint4*>(slot + tile * STORED_BYTES)[i * LANES + lane];
#pragma unroll
        for (int group_of_step = 0; group_of_step < STEP_GROUPS; ++group_of_step) {
            Scale scale[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                scale[tile] = scale_from(reinterpret_cast<const uint2*>(
                    slot + tile * STORED_BYTES + NUMBER_BYTES)[group_of_step * 8 + lane / 4]);
            float part[TILES][GROUPS][4] = {};
#pragma unroll
            for (int two = 0; two < PRODUCTS_OF_GROUP / 2; ++two) {
                const int pair = group_of_step * PRODUCTS_OF_GROUP / 2 + two;
                uint4 right[GROUPS];
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) right[group] = inputs(group, pair);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    unsigned left[2][4];
                    unpack(left[0], words[tile] + pair * 2 * WORDS, scale[tile]);
                    unpack(left[1], words[tile] + (pair * 2 + 1) * WORDS, scale[tile]);
#pragma unroll
                    for (int group = 0; group < GROUPS; ++group) {
                        multiply_half(part[tile][group], left[0], {right[group].x, right[group].y});
                        multiply_half(part[tile][group], left[1], {right[group].z, right[group].w});
                    }
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        total[tile][group][i] += part[tile][group][i] * scale[tile].scale[i / 2];
        }
    }

    // Puts those of a tile where the thread block adds them up: a warp's [tokens, SUMS].
    __device__ __forceinline__ void keep(int tile, float* sums, int tokens) const {
        const int lane = threadIdx.x % LANES, token = lane % 4 * 2;
        float* at = sums + token * SUMS + lane / 4;
#pragma unroll
        for (int i = 0; i < GROUPS * 2; ++i) {
            const int more = i / 2 * 8 + i % 2;
            if (token + more >= tokens) continue;
            at[more * SUMS] = total[tile][i / 2][i % 2];
            at[more * SUMS + 8] = total[tile][i / 2][2 + i % 2];
        }
    }
};

// The sum of a row of a tile, for a token, over all warps' columns.
template <int WARPS>
struct WarpSums {
    const float* sums;  // the token's, of the first warp
    int apart;

    __device__ __forceinline__ float operator()(int row) const {
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) total += sums[warp * apart + row];
        return total;
    }
};

// Calls use(tile, row of the tile, token, sum) by a thread for each of USED rows of a tile and token, of at
// most MOST: `count` of the thread block's tiles from `first` on. Sums [tiles, WARPS, tokens, SUMS], the
// first tile's first.
template <int WARPS, int MOST, int USED, class Use>
__device__ __forceinline__ void use_sums(const float* sums, int first, int count, int tokens, Use use) {
    const int warp_sums = tokens * SUMS;
    for (int i = threadIdx.x; i < count * MOST * USED; i += WARPS * LANES) {
        const int row = i % USED, token = i / USED % MOST, tile = i / (USED * MOST);
        if (token < tokens)
            use((first + tile) * gridDim.x + blockIdx.x, row, token,
                WarpSums<WARPS>{sums + tile * WARPS * warp_sums + token * SUMS, warp_sums});
    }
}

// out [tokens, outputs] = residual + sums + bias; out may be the residual itself
struct Added {
    float* out;
    const float *residual, *bias;
    int outputs;

    template <class Sum>
    __device__ __forceinline__ void operator()(int tile, int row_of_tile, int token, Sum sum) const {
        const int row = tile * TILE_ROWS + row_of_tile, at = token * outputs + row;
        if (row < outputs)
            out[at] = sum(row_of_tile) + (bias ? bias[row] : 0.0f) + (residual ? fresh(residual + at) : 0.0f);
    }
};

constexpr int FEATURES = GATED ? TILE_ROWS / 2 : TILE_ROWS;  // of a tile: gates before ups

// inner [tokens, width_out] = act(gates) * ups; without a gate act(ups)
struct Activated {
    Element* inner;
    const float* bias;
    int width_out;

    template <class Sum>
    __device__ __forceinline__ void operator()(int tile, int row, int token, Sum sum) const {
        const int feature = tile * FEATURES + row;
        if (feature >= width_out) return;
        float y = activate(sum(row) + (bias ? bias[feature] : 0.0f));
        if (GATED) y *= sum(row + TILE_ROWS - FEATURES) + (bias ? bias[width_out + feature] : 0.0f);
        store(inner + token * width_out + feature, y);
    }
};

__device__ __forceinline__ int tiles_of(int rows, int rows_of_tile) {
    return (rows + rows_of_tile - 1) / rows_of_tile;
}
}  // namespace quantised
#endif
