// Products with quantised matrices for steps of 1 to 16 tokens, on tensor cores, for any number of them: what
// a number costs is to be unpacked, and a product of tiles does no more for one token than for eight.
//
// A matrix lies in tiles of TILE_ROWS rows, and those in steps of STEP columns (see `relaid` in
// ojfa_export/backends/tensorrt/quantised.py): a lane's numbers of a step are whole 16-byte loads, a warp's
// are whole lines, and all of a tile are one piece of memory. Behind all numbers come all scales.
//
// A thread block takes a tile at a time, its warps a step at a time in turn. Weights go through shared
// memory, where each warp has a ring of steps that are on their way: they begin while the kernel before runs,
// and take no registers, so that two kernels find room on a multiprocessor, and the memory has always
// something to do.
#include "activation.cuh"
#include "numbers.cuh"

#if HALF && WEIGHT_BITS
namespace quantised {
#ifndef QUANTISED_WARPS
#define QUANTISED_WARPS 8
#endif
#ifndef RING_STEPS
#define RING_STEPS 8
#endif
constexpr int QUANTISED_THREADS = QUANTISED_WARPS * LANES;
constexpr int STEP_BYTES = NUMBER_BYTES + SCALE_BYTES;
constexpr int RING_BYTES = RING_STEPS * STEP_BYTES;  // of a warp
constexpr int LOADS = NUMBER_BYTES / (16 * LANES);   // of a lane
// Inputs of a token lie so far apart, beyond whole steps, that those of two are in different banks.
constexpr int APART = 32;
// Sums of a token, likewise.
constexpr int SUMS = TILE_ROWS + 4;

// Tiles after which warps wait for one another.
__device__ __forceinline__ int batch_of(int tokens) {
    return tokens <= 2 ? 4 : 1;
}

// Where a warp is: it takes every QUANTISED_WARPS-th step of its thread block's tiles, over all columns or,
// where the inputs don't fit in shared memory together, over a part of the columns after the other.
struct Place {
    int tiles, steps, pass_steps;  // of the matrix; of a pass
    int first, stop;               // steps of the pass
    int tile, step;

    __device__ __forceinline__ Place(int tiles, int steps, int pass_steps)
        : tiles(tiles),
          steps(steps),
          pass_steps(pass_steps),
          first(0),
          stop(min(pass_steps, steps)),
          tile(blockIdx.x),
          step(threadIdx.x / LANES) {}

    __device__ __forceinline__ void next_tile() { step -= stop - first, tile += gridDim.x; }
    __device__ __forceinline__ void next_pass() {
        step += stop - first, tile = blockIdx.x;
        first = stop, stop = min(stop + pass_steps, steps);
    }
    // Goes on to a step; false where there is none left.
    __device__ __forceinline__ bool settle() {
        while (step >= stop) {
            next_tile();
            if (tile < tiles) continue;
            if (stop == steps) return false;
            next_pass();
        }
        return true;
    }
};

// A warp's steps that are on their way.
struct Ring {
    unsigned char* at;
    const unsigned char *numbers, *scales;
    Place next;

    __device__ __forceinline__ void fetch(int slot) {
        const int lane = threadIdx.x % LANES;
        if (next.tile < next.tiles && next.settle()) {
            const long long step = static_cast<long long>(next.tile) * next.steps + next.step;
            unsigned char* to = at + slot * STEP_BYTES + lane * 16;
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                copy_async<16>(to + i * 16 * LANES, numbers + step * NUMBER_BYTES + (i * LANES + lane) * 16,
                               true);
            if (lane * 16 < SCALE_BYTES)
                copy_async<16>(to + NUMBER_BYTES, scales + step * SCALE_BYTES + lane * 16, true);
            next.step += QUANTISED_WARPS;
        }
        copies_end();
    }
};

// Sums of a warp's part of a tile, for up to GROUPS * 8 tokens.
template <int GROUPS>
struct TileSums {
    // Products of a group alternate between chains, as each waits for the one before it.
    static constexpr int CHAINS = GROUPS == 1 && PRODUCTS_OF_GROUP > 1 ? 2 : 1;
    float total[GROUPS][4] = {};

