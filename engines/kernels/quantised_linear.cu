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
// Warps of a thread block for one token or two, which a product that normalises its inputs is for, and for
// more; tiles of a thread block that a warp takes a step of at once, so that inputs are read once for all of
// them; sums that a group's products alternate between, as each waits for the one before it; and steps that
// are on their way (measured: bench/gpu/quantised_products.py).
#ifndef FEW_WARPS
#define FEW_WARPS 12
#define MANY_WARPS 8
#define TILES_TOGETHER 2
#define PRODUCT_CHAINS 1
#define RING_NORMED (WEIGHT_BITS == 4 ? 3 : 2)
#define RING_2 2
#define RING_4 2
#define RING_8 (WEIGHT_BITS == 4 ? 3 : 2)
#define RING_16 (WEIGHT_BITS == 4 ? 3 : 2)
#endif
constexpr int FEW_THREADS = FEW_WARPS * LANES, MANY_THREADS = MANY_WARPS * LANES;
// Registers as of more threads, so that an exit's check (exit_check.cu) finds some beside two thread blocks.
constexpr int FEW_BOUND = (FEW_WARPS + 2) * LANES;
constexpr int TOGETHER = TILES_TOGETHER;
constexpr int SLOT_BYTES = TOGETHER * (NUMBER_BYTES + SCALE_BYTES);
constexpr int LOADS = NUMBER_BYTES / (16 * LANES);  // of a lane, of a step's numbers
// Inputs of a token lie so far apart, beyond whole steps, that those of two are in different banks.
constexpr int APART = 32;
// Sums of a token, likewise.
constexpr int SUMS = TILE_ROWS + 4;

// Tiles after which warps wait for one another, whose sums are kept.
__device__ __forceinline__ int batch_of(int tokens) {
    return tokens == 1 ? 16 : tokens == 2 ? 8 : TOGETHER;
}

// What a thread block has to do: some tiles, every gridDim.x-th, over all columns or, where the inputs don't
// fit in shared memory together, over a part of the columns after the other.
struct Work {
    int tiles, steps, pass_steps;  // of the thread block; of the matrix; of a pass

    __device__ __forceinline__ Work(int all_tiles, int columns, int pass_steps)
        : tiles((all_tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x),
          steps(steps_of(columns)),
          pass_steps(min(pass_steps, steps_of(columns))) {}
};

// Where a warp is: it takes a step of tiles that are taken together, in turn with the other warps.
struct Place {
    int first, stop;  // steps of the pass
    int tile, step;   // the first of the tiles, of the thread block's

    __device__ __forceinline__ Place(const Work& work, int warp)
        : first(0), stop(work.pass_steps), tile(0), step(warp) {}

    __device__ __forceinline__ void next_tiles() { step -= stop - first, tile += TOGETHER; }
    __device__ __forceinline__ void next_pass(const Work& work) {
        step += stop - first, tile = 0;
        first = stop, stop = min(stop + work.pass_steps, work.steps);
    }
};

// A warp's steps that are on their way.
template <int SLOTS>
struct Ring {
    unsigned char* slots;
    const unsigned char *numbers, *scales;  // of the matrix
    Work work;
    int tile_steps;  // from a tile of the thread block to the next
    int at;          // the next step's, of the matrix
    Place next;

    __device__ __forceinline__ Ring(unsigned char* slots, const unsigned char* matrix, int all_tiles,
                                    const Work& work, int warp)
        : slots(slots),
          numbers(matrix),
          scales(matrix + static_cast<long long>(all_tiles) * work.steps * NUMBER_BYTES),
          work(work),
          tile_steps(gridDim.x * work.steps),
          at(blockIdx.x * work.steps + warp),
          next(work, warp) {
        settle();
    }

    __device__ __forceinline__ bool done() const { return next.tile >= work.tiles; }

    // Goes on to the next step that there is.
    __device__ __forceinline__ void settle() {
        while (next.step >= next.stop) {
            at += TOGETHER * tile_steps - (next.stop - next.first);
            next.next_tiles();
            if (!done()) continue;
            if (next.stop == work.steps) return;
            next.next_pass(work);
            at = blockIdx.x * work.steps + next.step;
        }
    }

