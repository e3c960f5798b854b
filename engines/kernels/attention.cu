// Attention of a step over the cache in place: rotates, appends, attends. The positions of the tokens are
// read from device memory, so that one CUDA graph serves every position: the grid is that of the longest
// cache, and thread blocks that a short one doesn't need leave.
#include "tiles.cuh"

// As many as have their rows in shared memory three times on a multiprocessor (bench/NOTES.md).
constexpr int MOST_WARPS = 4, FITTING_WARPS = 1024 / ROW_BYTES;
constexpr int STEP_WARPS = FITTING_WARPS < 1 ? 1 : FITTING_WARPS > MOST_WARPS ? MOST_WARPS : FITTING_WARPS;
constexpr int STEP_KEYS = 16;  // of a warp at a time
constexpr int STEP_STAGES = 2;      // of a warp's steps in shared memory, all but one of them on their way
// Keys that a thread block takes by itself before others help (bench/NOTES.md).
constexpr int SPLIT_KEYS = 128;
constexpr int PARTIAL = HEAD_DIM + 2;  // largest, total, weighted values

// Keys and values of a sequence's tokens, before any of them attends. Grid (tokens).
extern "C" __global__ void append(const float* qkv, Element* keys, Element* values, const float* cosines,
                                  const float* sines, const int* positions, const int* sequences, int capacity) {
    const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, capacity};
    const int token = blockIdx.x, position = positions[token];
    for (int i = threadIdx.x; i < KV_HEADS * HEAD_DIM; i += blockDim.x) {
        const int kv_head = i / HEAD_DIM, feature = i % HEAD_DIM;
        const long long at = in.base(token, kv_head) + static_cast<long long>(position) * HEAD_DIM + feature;
        store(keys + at, in.key(token, kv_head, feature));
        store(values + at, in.value(token, kv_head, feature));
    }
}