    // `inputs` begin with the step's.
    __device__ __forceinline__ void add(const unsigned char* step, const Element* inputs, int apart,
                                        int tokens) {
        const int lane = threadIdx.x % LANES;
        const uint4* numbers = reinterpret_cast<const uint4*>(step) + lane;
        const uint2* scales = reinterpret_cast<const uint2*>(step + NUMBER_BYTES) + lane / 4;
        const Element* inputs_of[GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
            inputs_of[group] = inputs + min(group * 8 + lane / 4, tokens - 1) * apart + lane % 4 * WIDE;
        unsigned words[LOADS * 4];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const uint4 loaded = numbers[i * LANES];
            words[4 * i] = loaded.x, words[4 * i + 1] = loaded.y, words[4 * i + 2] = loaded.z,
                      words[4 * i + 3] = loaded.w;
        }
#pragma unroll
        for (int group_of_step = 0; group_of_step < STEP_GROUPS; ++group_of_step) {
            const Scale scale = scale_from(scales[group_of_step * 8]);
            float part[CHAINS][GROUPS][4] = {};
#pragma unroll
            for (int two = 0; two < PRODUCTS_OF_GROUP / 2; ++two) {
                const int pair = group_of_step * PRODUCTS_OF_GROUP / 2 + two;
                unsigned left[2][4];
                unpack(left[0], words + pair * 2 * WORDS, scale);
                unpack(left[1], words + (pair * 2 + 1) * WORDS, scale);
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) {
                    const uint4 right = *reinterpret_cast<const uint4*>(inputs_of[group] + pair * 32);
                    multiply_half(part[0][group], left[0], {right.x, right.y});
                    multiply_half(part[CHAINS - 1][group], left[1], {right.z, right.w});
                }
            }
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float sum = part[0][group][i];
                    if (CHAINS == 2) sum += part[1][group][i];
                    total[group][i] += sum * scale.scale[i / 2];
                }
        }
    }

    // Puts them where the thread block adds them up, or adds them there: a warp's [tokens, SUMS].
    __device__ __forceinline__ void keep(float* sums, int tokens, bool added) const {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = group * 8 + lane % 4 * 2 + i % 2, row = i / 2 * 8 + lane / 4;
                float* at = sums + token * SUMS + row;
                if (token < tokens) *at = total[group][i] + (added ? *at : 0.0f);
            }
    }
};

// The sum of a row of a tile, for a token, over all warps' columns.
struct WarpSums {
    const float* sums;  // the token's, of the first warp
    int apart;

    __device__ __forceinline__ float operator()(int row) const {
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < QUANTISED_WARPS; ++warp) total += sums[warp * apart + row];
        return total;
    }
};