    __device__ __forceinline__ void fetch(int slot) {
        if (!done()) {
            const int lane = threadIdx.x % LANES, tiles = work.tiles - next.tile;
            unsigned char* to = slots + slot * SLOT_BYTES + lane * 16;
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const unsigned char* from =
                    numbers + static_cast<long long>(at + i * tile_steps) * NUMBER_BYTES + lane * 16;
#pragma unroll
                for (int j = 0; j < LOADS; ++j)
                    copy_async<16>(to + i * NUMBER_BYTES + j * LANES * 16, from + j * LANES * 16, i < tiles);
            }
            constexpr int SCALE_LOADS = SCALE_BYTES / 16;
#pragma unroll
            for (int i = 0; i < (TOGETHER * SCALE_LOADS + LANES - 1) / LANES; ++i) {
                const int load = i * LANES + lane, tile = load / SCALE_LOADS;
                if (tile < TOGETHER)
                    copy_async<16>(to + TOGETHER * NUMBER_BYTES + i * LANES * 16,
                                   scales + static_cast<long long>(at + tile * tile_steps) * SCALE_BYTES +
                                       load % SCALE_LOADS * 16,
                                   tile < tiles);
            }
            const int warps = blockDim.x / LANES;
            next.step += warps, at += warps;
            settle();
        }
        copies_end();
    }
    __device__ __forceinline__ void wait() const {
        copies_wait<SLOTS - 1>();
        __syncwarp();  // other lanes have brought scales
    }
};

// Sums of a warp's part of tiles, for up to GROUPS * 8 tokens.
template <int GROUPS>
struct TileSums {
    float total[TOGETHER][GROUPS][4] = {};

    // `inputs` begin with the step's.
    __device__ __forceinline__ void add(const unsigned char* slot, const Element* inputs, int apart,
                                        int tokens) {
        constexpr int CHAINS = GROUPS == 1 ? PRODUCT_CHAINS : 1;
        const int lane = threadIdx.x % LANES;
        const Element* inputs_of[GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
            inputs_of[group] = inputs + min(group * 8 + lane / 4, tokens - 1) * apart + lane % 4 * WIDE;
        unsigned words[TOGETHER][LOADS * 4];
#pragma unroll
        for (int tile = 0; tile < TOGETHER; ++tile)
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                *reinterpret_cast<uint4*>(words[tile] + 4 * i) =
                    reinterpret_cast<const uint4*>(slot + tile * NUMBER_BYTES)[i * LANES + lane];
#pragma unroll
        for (int group_of_step = 0; group_of_step < STEP_GROUPS; ++group_of_step) {
            Scale scale[TOGETHER];
#pragma unroll
            for (int tile = 0; tile < TOGETHER; ++tile)
                scale[tile] = scale_from(reinterpret_cast<const uint2*>(
                    slot + TOGETHER * NUMBER_BYTES + tile * SCALE_BYTES)[group_of_step * 8 + lane / 4]);
            float part[TOGETHER][CHAINS][GROUPS][4] = {};
#pragma unroll
            for (int two = 0; two < PRODUCTS_OF_GROUP / 2; ++two) {
                const int pair = group_of_step * PRODUCTS_OF_GROUP / 2 + two;
                uint4 right[GROUPS];
#pragma unroll
                for (int group = 0; group < GROUPS; ++group)
                    right[group] = *reinterpret_cast<const uint4*>(inputs_of[group] + pair * 32);
#pragma unroll
                for (int tile = 0; tile < TOGETHER; ++tile) {
                    unsigned left[2][4];
                    unpack(left[0], words[tile] + pair * 2 * WORDS, scale[tile]);
                    unpack(left[1], words[tile] + (pair * 2 + 1) * WORDS, scale[tile]);
#pragma unroll
                    for (int group = 0; group < GROUPS; ++group) {
                        multiply_half(part[tile][0][group], left[0], {right[group].x, right[group].y});
                        multiply_half(part[tile][CHAINS - 1][group], left[1],
                                      {right[group].z, right[group].w});
                    }
                }
            }
#pragma unroll
            for (int tile = 0; tile < TOGETHER; ++tile)
#pragma unroll
                for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float sum = part[tile][0][group][i];
                        if (CHAINS == 2) sum += part[tile][CHAINS - 1][group][i];
                        total[tile][group][i] += sum * scale[tile].scale[i / 2];
                    }
        }
    }

