// Attention of a step over the cache in place: rotates, appends, attends. The positions of the tokens are
// read from device memory, so that one CUDA graph serves every position: the grid is that of the longest
// cache, and thread blocks that a short one doesn't need leave.
#include "tiles.cuh"
#include "words.cuh"

constexpr int STEP_QUERIES = 8;        // of a thread block
constexpr int STEP_KEYS = 16;          // of a warp at a time
constexpr int PARTIAL = HEAD_DIM + 2;  // largest, total, weighted values

// Warps of a thread block: as many as shared memory is for, with rows of so many bytes.
template <int BYTES, int MOST>
constexpr int FITTING_WARPS = BYTES / ROW_BYTES == 0     ? 1
                              : BYTES / ROW_BYTES > MOST ? MOST
                                                         : BYTES / ROW_BYTES;

// How a thread block goes through the keys.
//   WARPS     that take STEP_KEYS each at a time
//   STAGES    of a warp's keys in shared memory, all but one of them on their way
//   RESIDENT  thread blocks that a multiprocessor must have registers for
//   KEYS      that a thread block takes by itself before others help (bench/NOTES.md)
//   TOLD      whether what thread blocks have seen is combined by `Told`, or by the last to finish
struct Narrow {
    static constexpr int WARPS = FITTING_WARPS<1024, 4>, STAGES = 3, KEYS = 192;
    // Few enough registers that a thread block fits beside the matrix-vector product before it (linear.cu),
    // so that it is there, with its first keys and values, when that ends.
    static constexpr int RESIDENT = HALF && ROW_BYTES <= 256 ? 5 : 1;
    static constexpr bool TOLD = false;
};
// Where thread blocks are so few that all of them find room at once, so that one may wait for others.
struct Wide {
    static constexpr int WARPS = FITTING_WARPS<1024, 8>, STAGES = 2, KEYS = 128, RESIDENT = 1;
    static constexpr bool TOLD = true;
};

// Keys and values of a pass's tokens, where any chunk is longer than those that `attention` appends; not of
// those without a sequence, which only fill a pass up. Grid (tokens, what it takes).
extern "C" __global__ void append(const float* qkv, Cached* keys, Cached* values, const float* cosines,
                                  const float* sines, const int* positions, const int* sequences,
                                  const int* table, int most_pages) {
    wait_for_previous();
    const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, table, most_pages};
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= KV_HEADS * VECTORS || sequences[blockIdx.x] < 0) return;
    const int token = blockIdx.x, kv_head = i / VECTORS, feature = i % VECTORS * VECTOR,
              position = positions[token];
    const long long at = in.place(sequences[token], kv_head, position) + feature;
    store_features(keys + at, in.turned(token, HEADS + kv_head, feature, position));
    store_features(values + at, in.value(token, kv_head, feature));
}

// Combines parts [count][stride] for one feature: largest, total, weighted value.
struct Combined {
    float largest = NONE, total = 0.0f, mixed = 0.0f;

    __device__ Combined() {}
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

// How a row's thread blocks, each with a split of the keys, tell the last split's of what they have seen.
// That one waits for words instead of counting who has finished: neither fences nor reading again come after
// it.
struct Told {
    static constexpr int SPLITS = 8;  // at most

    Word* words;    // [SPLITS, STEP_QUERIES, PARTIAL] of the row
    unsigned turn;  // of the row, from 1 on: a launch has it that has several splits of the row
    int last;       // split

    __device__ __forceinline__ Word* of(int split, int query) const {
        return words + (split * STEP_QUERIES + query) * PARTIAL;
    }

    __device__ __forceinline__ void tell(int split, int query, int feature, const Combined& seen) const {
        Word* to = of(split, query);
        if (feature == 0) {
            store_word(to, word(seen.largest, turn));
            store_word(to + 1, word(seen.total, turn));
        }
        store_word(to + 2 + feature, word(seen.mixed, turn));
    }