// Calls use(tile, row of the tile, token, sums) by a thread for each of USED rows of a tile and token.
// `inputs` brings them into shared memory, with zeros up to whole steps; before() does what can be done while
// the kernel before still runs. Shared memory: inputs of a pass [tokens, apart], sums [tiles,
// QUANTISED_WARPS, tokens, SUMS] (of two batches, or of all tiles where there are several passes), rings.
template <int GROUPS, int USED, class Inputs, class Use>
__device__ __forceinline__ void each_quantised_tile(Inputs inputs_of, const unsigned char* matrix,
                                                    int columns, int tiles, int tokens, int pass_steps,
                                                    Use use) {
    const int steps = steps_of(columns), warp = threadIdx.x / LANES, batch = batch_of(tokens);
    const int apart = min(pass_steps, steps) * STEP + APART, warp_sums = tokens * SUMS;
    const int own_tiles = (tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    const int kept = pass_steps < steps ? (tiles + gridDim.x - 1) / gridDim.x : 2 * batch;
    Element* inputs = reinterpret_cast<Element*>(shared_memory);
    float* sums = reinterpret_cast<float*>(inputs + tokens * apart);
    unsigned char* rings = reinterpret_cast<unsigned char*>(sums + kept * QUANTISED_WARPS * warp_sums);
    Place place(tiles, steps, pass_steps);
    Ring ring{rings + warp * RING_BYTES, matrix,
              matrix + static_cast<long long>(tiles) * steps * NUMBER_BYTES, place};
#pragma unroll 1
    for (int slot = 0; slot < RING_STEPS; ++slot) ring.fetch(slot);
    inputs_of.before();
#if START_EARLY
    let_next_start();
    wait_for_previous();
#else
    wait_for_previous();
    let_next_start();
#endif
    bool not_wanted = is_called_off();  // comes while the inputs do
    for (int slot = 0;;) {
        inputs_of.stage(inputs, apart, place.first * STEP, place.stop * STEP);
        if (__syncthreads_or(not_wanted)) {
            copies_wait<0>();
            return;
        }
        not_wanted = false;
        for (int own = 0; own < own_tiles; ++own) {
            TileSums<GROUPS> tile_sums;
#pragma unroll 1
            for (; place.step < place.stop; place.step += QUANTISED_WARPS) {
                copies_wait<RING_STEPS - 1>();
                __syncwarp();  // other lanes have brought scales
#if !SKIP_PRODUCTS
                tile_sums.add(ring.at + slot * STEP_BYTES, inputs + (place.step - place.first) * STEP, apart,
                              tokens);
#endif
                __syncwarp();  // and have read them
                ring.fetch(slot);
                slot = slot + 1 == RING_STEPS ? 0 : slot + 1;
            }
            tile_sums.keep(sums + (own % kept * QUANTISED_WARPS + warp) * warp_sums, tokens, place.first);
            place.next_tile();
            const int done = own % batch + 1;
            if (place.stop < steps || (done < batch && own + 1 < own_tiles)) continue;
            __syncthreads();
            for (int i = threadIdx.x; i < done * USED * tokens; i += QUANTISED_THREADS) {
                const int row = i % USED, of_batch = i / USED % done, token = i / (USED * done);
                const int which = own + 1 - done + of_batch;
                use(which * gridDim.x + blockIdx.x, row, token,
                    WarpSums{sums + (which % kept * QUANTISED_WARPS * tokens + token) * SUMS, warp_sums});
            }
        }
        if (place.stop == steps) return;
        place.next_pass();
        __syncthreads();  // the inputs before are no longer read
    }
}

// Where inputs lie, of a matrix whose groups are not of neighbours: `places` names the place of each, or is
// none where they are in order.
struct Places {
    const int* places;

    // Four neighbours, those of them that are of this pass.
    __device__ __forceinline__ void put(Element* inputs, int column, int first, int stop, uint2 four) const {
        for (int i = 0; i < 4; ++i) {
            const int place = places[column + i];
            if (place >= first && place < stop)
                inputs[place - first] = element_of(i < 2 ? four.x : four.y, i % 2);
        }
    }
};

// Inputs [tokens, columns] as they are.
struct Given {
    const Element* x;
    Places in;
    int columns, tokens;

    __device__ __forceinline__ void before() const {}

    __device__ __forceinline__ const uint4* chunk(int token, int column) const {
        return reinterpret_cast<const uint4*>(x + static_cast<long long>(token) * columns + column);
    }

    __device__ __forceinline__ void stage(Element* inputs, int apart, int first, int stop) const {
        if (in.places) {
            stage_in_order(inputs, apart, first, stop);
            return;
        }
        const int chunks = (stop - first) / WIDE;
#pragma unroll 4
        for (int i = threadIdx.x; i < chunks * tokens; i += QUANTISED_THREADS) {
            const int token = i / chunks, at = i % chunks * WIDE;
            uint4 words{0u, 0u, 0u, 0u};
            if (first + at < columns) words = fresh(chunk(token, first + at));
            *reinterpret_cast<uint4*>(inputs + token * apart + at) = words;
        }
    }

    __device__ void stage_in_order(Element* inputs, int apart, int first, int stop) const {
        const int chunks = columns / WIDE;
        for (int i = threadIdx.x; i < chunks * tokens; i += QUANTISED_THREADS) {
            const int token = i / chunks, column = i % chunks * WIDE;
            const uint4 words = fresh(chunk(token, column));
            in.put(inputs + token * apart, column, first, stop, {words.x, words.y});
            in.put(inputs + token * apart, column + 4, first, stop, {words.z, words.w});
        }
        const int padding = max(stop - max(columns, first), 0);
        for (int i = threadIdx.x; i < padding * tokens; i += QUANTISED_THREADS)
            store(inputs + i / padding * apart + stop - first - padding + i % padding, 0.0f);
    }
};

// Hidden states [tokens, width] behind a norm; without a weight x / rms(x). In one pass.
struct Normed {
    static constexpr int LOADS_OF_THREAD = (HIDDEN_SIZE / 4 + QUANTISED_THREADS - 1) / QUANTISED_THREADS;
    const float *hidden, *norm_weight, *norm_bias;
    float epsilon;
    Places in;
    int width, tokens;
    float4 weight[LOADS_OF_THREAD];

    __device__ __forceinline__ int feature(int load) const {
        return (load * QUANTISED_THREADS + threadIdx.x) * 4;
    }

    __device__ __forceinline__ void before() {
#pragma unroll
        for (int i = 0; i < LOADS_OF_THREAD; ++i) {
            weight[i] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
            if (norm_weight && feature(i) < width)
                weight[i] = *reinterpret_cast<const float4*>(norm_weight + feature(i));
        }
    }

    __device__ __forceinline__ void stage(Element* inputs, int apart, int, int stop) const {
        for (int token = 0; token < tokens; ++token) {
            float4 x[LOADS_OF_THREAD];
#pragma unroll
            for (int i = 0; i < LOADS_OF_THREAD; ++i) {
                x[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (feature(i) < width)
                    x[i] = fresh(reinterpret_cast<const float4*>(hidden + token * width + feature(i)));
            }
#if NORM_LAYER
            if (norm_weight) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < LOADS_OF_THREAD; ++i) sum += x[i].x + x[i].y + x[i].z + x[i].w;
                const float mean = block_sum(sum) / width;
#pragma unroll
                for (int i = 0; i < LOADS_OF_THREAD; ++i)
                    if (feature(i) < width) x[i].x -= mean, x[i].y -= mean, x[i].z -= mean, x[i].w -= mean;
            }
#endif
            float square = 0.0f;
#pragma unroll
            for (int i = 0; i < LOADS_OF_THREAD; ++i)
                square += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
            const float scale = 1.0f / sqrtf(block_sum(square) / width + epsilon);
#pragma unroll
            for (int i = 0; i < LOADS_OF_THREAD; ++i) {
                const int at = feature(i);
                if (at >= width) continue;
                float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (norm_bias) bias = *reinterpret_cast<const float4*>(norm_bias + at);
                const float4 factor = weight[i];
                const uint2 four{
                    pack(x[i].x * scale * factor.x + bias.x, x[i].y * scale * factor.y + bias.y),
                    pack(x[i].z * scale * factor.z + bias.z, x[i].w * scale * factor.w + bias.w)};
                if (in.places)
                    in.put(inputs + token * apart, at, 0, stop, four);
                else
                    *reinterpret_cast<uint2*>(inputs + token * apart + at) = four;
            }
            for (int at = width + threadIdx.x; at < stop; at += QUANTISED_THREADS)
                store(inputs + token * apart + at, 0.0f);
        }
    }
};

