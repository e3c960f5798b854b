// What a draft layer needs beside the kernels of a block: the states that it sees, both of its norms, and names of
// the tokens that it drafts.
#include "common.cuh"

constexpr int SEE_THREADS = 256;

// x [tokens, depths * features] = the states that were kept of the tokens, side by side, rounded; kept
// [depths, sequences, capacity, features]. Grid (tokens, depths). Zeros for tokens that only fill a pass up.
// Positions may lie in the host's memory; the kernels after this one read `positions_out`.
extern "C" __global__ void __launch_bounds__(SEE_THREADS)
    side_by_side(Element* x, const float* kept, const int* positions, int* positions_out, const int* sequences,
                 int slots, int capacity, int features) {
    let_next_start();  // to load weights
    wait_for_previous();
    const long long token = blockIdx.x, depth = blockIdx.y;
    const int position = *const_cast<const volatile int*>(positions + token), sequence = fresh(sequences + token);
    if (threadIdx.x == 0 && depth == 0) positions_out[token] = position;
    const float* from = kept + ((depth * slots + max(sequence, 0)) * capacity + position) * features;
    Element* to = x + (token * gridDim.y + depth) * features;
    for (int i = threadIdx.x; i < features; i += SEE_THREADS) store(to + i, sequence < 0 ? 0.0f : fresh(from + i));
}

// seen [tokens, 2 features] = the norm of each next token's embedding, then that of the memory, rounded; hidden =
// memory [tokens, features], which may be the same place. Grid (tokens, 2).
// The next token is names[id] where there are names, else the id. Where `named` is, it goes there, `stride` numbers
// after that of the token before. Positions are `steps` further on.
extern "C" __global__ void __launch_bounds__(SEE_THREADS)
    see(Element* seen, float* hidden, const float* memory, const Element* table, const float* embedding_norm,
        const float* state_norm, float epsilon, const int* ids, const int* names, int* named, int stride,
        const int* positions, int* positions_out, int steps, int features) {
    let_next_start();  // to load weights
    wait_for_previous();
    const long long token = blockIdx.x;
    const bool is_memory = blockIdx.y;
    const float* state = memory + token * features;
    const Element* row = table;
    if (!is_memory) {
        int id = *const_cast<const volatile int*>(ids + token);
        if (names) id = names[id];
        if (named && threadIdx.x == 0) named[token * stride] = id;
        row += static_cast<long long>(id) * features;
    } else if (threadIdx.x == 0) {
        positions_out[token] = *const_cast<const volatile int*>(positions + token) + steps;
    }
    const auto value = [=](int i) { return is_memory ? fresh(state + i) : to_float(row[i]); };
    float square = 0.0f;
    for (int i = threadIdx.x; i < features; i += SEE_THREADS) square += value(i) * value(i);
    const float scale = 1.0f / sqrtf(block_sum(square) / features + epsilon);
    const float* weight = is_memory ? state_norm : embedding_norm;
    Element* to = seen + (token * 2 + blockIdx.y) * features;
    for (int i = threadIdx.x; i < features; i += SEE_THREADS) {
        const float x = value(i);
        store(to + i, x * scale * weight[i]);
        if (is_memory && hidden != memory) hidden[token * features + i] = x;
    }
}

// named[row * stride] = names[ids[row]], or ids[row] without names. One thread block, a thread for each row.
extern "C" __global__ void name_tokens(int* named, const int* ids, const int* names, int stride) {
    let_next_start();
    wait_for_previous();
    const int id = *const_cast<const volatile int*>(ids + threadIdx.x);
    named[threadIdx.x * stride] = names ? names[id] : id;
}
