// Attention over the cache in place: rotates, appends, attends. The positions of the tokens are
// read from device memory, so that one CUDA graph serves every position.
//
// Cache of a block: keys and values [sequences, KV_HEADS, capacity, HEAD_DIM].
#include "common.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

__host__ __device__ constexpr int power_of_two(int least) {
    int value = 1;
    while (value < least) value *= 2;
    return value;
}

// Lanes that share a key, each with PIECES chunks of its features; a warp reads several keys at once.
constexpr int KEY_CHUNKS = HEAD_DIM / WIDE;
constexpr int KEY_LANES = KEY_CHUNKS < LANES ? power_of_two(KEY_CHUNKS) : LANES;
constexpr int PIECES = (KEY_CHUNKS + KEY_LANES - 1) / KEY_LANES;
constexpr int ATTENTION_THREADS = 128;
constexpr int TEAMS = ATTENTION_THREADS / KEY_LANES;
constexpr int AHEAD = 4;  // keys that a team loads before it uses the first
constexpr int PARTIAL = HEAD_DIM + 2;

// Feature `i` of a head, rotated with its partner half of ROTARY_DIM away, as transformers lays them out.
__device__ __forceinline__ float rotated(const float* head, int i, const float* cosines, const float* sines) {
    constexpr int HALF_DIM = ROTARY_DIM / 2;
    if (i >= ROTARY_DIM) return head[i];
    if (i < HALF_DIM) return head[i] * cosines[i] - head[i + HALF_DIM] * sines[i];
    return head[i] * cosines[i - HALF_DIM] + head[i - HALF_DIM] * sines[i - HALF_DIM];
}

// Writes a token's key and value of one head to its place in the cache, by a whole thread block.
__device__ void append_head(const float* qkv, int kv_head, long long place, Element* keys, Element* values,
                            const float* cosines, const float* sines) {
    const float* key = qkv + (HEADS + kv_head) * HEAD_DIM;
    const float* value = qkv + (HEADS + KV_HEADS + kv_head) * HEAD_DIM;
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        store(keys + place * HEAD_DIM + i, rotated(key, i, cosines, sines));
        store(values + place * HEAD_DIM + i, value[i]);
    }
}

__device__ __forceinline__ long long cache_place(int sequence, int kv_head, int capacity, int position) {
    return (static_cast<long long>(sequence) * KV_HEADS + kv_head) * capacity + position;
}

// Keys and values of several tokens of a sequence, before any of them attends.
// Grid (KV_HEADS, tokens).
extern "C" __global__ void append(const float* qkv, Element* keys, Element* values, const float* cosines,
                                  const float* sines, const int* positions, const int* sequences, int capacity) {
    const int token = blockIdx.y, position = positions[token];
    append_head(qkv + static_cast<long long>(token) * QKV_WIDTH, blockIdx.x,
                cache_place(sequences[token], blockIdx.x, capacity, position), keys, values,
                cosines + position * (ROTARY_DIM / 2), sines + position * (ROTARY_DIM / 2));
}

// What a team or a split has seen of one query: the largest score, the sum of exponentials relative
// to it, and the values weighted by them.
struct Seen {
    float largest = -1e30f, total = 0.0f;
    float mixed[PIECES * WIDE] = {};
};

__device__ __forceinline__ float query_dot(const float* query, const Chunk (&key)[PIECES], int lane) {
    float dot = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
#pragma unroll
        for (int i = 0; i < WIDE; ++i) dot += query[piece * WIDE + i] * to_float(key[piece].values[i]);
    return lanes_sum<KEY_LANES>(dot);
}

__device__ __forceinline__ void load_row(Chunk (&row)[PIECES], const Element* from, int lane) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int chunk = piece * KEY_LANES + lane;
        if (chunk < KEY_CHUNKS) {
            row[piece] = load(from + chunk * WIDE);
        } else {
#pragma unroll
            for (int i = 0; i < WIDE; ++i) store(&row[piece].values[i], 0.0f);
        }
    }
}

__device__ __forceinline__ void see(Seen& seen, float score, const Chunk (&value)[PIECES]) {
    const float largest = fmaxf(seen.largest, score);
    const float kept = __expf(seen.largest - largest), weight = __expf(score - largest);
    seen.largest = largest;
    seen.total = seen.total * kept + weight;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
#pragma unroll
        for (int i = 0; i < WIDE; ++i)
            seen.mixed[piece * WIDE + i] = seen.mixed[piece * WIDE + i] * kept + weight * to_float(value[piece].values[i]);
}

// Combines parts [count][PARTIAL] (largest, total, weighted values) and writes one head's result.
__device__ void combine(const float* parts, int count, Element* out) {
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        float largest = -1e30f;
        for (int part = 0; part < count; ++part) largest = fmaxf(largest, parts[part * PARTIAL]);
        float total = 0.0f, mixed = 0.0f;
        for (int part = 0; part < count; ++part) {
            const float* each = parts + part * PARTIAL;
            const float weight = __expf(each[0] - largest);
            total += weight * each[1];
            mixed += weight * each[2 + i];
        }
        store(out + i, mixed / total);
    }
}