// out [tokens, outputs] = residual + sums + bias; out may be the residual itself
struct Added {
    float* out;
    const float *residual, *bias;
    int outputs;

    __device__ __forceinline__ void operator()(int tile, int row_of_tile, int token,
                                               const WarpSums& sum) const {
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

    __device__ __forceinline__ void operator()(int tile, int row, int token, const WarpSums& sum) const {
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

#define FOR_TOKENS_UP_TO(TOKENS)                                                                             \
    extern "C" __global__ void __launch_bounds__(QUANTISED_THREADS, 2) quantised_linear_##TOKENS(            \
        float* out, const float* residual, const Element* x, const int* places, const unsigned char* matrix, \
        const float* bias, int columns, int outputs, int tokens, int pass_steps) {                           \
        each_quantised_tile<TOKENS / 8, TILE_ROWS>(Given{x, {places}, columns, tokens}, matrix, columns,     \
                                                   tiles_of(outputs, TILE_ROWS), tokens, pass_steps,         \
                                                   Added{out, residual, bias, outputs});                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(QUANTISED_THREADS, 2) quantised_up_##TOKENS(                \
        Element* inner, const Element* x, const int* places, const unsigned char* matrix, const float* bias, \
        int columns, int width_out, int tokens, int pass_steps) {                                            \
        each_quantised_tile<TOKENS / 8, FEATURES>(Given{x, {places}, columns, tokens}, matrix, columns,      \
                                                  tiles_of(width_out, FEATURES), tokens, pass_steps,         \
                                                  Activated{inner, bias, width_out});                        \
    }

FOR_TOKENS_UP_TO(8)
FOR_TOKENS_UP_TO(16)
#undef FOR_TOKENS_UP_TO

// With a norm before the product, of up to 8 tokens: each thread block normalises for itself.
extern "C" __global__ void __launch_bounds__(QUANTISED_THREADS, 2)
    norm_quantised_linear(float* out, const float* hidden, const float* norm_weight, const float* norm_bias,
                          float epsilon, int width, const int* places, const unsigned char* matrix,
                          const float* bias, int columns, int outputs, int tokens) {
    each_quantised_tile<1, TILE_ROWS>(
        Normed{hidden, norm_weight, norm_bias, epsilon, {places}, width, tokens}, matrix, columns,
        tiles_of(outputs, TILE_ROWS), tokens, columns, Added{out, nullptr, bias, outputs});
}

extern "C" __global__ void __launch_bounds__(QUANTISED_THREADS, 2)
    norm_quantised_up(Element* inner, const float* hidden, const float* norm_weight, const float* norm_bias,
                      float epsilon, int width, const int* places, const unsigned char* matrix,
                      const float* bias, int columns, int width_out, int tokens) {
    each_quantised_tile<1, FEATURES>(Normed{hidden, norm_weight, norm_bias, epsilon, {places}, width, tokens},
                                     matrix, columns, tiles_of(width_out, FEATURES), tokens, columns,
                                     Activated{inner, bias, width_out});
}
}  // namespace quantised
#endif
