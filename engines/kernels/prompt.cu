// Attention of a prompt's tokens, whose keys and values `append` has put into the cache: a thread block
// takes many queries, so that each key that it reads serves all of them.
//
// After FlashAttention-2 (arXiv 2307.08691): a warp keeps the scores of its queries, and what they mix, in the
// registers in which the products leave them.
#include "tiles.cuh"

constexpr int TILE_ROWS = 16;  // queries of a warp
constexpr int PROMPT_WARPS = ROW_BYTES > 512 ? 2 : 4;
constexpr int PROMPT_ROWS = PROMPT_WARPS * TILE_ROWS;
// Thread blocks on a multiprocessor, as far as shared memory and registers go.
constexpr int PROMPT_RESIDENT = HALF && ROW_BYTES <= 256 ? 2 : 1;
constexpr int PROMPT_KEYS = ROW_BYTES > 512 ? 16 : ROW_BYTES > 256 ? 32 : 64;

// The queries of a warp: in registers, where they fit there.
struct Queries {
#if HALF
    Left steps[DIM / DEPTH];

    __device__ __forceinline__ explicit Queries(const Element* rows) {
#pragma unroll
        for (int step = 0; step < DIM / DEPTH; ++step) steps[step] = load_left(rows + step * DEPTH);
    }
    __device__ __forceinline__ Left at(int step) const { return steps[step]; }
#else
    const Element* rows;

    __device__ __forceinline__ explicit Queries(const Element* rows) : rows(rows) {}
    __device__ __forceinline__ Left at(int step) const { return load_left(rows + step * DEPTH); }
#endif
};

// What a warp has seen for its rows; a lane holds of rows lane / 4 and lane / 4 + 8, of every 8 columns
// 2 (lane % 4) and the next.
// Of queries that see LIMIT keys at most; 0 for all.
template <int LIMIT>
struct SeenByRows {
    int position[2];               // of the rows' tokens; -1 where there is no row
    float largest[2] = {NONE, NONE};  // score, in powers of 2
    float total[2] = {};           // of 2^(score - largest), this lane's part
    float mixed[DIM / 8][4] = {};  // values weighted by it

    // Attends to KEYS keys from `first` on; `partly` where some rows don't see all of them.
    template <int KEYS>
    __device__ __forceinline__ void attend(const Queries& queries, const Cached* keys, const Cached* values,
                                           int first, bool partly) {
        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < DIM / DEPTH; ++step) {
            const Left query = queries.at(step);
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; tile += 2) {
                Right key[2];
                load_keys(key, keys + tile * 8 * CACHED_STRIDE + step * DEPTH);
                multiply(score[tile], query, key[0]);
                multiply(score[tile + 1], query, key[1]);
            }
        }
#pragma unroll
        for (int tile = 0; tile < KEYS / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[tile][i] = softcapped(score[tile][i]);
        if (partly) mask<KEYS>(score, first);
        weigh<KEYS>(score);
#pragma unroll
        for (int step = 0; step < KEYS / DEPTH; ++step) {
            const Left weights = as_left(score, step);
#pragma unroll
            for (int tile = 0; tile < DIM / 8; tile += COLUMN_TILES) {
                Right value[COLUMN_TILES];
                load_values(value, values + step * DEPTH * CACHED_STRIDE + tile * 8);
#pragma unroll
                for (int i = 0; i < COLUMN_TILES; ++i)
                    if (tile + i < DIM / 8) multiply(mixed[tile + i], weights, value[i]);
            }
        }
    }

    template <int KEYS>
    __device__ __forceinline__ void mask(float (&score)[KEYS / 8][4], int first) const {
#pragma unroll
        for (int tile = 0; tile < KEYS / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first + tile * 8 + threadIdx.x % 4 * 2 + i % 2, at = position[i / 2];
                if (key > at || (LIMIT && key + LIMIT <= at)) score[tile][i] = -__int_as_float(0x7f800000);
            }
    }

    // Scores to weights, relative to the largest so far.
    template <int KEYS>
    __device__ __forceinline__ void weigh(float (&score)[KEYS / 8][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = largest[half];
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; ++tile)
                most = fmaxf(most, fmaxf(score[tile][2 * half], score[tile][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            const float kept = power_of_2(largest[half] - most);
            largest[half] = most;
            total[half] *= kept;
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; ++tile)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i)
                    total[half] += score[tile][i] = power_of_2(score[tile][i] - most);
#pragma unroll
            for (int tile = 0; tile < DIM / 8; ++tile)
                mixed[tile][2 * half] *= kept, mixed[tile][2 * half + 1] *= kept;
        }
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) total[half] = lanes_sum<4>(total[half]);
    }
};