// out [tokens, HEADS * HEAD_DIM] from qkv [tokens, QKV_WIDTH] and the cache.
// Grid (splits, KV_HEADS, tokens): each split takes a part of the keys, the last to finish combines.
//   parts     [tokens, HEADS, splits, PARTIAL] where splits > 1
//   finished  [tokens, KV_HEADS] zero before and after
//   appending whether this kernel also appends, right only where every sequence has one token
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention(Element* out, const float* qkv, Element* keys, Element* values, const float* cosines,
              const float* sines, const int* positions, const int* sequences, int capacity, float scale,
              float* parts, unsigned* finished, int appending) {
    __shared__ float shared_parts[GROUP][TEAMS][PARTIAL];
    __shared__ float queries[GROUP][HEAD_DIM];
    __shared__ unsigned is_last;
    const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, token = blockIdx.z;
    const int team = threadIdx.x / KEY_LANES, lane = threadIdx.x % KEY_LANES;
    const int position = positions[token], sequence = sequences[token];
    const float* cosine = cosines + position * (ROTARY_DIM / 2);
    const float* sine = sines + position * (ROTARY_DIM / 2);
    qkv += static_cast<long long>(token) * QKV_WIDTH;
    const int oldest = WINDOW ? max(0, position + 1 - WINDOW) : 0;
    const int each = (position + 1 - oldest + splits - 1) / splits;
    const int first = oldest + split * each, stop = min(first + each, position + 1);
    const long long base = cache_place(sequence, kv_head, capacity, 0);
    // Older keys and values don't depend on the kernel before.
    constexpr int LINE = 128 / sizeof(Element);
    for (int at = threadIdx.x * LINE; at < (stop - first) * HEAD_DIM; at += ATTENTION_THREADS * LINE) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + (base + first) * HEAD_DIM + at));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(values + (base + first) * HEAD_DIM + at));
    }
    wait_for_previous();
    let_next_start();
    const bool not_wanted = is_called_off();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += blockDim.x)
        queries[i / HEAD_DIM][i % HEAD_DIM] =
            scale * rotated(qkv + (kv_head * GROUP + i / HEAD_DIM) * HEAD_DIM, i % HEAD_DIM, cosine, sine);
    if (appending && first <= position && position < stop)
        append_head(qkv, kv_head, cache_place(sequence, kv_head, capacity, position), keys, values, cosine, sine);
    __syncthreads();
    if (not_wanted) return;

    float query[GROUP][PIECES * WIDE];
#pragma unroll
    for (int head = 0; head < GROUP; ++head)
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
#pragma unroll
            for (int i = 0; i < WIDE; ++i) {
                const int feature = (piece * KEY_LANES + lane) * WIDE + i;
                query[head][piece * WIDE + i] = feature < HEAD_DIM ? queries[head][feature] : 0.0f;
            }
    Seen seen[GROUP];
    for (int at = first; at < stop; at += TEAMS * AHEAD) {
        Chunk key[AHEAD][PIECES], value[AHEAD][PIECES];
#pragma unroll
        for (int step = 0; step < AHEAD; ++step) {  // beyond the end the last key is read again, unused
            const long long row = (base + min(at + step * TEAMS + team, stop - 1)) * HEAD_DIM;
            load_row(key[step], keys + row, lane);
            load_row(value[step], values + row, lane);
        }
#pragma unroll
        for (int step = 0; step < AHEAD; ++step)
#pragma unroll
            for (int head = 0; head < GROUP; ++head) {
                const float score = query_dot(query[head], key[step], lane);
                if (at + step * TEAMS + team < stop) see(seen[head], score, value[step]);
            }
    }
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        float* part = shared_parts[head][team];
        if (lane == 0) part[0] = seen[head].largest, part[1] = seen[head].total;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
#pragma unroll
            for (int i = 0; i < WIDE; ++i) {
                const int feature = (piece * KEY_LANES + lane) * WIDE + i;
                if (feature < HEAD_DIM) part[2 + feature] = seen[head].mixed[piece * WIDE + i];
            }
    }
    __syncthreads();
    Element* target = out + (static_cast<long long>(token) * HEADS + kv_head * GROUP) * HEAD_DIM;
    if (splits == 1) {
        for (int head = 0; head < GROUP; ++head) combine(shared_parts[head][0], TEAMS, target + head * HEAD_DIM);
        return;
    }
    parts += (static_cast<long long>(token) * HEADS + kv_head * GROUP) * splits * PARTIAL;
    for (int i = threadIdx.x; i < GROUP * PARTIAL; i += blockDim.x) {
        const int head = i / PARTIAL, entry = i % PARTIAL;
        float largest = -1e30f, sum = 0.0f;
        for (int each_team = 0; each_team < TEAMS; ++each_team)
            largest = fmaxf(largest, shared_parts[head][each_team][0]);
        for (int each_team = 0; each_team < TEAMS; ++each_team) {
            const float* part = shared_parts[head][each_team];
            sum += __expf(part[0] - largest) * part[max(entry, 1)];
        }
        parts[(head * splits + split) * PARTIAL + entry] = entry ? sum : largest;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(finished + token * KV_HEADS + kv_head, splits - 1) == splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int head = 0; head < GROUP; ++head) combine(parts + head * splits * PARTIAL, splits, target + head * HEAD_DIM);
}