    // All splits' of one feature, given the last one's.
    __device__ __forceinline__ Combined all(int query, int feature, const Combined& own) const {
        Word found[SPLITS - 1][3];
#pragma unroll
        for (int split = 0; split < SPLITS - 1; ++split)
#pragma unroll
            for (int i = 0; i < 3; ++i)
                found[split][i] = split < last ? load_word(of(split, query) + (i < 2 ? i : 2 + feature)) : 0;
        float largest = own.largest;
#pragma unroll
        for (int split = 0; split < SPLITS - 1; ++split) {
            if (split >= last) continue;
#pragma unroll
            for (int i = 0; i < 3; ++i)
                while (!belongs_to(found[split][i], turn))
                    found[split][i] = load_word(of(split, query) + (i < 2 ? i : 2 + feature));
            largest = fmaxf(largest, float_of(found[split][0]));
        }
        Combined result;
        result.largest = largest;
#pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
            if (split > last) continue;
            const bool other = split < last;
            const int from = split < SPLITS - 1 ? split : 0;
            const float weight = power_of_2((other ? float_of(found[from][0]) : own.largest) - largest);
            result.total += weight * (other ? float_of(found[from][1]) : own.total);
            result.mixed += weight * (other ? float_of(found[from][2]) : own.mixed);
        }
        return result;
    }
};

// The queries as right operands: in registers, where they fit there.
struct ColumnQueries {
#if HALF
    Right steps[DIM / DEPTH];

    __device__ __forceinline__ explicit ColumnQueries(const Element* rows) {
#pragma unroll
        for (int step = 0; step < DIM / DEPTH; ++step) steps[step] = load_right(rows + step * DEPTH);
    }
    __device__ __forceinline__ Right at(int step) const {
        return steps[step];
    }
#else
    const Element* rows;

    __device__ __forceinline__ explicit ColumnQueries(const Element* rows) : rows(rows) {}
    __device__ __forceinline__ Right at(int step) const {
        return load_right(rows + step * DEPTH);
    }
#endif
};

// What a warp has seen for its queries, which are the columns of its products: keys times queries, and
// features of values times weights. A lane holds of every 8 rows lane / 4, columns 2 (lane % 4) and the next.
// Of queries that see LIMIT keys at most; 0 for all.
template <int LIMIT>
struct SeenByColumns {
    int position[2];                  // of the queries; -1 where there is none
    float largest[2] = {NONE, NONE};  // score, in powers of 2
    float total[2] = {};              // of 2^(score - largest), this lane's part
    float mixed[DIM / 16][4] = {};    // values weighted by it

    // Attends to STEP_KEYS keys from `first` on; `partly` where some queries don't see all of them.
    __device__ __forceinline__ void attend(const ColumnQueries& queries, const Cached* keys,
                                           const Cached* values, int first, bool partly) {
        float score[4] = {}, other[4] = {};  // two sums, as each product waits for the one before
#pragma unroll
        for (int step = 0; step < DIM / DEPTH; step += 2) {
            multiply(score, load_left_keys(keys + step * DEPTH), queries.at(step));
            if (step + 1 < DIM / DEPTH)
                multiply(other, load_left_keys(keys + (step + 1) * DEPTH), queries.at(step + 1));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            score[i] = softcapped(score[i] + other[i]);
            const int key = first + threadIdx.x % LANES / 4 + i / 2 * 8, at = position[i % 2];
            if (partly && (key > at || (LIMIT && key + LIMIT <= at))) score[i] = -__int_as_float(0x7f800000);
        }
        weigh(score);
#pragma unroll
        for (int step = 0; step < STEP_KEYS / DEPTH; ++step) {
            const Right weights = as_right(score, step);
#pragma unroll
            for (int tile = 0; tile < DIM / 16; tile += ROW_TILES) {
                Left value[ROW_TILES];
                load_left_values(value, values + step * DEPTH * CACHED_STRIDE + tile * 16);
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i)
                    if (tile + i < DIM / 16) multiply(mixed[tile + i], value[i], weights);
            }
        }
    }

    // Scores to weights, relative to the largest so far.
    __device__ __forceinline__ void weigh(float (&score)[4]) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            float most = fmaxf(largest[column], fmaxf(score[column], score[column + 2]));
