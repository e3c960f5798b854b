// Attention of a prompt's tokens, whose keys and values `append` has put into the cache: a thread block
// takes many queries, so that each key that it reads serves all of them.
#include "tiles.cuh"

constexpr int PROMPT_WARPS = ROW_BYTES > 512 ? 2 : 4;
constexpr int PROMPT_ROWS = PROMPT_WARPS * TILE_ROWS;
// Thread blocks on a multiprocessor, as far as shared memory and registers go.
constexpr int PROMPT_RESIDENT = HALF && ROW_BYTES <= 256 ? 3 : 1;
constexpr int PROMPT_KEYS = ROW_BYTES > 512 ? 16 : ROW_BYTES > 256 ? 32 : 64;

// out [tokens, HEADS * HEAD_DIM]; the tokens are consecutive ones of a sequence.
// Grid (ceil(tokens * GROUP / PROMPT_ROWS), KV_HEADS).
extern "C" __global__ void __launch_bounds__(PROMPT_WARPS* LANES, PROMPT_RESIDENT)
    prompt_attention(Element* out, const float* qkv, Element* keys, Element* values, const float* cosines,
                     const float* sines, const int* positions, const int* sequences, int capacity, float scale,
                     int tokens) {
    constexpr int STAGE = 2 * PROMPT_KEYS * STRIDE;
    const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, capacity};
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, kv_head = blockIdx.y;
    Element* const ring = reinterpret_cast<Element*>(shared_memory);
    // Queries that go to registers lie where the second stage of keys comes later.
    Element* const queries = ring + (HALF ? STAGE : 2 * STAGE);
    static_assert(!HALF || PROMPT_ROWS <= 2 * PROMPT_KEYS, "the queries fit into a stage");

    // The last rows have most to do: they begin first.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * PROMPT_ROWS;
    const int rows = min(PROMPT_ROWS, tokens * GROUP - first_row);
    const int lowest = positions[first_row / GROUP], stop = positions[(first_row + rows - 1) / GROUP] + 1;
    const int oldest = WINDOW ? max(0, lowest + 1 - WINDOW) : 0;
    const int tiles = (stop - oldest + PROMPT_KEYS - 1) / PROMPT_KEYS;
    const long long base = in.base(0, kv_head);
    const auto copy_tile = [=](int tile) {
        Element* stage = ring + tile % 2 * STAGE;
        if (tile < tiles)
            copy_rows<PROMPT_KEYS>(stage, stage + PROMPT_KEYS * STRIDE, keys + base, values + base,
                                   oldest + tile * PROMPT_KEYS, stop, threadIdx.x, blockDim.x);
        copies_end();
    };
    copy_tile(0);
    for (int i = threadIdx.x; i < PROMPT_ROWS * DIM; i += blockDim.x) {
        const int row = first_row + i / DIM, feature = i % DIM;
        const bool real = i / DIM < rows && feature < HEAD_DIM;
        store(queries + i / DIM * STRIDE + feature,
              real ? scale * LOG2_E * in.query(row / GROUP, kv_head * GROUP + row % GROUP, feature) : 0.0f);
    }
    __syncthreads();
    const Queries query(queries + warp * TILE_ROWS * STRIDE);
    __syncthreads();
    clear_padding(ring, 2 * 2 * PROMPT_KEYS, threadIdx.x, blockDim.x);

    Seen seen;
    const auto position_of = [=](int row) { return row < rows ? positions[(first_row + row) / GROUP] : -1; };
#pragma unroll
    for (int half = 0; half < 2; ++half) seen.position[half] = position_of(warp * TILE_ROWS + lane / 4 + 8 * half);
    const int warp_lowest = position_of(warp * TILE_ROWS);
    const int warp_highest = position_of(min(warp * TILE_ROWS + TILE_ROWS, rows) - 1);
    for (int tile = 0; tile < tiles; ++tile) {
        copy_tile(tile + 1);
        copies_wait<1>();
        __syncthreads();
        const int key = oldest + tile * PROMPT_KEYS;
        const Element* stage = ring + tile % 2 * STAGE;
        const bool partly = key + PROMPT_KEYS - 1 > warp_lowest || (WINDOW && key + WINDOW <= warp_highest);
        if (warp * TILE_ROWS < rows && key <= warp_highest)
            seen.attend<PROMPT_KEYS>(query, stage, stage + PROMPT_KEYS * STRIDE, key, partly);
        __syncthreads();
    }
    seen.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * TILE_ROWS + lane / 4 + 8 * half;
        if (row >= rows) continue;
        const long long query_index =
            static_cast<long long>((first_row + row) / GROUP) * HEADS + kv_head * GROUP + (first_row + row) % GROUP;
#pragma unroll
        for (int tile = 0; tile < DIM / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int feature = tile * 8 + lane % 4 * 2 + i;
                if (feature < HEAD_DIM)
                    store(out + query_index * HEAD_DIM + feature, seen.mixed[tile][2 * half + i] / seen.total[half]);
            }
    }
}