// Asks for this thread block's share of what the next kernel reads first: while attention waits for
// its few bytes, the memory has time.
__device__ void prefetch_share(const unsigned char* at, long long bytes) {
    constexpr int LINE = 128;
    const long long blocks = static_cast<long long>(gridDim.x) * gridDim.y * gridDim.z;
    const long long block = (static_cast<long long>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    for (long long line = block * blockDim.x + threadIdx.x; line * LINE < bytes; line += blocks * blockDim.x)
        prefetch(at + line * LINE);
}

// Combines parts [count][stride] for one feature: largest, total, weighted value.
struct Combined {
    float largest = NONE, total = 0.0f, mixed = 0.0f;

    __device__ Combined(const float* parts, int stride, int count, int feature) {
#pragma unroll 8
        for (int part = 0; part < count; ++part) largest = fmaxf(largest, parts[part * stride]);
#pragma unroll 8
        for (int part = 0; part < count; ++part) {
            const float* each = parts + part * stride;
            const float weight = power_of_2(each[0] - largest);
            total += weight * each[1];
            mixed += weight * each[2 + feature];
        }
    }
};

// out [sequences * tokens, HEADS * HEAD_DIM] from qkv and the cache.
// Grid (splits, KV_HEADS * ceil(tokens * GROUP / TILE_ROWS), sequences): each split takes a part of the
// keys, the last to finish combines.
//   tokens    of each sequence, consecutive; one is appended here, several by `append` before
//   parts     [sequences * tokens, HEADS, splits, PARTIAL] where splits > 1
//   finished  [gridDim.z, gridDim.y] zero before and after
//   ahead     what the next kernel reads, bytes of it that are worth asking for
extern "C" __global__ void __launch_bounds__(STEP_WARPS* LANES)
    attention(Element* out, const float* qkv, Element* keys, Element* values, const float* cosines,
              const float* sines, const int* positions, const int* sequences, int capacity, float scale, int tokens,
              float* parts, unsigned* finished, const unsigned char* ahead, long long ahead_bytes) {
    constexpr int STAGE = 2 * STEP_KEYS * STRIDE;
    const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, capacity};
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    Element* const queries = reinterpret_cast<Element*>(shared_memory);
    Element* const fresh = queries + TILE_ROWS * STRIDE;  // the new key and value
    Element* const ring = fresh + 2 * STRIDE + warp * STEP_STAGES * STAGE;

    const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y % KV_HEADS;
    const int first_row = blockIdx.y / KV_HEADS * TILE_ROWS, rows = min(TILE_ROWS, tokens * GROUP - first_row);
    const int first_token = blockIdx.z * tokens + first_row / GROUP;
    const int last_token = blockIdx.z * tokens + (first_row + rows - 1) / GROUP;
    const int lowest = positions[first_token], highest = positions[last_token];
    const int oldest = WINDOW ? max(0, lowest + 1 - WINDOW) : 0, count = highest + 1 - oldest;
    // Whole steps, so that no split sees keys of another.
    int active = min(splits, (count + SPLIT_KEYS - 1) / SPLIT_KEYS);
    const int each = (count + active * STEP_KEYS - 1) / (active * STEP_KEYS) * STEP_KEYS;
    active = (count + each - 1) / each;
    const int first = oldest + split * each, stop = min(first + each, highest + 1);
    const bool appending = tokens == 1 && split == active - 1;

    const long long base = in.base(first_token, kv_head);
    const auto copy_step = [=](int step) {
        const int key = first + (step * STEP_WARPS + warp) * STEP_KEYS;
        Element* stage = ring + step % STEP_STAGES * STAGE;
        if (key < stop)
            copy_rows<STEP_KEYS>(stage, stage + STEP_KEYS * STRIDE, keys + base, values + base, key, stop, lane, LANES);
        copies_end();
    };
    if (split < active) {  // older keys and values don't depend on the kernel before
#pragma unroll
        for (int step = 0; step < STEP_STAGES; ++step) copy_step(step);
        clear_padding(ring, STEP_STAGES * 2 * STEP_KEYS, lane, LANES);
        for (int i = threadIdx.x; i < TILE_ROWS * DIM; i += blockDim.x)
            store(queries + i / DIM * STRIDE + i % DIM, 0.0f);
    }
    wait_for_previous();
    let_next_start();
    prefetch_share(ahead, ahead_bytes);
    if (split >= active) return;
    for (int i = threadIdx.x; i < rows * DIM; i += blockDim.x) {  // the very places that this thread cleared
        const int row = first_row + i / DIM, token = blockIdx.z * tokens + row / GROUP;
        if (i % DIM < HEAD_DIM)
            store(queries + i / DIM * STRIDE + i % DIM,
                  scale * LOG2_E * in.query(token, kv_head * GROUP + row % GROUP, i % DIM));
    }
    if (appending) {
        const long long place = base + static_cast<long long>(highest) * HEAD_DIM;
        for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
            store(fresh + i, in.key(first_token, kv_head, i));
            store(fresh + STRIDE + i, in.value(first_token, kv_head, i));
            keys[place + i] = fresh[i];
            values[place + i] = fresh[STRIDE + i];
        }
    }
    __syncthreads();

    const Queries query(queries);
    Seen seen;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        seen.position[half] = row < rows ? positions[blockIdx.z * tokens + (first_row + row) / GROUP] : -1;
    }
    for (int step = 0, key = first + warp * STEP_KEYS; key < stop; ++step, key += STEP_WARPS * STEP_KEYS) {
        Element* stage = ring + step % STEP_STAGES * STAGE;
        copies_wait<STEP_STAGES - 1>();
        __syncwarp();
        if (appending && key <= highest && highest < key + STEP_KEYS) {
            for (int i = lane; i < HEAD_DIM; i += LANES) {
                stage[(highest - key) * STRIDE + i] = fresh[i];
                stage[(STEP_KEYS + highest - key) * STRIDE + i] = fresh[STRIDE + i];
            }
            __syncwarp();
        }
        const bool partly = key + STEP_KEYS - 1 > lowest || (WINDOW && key + WINDOW <= highest);
        seen.attend<STEP_KEYS>(query, stage, stage + STEP_KEYS * STRIDE, key, partly);
        __syncwarp();
        copy_step(step + STEP_STAGES);
    }
    seen.finish();
    copies_wait<0>();
    __syncthreads();  // the stages' memory is used again

    float* const by_warp = reinterpret_cast<float*>(fresh + 2 * STRIDE);  // [STEP_WARPS, TILE_ROWS, PARTIAL]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= rows) continue;
        float* part = by_warp + (warp * TILE_ROWS + row) * PARTIAL;
        if (lane % 4 == 0) part[0] = seen.largest[half], part[1] = seen.total[half];
#pragma unroll
        for (int tile = 0; tile < DIM / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int feature = tile * 8 + lane % 4 * 2 + i;
                if (feature < HEAD_DIM) part[2 + feature] = seen.mixed[tile][2 * half + i];
            }
    }
    __syncthreads();
    // Query `row` of this thread block among all.
    const auto query_of = [=](int row) {
        const int token = blockIdx.z * tokens + (first_row + row) / GROUP;
        return static_cast<long long>(token) * HEADS + kv_head * GROUP + (first_row + row) % GROUP;
    };
    for (int i = threadIdx.x; i < rows * HEAD_DIM; i += blockDim.x) {
        const int row = i / HEAD_DIM, feature = i % HEAD_DIM;
        const Combined all(by_warp + row * PARTIAL, TILE_ROWS * PARTIAL, STEP_WARPS, feature);
        if (active == 1) {
            store(out + query_of(row) * HEAD_DIM + feature, all.mixed / all.total);
            continue;
        }
        float* part = parts + (query_of(row) * splits + split) * PARTIAL;
        if (feature == 0) part[0] = all.largest, part[1] = all.total;
        part[2 + feature] = all.mixed;
    }
    if (active == 1) return;
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what the barrier has shown this thread is seen by whoever sees the count
        unsigned* counter = finished + blockIdx.z * gridDim.y + blockIdx.y;
        is_last = atomicInc(counter, active - 1) == active - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < rows * HEAD_DIM; i += blockDim.x) {
        const int row = i / HEAD_DIM, feature = i % HEAD_DIM;
        const Combined all(parts + query_of(row) * splits * PARTIAL, PARTIAL, active, feature);
        store(out + query_of(row) * HEAD_DIM + feature, all.mixed / all.total);
    }
}