#pragma unroll
            for (int offset = 4; offset < LANES; offset *= 2)
                most = fmaxf(most, __shfl_xor_sync(ALL, most, offset));
            const float kept = power_of_2(largest[column] - most);
            largest[column] = most;
            score[column] = power_of_2(score[column] - most);
            score[column + 2] = power_of_2(score[column + 2] - most);
            total[column] = total[column] * kept + score[column] + score[column + 2];
#pragma unroll
            for (int tile = 0; tile < DIM / 16; ++tile)
                mixed[tile][column] *= kept, mixed[tile][column + 2] *= kept;
        }
    }

    // Writes parts [queries][PARTIAL].
    __device__ __forceinline__ void write(float* parts, int queries) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int column = 0; column < 2; ++column) {
#pragma unroll
            for (int offset = 4; offset < LANES; offset *= 2)
                total[column] += __shfl_xor_sync(ALL, total[column], offset);
            const int query = lane % 4 * 2 + column;
            if (query >= queries) continue;
            float* part = parts + query * PARTIAL;
            if (lane / 4 == 0) part[0] = largest[column], part[1] = total[column];
#pragma unroll
            for (int tile = 0; tile < DIM / 16; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int feature = tile * 16 + feature_of_row(half * 8 + lane / 4);
                    if (feature < HEAD_DIM) part[2 + feature] = mixed[tile][2 * half + column];
                }
        }
    }
};