    // Puts those of a tile where the thread block adds them up, or adds them there: a warp's [tokens, SUMS].
    __device__ __forceinline__ void keep(int tile, float* sums, int tokens, bool added) const {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = group * 8 + lane % 4 * 2 + i % 2, row = i / 2 * 8 + lane / 4;
                float* at = sums + token * SUMS + row;
                if (token < tokens) *at = total[tile][group][i] + (added ? *at : 0.0f);
            }
    }
};

// The sum of a row of a tile, for a token, over all warps' columns.
struct WarpSums {
    const float* sums;  // the token's, of the first warp
    int apart;

    __device__ __forceinline__ float operator()(int row) const {
        float total = 0.0f;
        const int warps = blockDim.x / LANES;
#pragma unroll 4
        for (int warp = 0; warp < warps; ++warp) total += sums[warp * apart + row];
        return total;
    }
};

// Calls use(tile, row of the tile, token, sums) by a thread for each of USED rows of a tile and token.
// `inputs_of` brings them into shared memory, with zeros up to whole steps; its before() does what can be
// done while the kernel before still runs. Shared memory: inputs of a pass [tokens, apart], sums [tiles,
// warps, tokens, SUMS] (of those that are kept, or of all where there are several passes), rings.
template <int GROUPS, int SLOTS, bool LATE, int USED, class Inputs, class Use>
__device__ __forceinline__ void each_quantised_tile(Inputs inputs_of, const unsigned char* matrix,
                                                    int columns, int all_tiles, int tokens, int pass_steps,
                                                    Use use) {
    const Work work(all_tiles, columns, pass_steps);
    const int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), warps = blockDim.x / LANES;
    const int batch = batch_of(tokens);
    const int apart = work.pass_steps * STEP + APART, warp_sums = tokens * SUMS;
    const int kept = work.pass_steps < work.steps ? (all_tiles + gridDim.x - 1) / gridDim.x : batch;
    Element* inputs = reinterpret_cast<Element*>(shared_memory);
    float* sums = reinterpret_cast<float*>(inputs + tokens * apart);
    unsigned char* rings = reinterpret_cast<unsigned char*>(sums + kept * warps * warp_sums);
    Place place(work, warp);
    Ring<SLOTS> ring(rings + warp * SLOTS * SLOT_BYTES, matrix, all_tiles, work, warp);
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) ring.fetch(slot);
    inputs_of.before();
    wait_for_previous();
    bool started = !LATE || ring.done();
    if (started) let_next_start();
    bool not_wanted = is_called_off();  // comes while the inputs do
    for (int slot = 0;;) {
        inputs_of.stage(inputs, apart, place.first * STEP, place.stop * STEP);
        if (__syncthreads_or(not_wanted)) {
            copies_wait<0>();
            return;
        }
        not_wanted = false;
        for (; place.tile < work.tiles;) {
            TileSums<GROUPS> tile_sums;
#pragma unroll 1
            for (; place.step < place.stop; place.step += warps) {
                ring.wait();
                tile_sums.add(ring.slots + slot * SLOT_BYTES, inputs + (place.step - place.first) * STEP,
                              apart, tokens);
                __syncwarp();  // and have read them
                ring.fetch(slot);
                if (!started && ring.done()) started = true, let_next_start();
                slot = slot + 1 == SLOTS ? 0 : slot + 1;
            }
            const int finished = min(place.tile + TOGETHER, work.tiles);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                if (place.tile + i < finished)
                    tile_sums.keep(i, sums + ((place.tile + i) % kept * warps + warp) * warp_sums, tokens,
                                   place.first);
            place.next_tiles();
            if (place.stop < work.steps || (finished % batch && finished < work.tiles)) continue;
            const int begun = (finished - 1) / batch * batch, count = finished - begun;
            __syncthreads();
            for (int i = threadIdx.x; i < count * USED * tokens; i += blockDim.x) {
                const int row = i % USED, tile = begun + i / USED % count, token = i / (USED * count);
                use(tile * gridDim.x + blockIdx.x, row, token,
                    WarpSums{sums + (tile % kept * warps * tokens + token) * SUMS, warp_sums});
            }
            if (finished < work.tiles) __syncthreads();  // the sums have been read
        }
        if (place.stop == work.steps) return;
        place.next_pass(work);
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
        for (int i = threadIdx.x; i < chunks * tokens; i += blockDim.x) {
            const int token = i / chunks, at = i % chunks * WIDE;
            uint4 words{0u, 0u, 0u, 0u};
            if (first + at < columns) words = fresh(chunk(token, first + at));
            *reinterpret_cast<uint4*>(inputs + token * apart + at) = words;
        }
    }

    __device__ void stage_in_order(Element* inputs, int apart, int first, int stop) const {
        const int chunks = columns / WIDE;
        for (int i = threadIdx.x; i < chunks * tokens; i += blockDim.x) {
            const int token = i / chunks, column = i % chunks * WIDE;
            const uint4 words = fresh(chunk(token, column));
            in.put(inputs + token * apart, column, first, stop, {words.x, words.y});
            in.put(inputs + token * apart, column + 4, first, stop, {words.z, words.w});
        }
        const int padding = max(stop - max(columns, first), 0);
        for (int i = threadIdx.x; i < padding * tokens; i += blockDim.x)
            store(inputs + i / padding * apart + stop - first - padding + i % padding, 0.0f);
    }
};

