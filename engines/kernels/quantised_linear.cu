// Products with quantised matrices for steps of one token or two, on tensor cores: what a number costs is to
// be unpacked, and a product of tiles does no more for one token than for eight.
//
// A matrix lies in tiles of TILE_ROWS rows, and those in steps of STEP columns (numbers.cuh): a lane's
// numbers of a step are whole 16-byte loads, a warp's are whole lines, and all of a tile are one piece of
// memory. Behind all numbers come all scales.
//
// A thread block takes a tile at a time, its warps a step at a time in turn. Inputs are in shared memory
// beforehand. Weights go through it, where each warp has a ring of steps that are on their way: they begin
// while the kernel before runs, and take no registers, so that two kernels find room on a multiprocessor, and
// the memory has always something to do.
#include "quantised_products.cuh"

#if HALF && WEIGHT_BITS
namespace quantised {
// Warps of a thread block; tiles of a thread block that a warp takes a step of at once, so that inputs are
// read once for all of them; and steps that are on their way, where inputs are normalised and where they
// aren't (measured: bench/gpu/products.py).
#ifndef FEW_WARPS
#define FEW_WARPS 12
#define TILES_TOGETHER 2
#define RING_NORMED (WEIGHT_BITS == 4 ? 3 : 2)
#define RING_GIVEN 2
#endif
constexpr int FEW = 2;  // tokens
constexpr int FEW_THREADS = FEW_WARPS * LANES;
// Registers as of more threads, so that an exit's check (exit_check.cu) finds some beside two thread blocks.
constexpr int FEW_BOUND = (FEW_WARPS + 2) * LANES;
constexpr int TOGETHER = TILES_TOGETHER;
constexpr int SLOT_BYTES = TOGETHER * STORED_BYTES;
// Inputs of a token lie so far apart, beyond whole steps, that those of two are in different banks.
constexpr int APART = 32;

// Tiles after which warps wait for one another, whose sums are kept.
__device__ __forceinline__ int batch_of(int tokens) {
    return tokens == 1 ? 16 : 8;
}

// A lane's inputs of a step; a token beyond them is the last one again.
struct StagedInputs {
    const Element* step;

    __device__ __forceinline__ StagedInputs(const Element* inputs, int apart, int tokens) {
        const int lane = threadIdx.x % LANES;
        step = inputs + min(lane / 4, tokens - 1) * apart + lane % 4 * WIDE;
    }

    __device__ __forceinline__ uint4 operator()(int, int pair) const {
        return *reinterpret_cast<const uint4*>(step + pair * 32);
    }
};

// Calls use(tile, row of the tile, token, sums) as use_sums() does.
// `inputs_of` brings them into shared memory, with zeros up to whole steps; its before() does what can be
// done while the kernel before still runs. Shared memory: inputs [tokens, apart], sums [tiles that are kept,
// warps, tokens, SUMS], rings.
template <int SLOTS, int USED, class Inputs, class Use>
__device__ __forceinline__ void each_quantised_tile(Inputs inputs_of, const unsigned char* matrix,
                                                    int columns, int all_tiles, int tokens, Use use) {
    WarpSteps next(matrix, all_tiles, columns, TOGETHER);
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), tiles = next.tiles, steps = next.steps;
    const int batch = batch_of(tokens), apart = steps * STEP + APART, warp_sums = tokens * SUMS;
    Element* inputs = reinterpret_cast<Element*>(shared_memory);
    float* sums = reinterpret_cast<float*>(inputs + tokens * apart);
    unsigned char* slots =
        reinterpret_cast<unsigned char*>(sums + batch * FEW_WARPS * warp_sums) + warp * SLOTS * SLOT_BYTES;
    const auto bring = [&](unsigned char* slot) {
        if (!next.done()) next.copy<TOGETHER>(shared_address(slot)), next.next();
        copies_end();
    };
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) bring(slots + slot * SLOT_BYTES);
    inputs_of.before();
    wait_for_previous();
    bool started = next.done();
    if (started) let_next_start();
    const bool not_wanted = is_called_off();  // comes while the inputs do
    inputs_of.stage(inputs, apart, steps * STEP);
    if (__syncthreads_or(not_wanted)) {
        copies_wait<0>();
        return;
    }
    unsigned char* slot = slots;
    int step = warp;
    for (int tile = 0; tile < tiles;) {
        TileSums<1, TOGETHER> tile_sums;
#pragma unroll 1
        for (; step < steps; step += FEW_WARPS) {
            copies_wait<SLOTS - 1>();
            __syncwarp();  // other lanes have brought some of it
            tile_sums.template add<TOGETHER>(slot, StagedInputs(inputs + step * STEP, apart, tokens));
            __syncwarp();  // and have read theirs
            bring(slot);
            if (!started && next.done()) started = true, let_next_start();
            slot += SLOT_BYTES;
            if (slot == slots + SLOTS * SLOT_BYTES) slot = slots;
        }
        const int finished = min(tile + TOGETHER, tiles);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
            if (tile + i < finished)
                tile_sums.keep(i, sums + ((tile + i) % batch * FEW_WARPS + warp) * warp_sums, tokens);
        step -= steps, tile += TOGETHER;
        if (finished % batch && finished < tiles) continue;
        const int begun = (finished - 1) / batch * batch;
        __syncthreads();
        use_sums<FEW_WARPS, FEW, USED>(sums, begun, finished - begun, tokens, use);
        if (finished < tiles) __syncthreads();  // the sums have been read
    }
}