// out [tokens of the pass, HEADS * HEAD_DIM] from qkv and the cache.
// Grid (splits, KV_HEADS * ceil(tokens * GROUP / STEP_QUERIES), chunks): each split takes a part of the keys,
// the last to finish combines.
//   tokens    of a chunk at most
//   most_new  of chunks that are appended here, at most 8; longer ones are by `append` before. Where it is
//             more than one, a token gets the same with others beside it, as far as KEYS reach
//   chunks    see Chunks
//   parts     [chunks * tokens, HEADS, splits, PARTIAL] where splits > 1; of Told, [gridDim.z, gridDim.y]
//             rows of words, zero before the first launch
//   finished  [gridDim.z, gridDim.y] zero before and after; of Told, zero before the first launch
template <class Way, int LIMIT>
__device__ __forceinline__ void attend_step(Element* out, const Inputs& in, float scale, int tokens,
                                            int most_new, const int* chunks, float* parts,
                                            unsigned* finished) {
    constexpr int WARPS = Way::WARPS, STAGES = Way::STAGES, KEYS = Way::KEYS;
    constexpr int THREADS = WARPS * LANES, STAGE = 2 * STEP_KEYS * CACHED_STRIDE;
    constexpr int CHUNKS = DIM / CACHED_WIDE;  // of a row
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    Element* const queries = reinterpret_cast<Element*>(shared_memory);
    // Each new key and its value.
    Cached* const fresh = reinterpret_cast<Cached*>(queries + STEP_QUERIES * STRIDE);
    Cached* const rings = fresh + 2 * most_new * CACHED_STRIDE;
    Cached* const ring = rings + warp * STAGES * STAGE;

    const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y % KV_HEADS;
    const int first_query = blockIdx.y / KV_HEADS * STEP_QUERIES;
    const Chunks pass{chunks, tokens};
    const int first_token = pass.first(blockIdx.z), new_tokens = pass.count(blockIdx.z);
    const int count = min(STEP_QUERIES, new_tokens * GROUP - first_query);
    if (count <= 0) {  // of a chunk that is shorter than others
        wait_for_previous();
        return;
    }
    // Consecutive tokens have consecutive positions.
    const int start = in.positions[first_token], sequence = in.sequences[first_token];
    const int lowest = start + first_query / GROUP, highest = start + (first_query + count - 1) / GROUP;
    const int whole = most_new > 1 ? KEYS : STEP_KEYS;
    const int oldest = LIMIT ? max(0, lowest + 1 - LIMIT) / whole * whole : 0;
    const int seen_keys = highest + 1 - oldest;
    // Whole steps, so that no split sees keys of another; of a model whose tokens get the same with others
    // beside them, splits end where they do for every token.
    int active = min(splits, (seen_keys + KEYS - 1) / KEYS);
    const int each = (seen_keys + active * whole - 1) / (active * whole) * whole;
    active = (seen_keys + each - 1) / each;
    if (split >= active) {  // not before the one before has ended: who waits for this one counts on that
        wait_for_previous();
        return;
    }
    const int first = oldest + split * each, stop = min(first + each, highest + 1);
    // Of the keys that this thread block sees, those from here on are new ones, which it appends: all thread
    // blocks that see one write the same.
    const int newest = new_tokens <= most_new ? min(max(first, start), stop) : stop;

    const auto copy_step = [=](int step) {
        const int key = first + (step * WARPS + warp) * STEP_KEYS;
        Cached* stage = ring + step % STAGES * STAGE;
        if (key < stop)
            copy_rows<STEP_KEYS>(stage, stage + STEP_KEYS * CACHED_STRIDE, in, sequence, kv_head, key, stop,
                                 lane, LANES);
        copies_end();
    };
    // Older keys and values don't depend on the kernel before.
#pragma unroll
    for (int step = 0; step < STAGES; ++step) copy_step(step);
    clear_padding(ring, STAGES * 2 * STEP_KEYS, lane, LANES);
    clear_padding(fresh, 2 * most_new, threadIdx.x, THREADS);
    for (int i = threadIdx.x; i < STEP_QUERIES * STRIDE; i += THREADS) store(queries + i, 0.0f);
    __syncthreads();
    wait_for_previous();
    let_next_start();
    const bool not_wanted = is_called_off();  // comes while the queries do
    const int row = blockIdx.z * gridDim.y + blockIdx.y;
    unsigned* const counter = finished + row;
    Told told{nullptr, 0, active - 1};
    if (Way::TOLD && active > 1) {
        told.words = reinterpret_cast<Word*>(parts) + row * (Told::SPLITS * STEP_QUERIES * PARTIAL);
        told.turn = ::fresh(counter) + 1;
    }
    // Rows of the queries, then of each new key and its value.
    for (int i = threadIdx.x; i < (count + 2 * (stop - newest)) * VECTORS; i += THREADS) {
        const int row = i / VECTORS, feature = i % VECTORS * VECTOR, later = row - count;
        const int query = first_query + row,
                  position = later < 0 ? start + query / GROUP : newest + later / 2;
        const int token = first_token + position - start;
        const int head = later < 0 ? kv_head * GROUP + query % GROUP : HEADS + kv_head;
        const bool is_value = later >= 0 && later % 2;
        const Features loaded =
            is_value ? in.value(token, kv_head, feature) : in.turned(token, head, feature, position);
        if (later < 0) {
            store_query(queries + row * STRIDE, feature, loaded, scale * LOG2_E);
        } else {
            store_features(fresh + later * CACHED_STRIDE + feature, loaded);
            store_features((is_value ? in.values : in.keys) + in.place(sequence, kv_head, position) + feature,
                           loaded);
        }
    }
    // Some may be called off where others are not: all are counted, and heard.
    if (__syncthreads_or(not_wanted)) {
        copies_wait<0>();
        if (active == 1) return;
        for (int i = threadIdx.x; Way::TOLD && i < count * HEAD_DIM; i += THREADS) {
            if (split < told.last)
                told.tell(split, i / HEAD_DIM, i % HEAD_DIM, Combined());
            else
                told.all(i / HEAD_DIM, i % HEAD_DIM, Combined());
        }
        if (threadIdx.x == 0) {
            if (!Way::TOLD)
                atomicInc(counter, active - 1);
            else if (split == told.last)
                *counter = told.turn;
        }
        return;
    }

    const ColumnQueries query(queries);
    SeenByColumns<LIMIT> seen;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
        const int index = lane % 4 * 2 + column;
        seen.position[column] = index < count ? start + (first_query + index) / GROUP : -1;
    }
    for (int step = 0, key = first + warp * STEP_KEYS; key < stop; ++step, key += WARPS * STEP_KEYS) {
        Cached* stage = ring + step % STAGES * STAGE;
        copies_wait<STAGES - 1>();
        __syncwarp();
        if (newest < min(key + STEP_KEYS, stop)) {
            const int begin = max(key, newest), rows = 2 * (min(key + STEP_KEYS, stop) - begin);
            for (int i = lane; i < rows * CHUNKS; i += LANES) {
                const int row = i / CHUNKS, feature = i % CHUNKS * CACHED_WIDE;
                Cached* to = stage + (row % 2 * STEP_KEYS + begin - key + row / 2) * CACHED_STRIDE + feature;
                const Cached* from = fresh + (2 * (begin - newest) + row) * CACHED_STRIDE + feature;
                *reinterpret_cast<CachedChunk*>(to) = *reinterpret_cast<const CachedChunk*>(from);
            }
            __syncwarp();
        }
        const bool partly = key + STEP_KEYS - 1 > lowest || (LIMIT && key + LIMIT <= highest);
        seen.attend(query, stage, stage + STEP_KEYS * CACHED_STRIDE, key, partly);
        __syncwarp();
        copy_step(step + STAGES);
    }
    copies_wait<0>();
    __syncthreads();  // the stages' memory is used again

    float* const by_warp = reinterpret_cast<float*>(rings);  // [WARPS, STEP_QUERIES, PARTIAL]
    seen.write(by_warp + warp * STEP_QUERIES * PARTIAL, count);
    __syncthreads();
    // A query of this thread block among all, its chunk's first token being the `first`th.
    const auto index_of = [=](int query, int first) {
        query += first_query;
        return static_cast<long long>(first + query / GROUP) * HEADS + kv_head * GROUP + query % GROUP;
    };
    const int first_part = blockIdx.z * tokens;
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
        const int query = i / HEAD_DIM, feature = i % HEAD_DIM;
        const Combined all(by_warp + query * PARTIAL, STEP_QUERIES * PARTIAL, WARPS, feature);
        if (Way::TOLD && split < told.last) {
            told.tell(split, query, feature, all);
            continue;
        }
        if (active == 1 || Way::TOLD) {
            const Combined whole = active == 1 ? all : told.all(query, feature, all);
            store(out + index_of(query, first_token) * HEAD_DIM + feature, whole.mixed / whole.total);
            continue;
        }
        float* part = parts + (index_of(query, first_part) * splits + split) * PARTIAL;
        if (feature == 0) part[0] = all.largest, part[1] = all.total;
        part[2 + feature] = all.mixed;
    }
    if (active == 1) return;
    if (Way::TOLD) {  // all have asked for the turn before they told what this thread has waited for
        if (split == told.last && threadIdx.x == 0) *counter = told.turn;
        return;
    }
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what the barrier has shown this thread is seen by whoever sees the count
        is_last = atomicInc(counter, active - 1) == active - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
        const int query = i / HEAD_DIM, feature = i % HEAD_DIM;
        const Combined all(parts + index_of(query, first_part) * splits * PARTIAL, PARTIAL, active, feature);
        store(out + index_of(query, first_token) * HEAD_DIM + feature, all.mixed / all.total);
    }
}

#define FOR_WAY(WAY, NAME, LIMIT)                                                                         \
    extern "C" __global__ void __launch_bounds__(WAY::WARPS* LANES, WAY::RESIDENT) NAME(                  \
        Element* out, const float* qkv, Cached* keys, Cached* values, const float* cosines,               \
        const float* sines, const int* positions, const int* sequences, const int* table, int most_pages, \
        float scale, int tokens, int most_new, const int* chunks, float* parts, unsigned* finished) {     \
        const Inputs in{qkv, keys, values, cosines, sines, positions, sequences, table, most_pages};      \
        attend_step<WAY, LIMIT>(out, in, scale, tokens, most_new, chunks, parts, finished);               \
    }

FOR_WAY(Narrow, attention, WINDOW)
FOR_WAY(Wide, wide_attention, WINDOW)
#if WINDOWS_DIFFER
FOR_WAY(Narrow, attention_of_all, 0)
FOR_WAY(Wide, wide_attention_of_all, 0)
#endif
#undef FOR_WAY