// Hidden states [tokens, width] behind a norm; without a weight x / rms(x). In one pass.
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
            for (int at = width + threadIdx.x; at < stop; at += blockDim.x)
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

#define FOR_TOKENS_UP_TO(TOKENS, GROUPS, SLOTS, LATE, THREADS)                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) quantised_linear_##TOKENS(                      \
        float* out, const float* residual, const Element* x, const int* places, const unsigned char* matrix, \
        const float* bias, int columns, int outputs, int tokens, int pass_steps) {                           \
        each_quantised_tile<GROUPS, SLOTS, LATE, TILE_ROWS>(                                                 \
            Given{x, {places}, columns, tokens}, matrix, columns, tiles_of(outputs, TILE_ROWS), tokens,      \
            pass_steps, Added{out, residual, bias, outputs});                                                \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) quantised_up_##TOKENS(                          \
        Element* inner, const Element* x, const int* places, const unsigned char* matrix, const float* bias, \
        int columns, int width_out, int tokens, int pass_steps) {                                            \
        each_quantised_tile<GROUPS, SLOTS, LATE, FEATURES>(Given{x, {places}, columns, tokens}, matrix,      \
                                                           columns, tiles_of(width_out, FEATURES), tokens,   \
                                                           pass_steps, Activated{inner, bias, width_out});   \
    }

FOR_TOKENS_UP_TO(2, 1, RING_2, true, FEW_BOUND)
FOR_TOKENS_UP_TO(4, 1, RING_4, false, MANY_THREADS)
FOR_TOKENS_UP_TO(8, 1, RING_8, false, MANY_THREADS)
FOR_TOKENS_UP_TO(16, 2, RING_16, false, MANY_THREADS)
#undef FOR_TOKENS_UP_TO

// With a norm before the product, of up to 8 tokens: each thread block normalises for itself.
extern "C" __global__ void __launch_bounds__(FEW_BOUND, 2)
    norm_quantised_linear(float* out, const float* hidden, const float* norm_weight, const float* norm_bias,
                          float epsilon, int width, const int* places, const unsigned char* matrix,
                          const float* bias, int columns, int outputs, int tokens) {
    each_quantised_tile<1, RING_NORMED, true, TILE_ROWS>(
        Normed{hidden, norm_weight, norm_bias, epsilon, {places}, width, tokens}, matrix, columns,
        tiles_of(outputs, TILE_ROWS), tokens, columns, Added{out, nullptr, bias, outputs});
}

extern "C" __global__ void __launch_bounds__(FEW_BOUND, 2)
    norm_quantised_up(Element* inner, const float* hidden, const float* norm_weight, const float* norm_bias,
                      float epsilon, int width, const int* places, const unsigned char* matrix,
                      const float* bias, int columns, int width_out, int tokens) {
    each_quantised_tile<1, RING_NORMED, true, FEATURES>(
        Normed{hidden, norm_weight, norm_bias, epsilon, {places}, width, tokens}, matrix, columns,
        tiles_of(width_out, FEATURES), tokens, columns, Activated{inner, bias, width_out});
}
}  // namespace quantised
#endif