// Where inputs lie, of a matrix whose groups are not of neighbours: `places` names the place of each, or is
// none where they are in order.
struct Places {
    const int* places;

    // Four neighbours.
    __device__ __forceinline__ void put(Element* inputs, int column, uint2 four) const {
        for (int i = 0; i < 4; ++i) inputs[places[column + i]] = element_of(i < 2 ? four.x : four.y, i % 2);
    }
};

// Inputs [tokens, columns] as they are.
struct Given {
    const Element* x;
    Places in;
    int columns, tokens;

    __device__ __forceinline__ void before() const {}

    __device__ __forceinline__ void stage(Element* inputs, int apart, int stop) const {
        const int chunks = stop / WIDE;
#pragma unroll 4
        for (int i = threadIdx.x; i < chunks * tokens; i += blockDim.x) {
            const int token = i / chunks, column = i % chunks * WIDE;
            Element* to = inputs + token * apart;
            uint4 words{0u, 0u, 0u, 0u};
            if (column < columns)
                words = fresh(
                    reinterpret_cast<const uint4*>(x + static_cast<long long>(token) * columns + column));
            if (in.places && column < columns) {
                in.put(to, column, {words.x, words.y});
                in.put(to, column + 4, {words.z, words.w});
            } else {
                *reinterpret_cast<uint4*>(to + column) = words;
            }
        }
    }
};

// Hidden states [tokens, width] behind a norm; without a weight x / rms(x).
struct Normed {
    static constexpr int LOADS_OF_THREAD = (HIDDEN_SIZE / 4 + FEW_THREADS - 1) / FEW_THREADS;
    const float *hidden, *norm_weight, *norm_bias;
    float epsilon;
    Places in;
    int width, tokens;
    float4 weight[LOADS_OF_THREAD];

    __device__ __forceinline__ int feature(int load) const { return (load * FEW_THREADS + threadIdx.x) * 4; }

    __device__ __forceinline__ void before() {
#pragma unroll
        for (int i = 0; i < LOADS_OF_THREAD; ++i) {
            weight[i] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
            if (norm_weight && feature(i) < width)
                weight[i] = *reinterpret_cast<const float4*>(norm_weight + feature(i));
        }
    }

    __device__ __forceinline__ void stage(Element* inputs, int apart, int stop) const {
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
                    in.put(inputs + token * apart, at, four);
                else
                    *reinterpret_cast<uint2*>(inputs + token * apart + at) = four;
            }
            for (int at = width + threadIdx.x; at < stop; at += blockDim.x)
                store(inputs + token * apart + at, 0.0f);
        }
    }
};

extern "C" __global__ void __launch_bounds__(FEW_BOUND, 2)
    quantised_linear(float* out, const float* residual, const Element* x, const int* places,
                     const unsigned char* matrix, const float* bias, int columns, int outputs, int tokens) {
    each_quantised_tile<RING_GIVEN, TILE_ROWS>(Given{x, {places}, columns, tokens}, matrix, columns,
                                               tiles_of(outputs, TILE_ROWS), tokens,
                                               Added{out, residual, bias, outputs});
}

// With a norm before the product: each thread block normalises for itself.
extern "C" __global__ void __launch_bounds__(FEW_BOUND, 2)
    norm_quantised_linear(float* out, const float* hidden, const float* norm_weight, const float* norm_bias,
                          float epsilon, int width, const int* places, const unsigned char* matrix,
                          const float* bias, int columns, int outputs, int tokens) {
    each_quantised_tile<RING_NORMED, TILE_ROWS>(
        Normed{hidden, norm_weight, norm_bias, epsilon, {places}, width, tokens}, matrix, columns,
        tiles_of(outputs, TILE_ROWS), tokens, Added{out, nullptr, bias, outputs});
}

extern "C" __global__ void __launch_bounds__(FEW_BOUND, 2)
    norm_quantised_up(Element* inner, const float* hidden, const float* norm_weight, const float* norm_bias,
                      float epsilon, int width, const int* places, const unsigned char* matrix,
                      const float* bias, int columns, int width_out, int tokens) {
    each_quantised_tile<RING_NORMED, FEATURES>(
        Normed{hidden, norm_weight, norm_bias, epsilon, {places}, width, tokens}, matrix, columns,
        tiles_of(width_out, FEATURES), tokens, Activated{inner, bias, width_out});
}
}  // namespace quantised
#endif