// out [tokens of the pass, HEADS * HEAD_DIM].
// Grid (ceil(tokens * GROUP / PROMPT_ROWS), KV_HEADS, chunks); `tokens` of a chunk at most.
template <int LIMIT>
__device__ __forceinline__ void attend_prompt(Element* out, const Inputs& in, float scale, int tokens,
                                              const int* chunks) {
    constexpr int STAGE = 2 * PROMPT_KEYS * CACHED_STRIDE;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, kv_head = blockIdx.y;
    Cached* const ring = reinterpret_cast<Cached*>(shared_memory);
    // Queries that go to registers lie where the second stage of keys comes later, as far as they fit there.
    Element* const queries = reinterpret_cast<Element*>(ring + (HALF ? STAGE : 2 * STAGE));

    // The last rows have most to do: they begin first.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * PROMPT_ROWS;
    const Chunks pass{chunks, tokens};
    const int first_token = pass.first(blockIdx.z);
    const int rows = min(PROMPT_ROWS, pass.count(blockIdx.z) * GROUP - first_row);
    if (rows <= 0) return;  // of a chunk that is shorter than others
    // Consecutive tokens have consecutive positions.
    const int start = in.positions[first_token], lowest = start + first_row / GROUP;
    const int sequence = in.sequences[first_token], stop = start + (first_row + rows - 1) / GROUP + 1;
    const int oldest = LIMIT ? max(0, lowest + 1 - LIMIT) / PROMPT_KEYS * PROMPT_KEYS : 0;
    const int tiles = (stop - oldest + PROMPT_KEYS - 1) / PROMPT_KEYS;
    const auto copy_tile = [=](int tile) {
        Cached* stage = ring + tile % 2 * STAGE;
        if (tile < tiles)
            copy_rows<PROMPT_KEYS>(stage, stage + PROMPT_KEYS * CACHED_STRIDE, in, sequence, kv_head,
                                   oldest + tile * PROMPT_KEYS, stop, threadIdx.x, blockDim.x);
        copies_end();
    };
    copy_tile(0);
#pragma unroll 4
    for (int i = threadIdx.x; i < PROMPT_ROWS * VECTORS; i += PROMPT_WARPS * LANES) {
        const int row = min(i / VECTORS, rows - 1) + first_row, feature = i % VECTORS * VECTOR;
        const Features query =
            in.turned(first_token + row / GROUP, kv_head * GROUP + row % GROUP, feature, start + row / GROUP);
        store_query(queries + i / VECTORS * STRIDE, feature, query, scale * LOG2_E);
    }
    clear_query_padding(queries, PROMPT_ROWS, threadIdx.x, blockDim.x);
    __syncthreads();
    const Queries query(queries + warp * TILE_ROWS * STRIDE);
    __syncthreads();
    clear_padding(ring, 2 * 2 * PROMPT_KEYS, threadIdx.x, blockDim.x);

    SeenByRows<LIMIT> seen;
    const auto position_of = [=](int row) { return row < rows ? start + (first_row + row) / GROUP : -1; };
#pragma unroll
    for (int half = 0; half < 2; ++half) seen.position[half] = position_of(warp * TILE_ROWS + lane / 4 + 8 * half);
    const int warp_lowest = position_of(warp * TILE_ROWS);
    const int warp_highest = position_of(min(warp * TILE_ROWS + TILE_ROWS, rows) - 1);
    for (int tile = 0; tile < tiles; ++tile) {
        copy_tile(tile + 1);
        copies_wait<1>();
        __syncthreads();
        const int key = oldest + tile * PROMPT_KEYS;
        const Cached* stage = ring + tile % 2 * STAGE;
        const bool partly = key + PROMPT_KEYS - 1 > warp_lowest || (LIMIT && key + LIMIT <= warp_highest);
        if (warp * TILE_ROWS < rows && key <= warp_highest)
            seen.template attend<PROMPT_KEYS>(query, stage, stage + PROMPT_KEYS * CACHED_STRIDE, key, partly);
        __syncthreads();
    }
    seen.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * TILE_ROWS + lane / 4 + 8 * half;
        if (row >= rows) continue;
        const int token = first_token + (first_row + row) / GROUP;
        const long long query_index =
            static_cast<long long>(token) * HEADS + kv_head * GROUP + (first_row + row) % GROUP;
#pragma unroll
        for (int tile = 0; tile < DIM / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int feature = tile / 2 * 16 + feature_of_column(tile % 2, lane % 4 * 2 + i);
                if (feature < HEAD_DIM)
                    store(out + query_index * HEAD_DIM + feature, seen.mixed[tile][2 * half + i] / seen.total[half]);
            }
    }
}

extern "C" __global__ void __launch_bounds__(PROMPT_WARPS* LANES, PROMPT_RESIDENT)
    prompt_attention(Element* out, const float* qkv, Cached* keys, Cached* values, const float* cosines,
                     const float* sines, const int* positions, const int* sequences, const int* table,
                     int most_pages, float scale, int tokens, const int* chunks) {
    const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, table, most_pages};
    attend_prompt<WINDOW>(out, in, scale, tokens, chunks);
}

#if WINDOWS_DIFFER
extern "C" __global__ void __launch_bounds__(PROMPT_WARPS* LANES, PROMPT_RESIDENT)
    prompt_attention_of_all(Element* out, const float* qkv, Cached* keys, Cached* values, const float* cosines,
                            const float* sines, const int* positions, const int* sequences, const int* table,
                            int most_pages, float scale, int tokens, const int* chunks) {
    const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, table, most_pages};
    attend_prompt<0>(out, in, scale, tokens, chunks);
}
#endif
