// Token ids to hidden states, and what prepares weights once.
#include "common.cuh"

// hidden [tokens, features] fp32 = table[ids] (+ learned[positions]). Grid (tokens).
// Ids and positions may lie in the host's memory; the kernels after this one read `positions_out`. A token
// that follows another is `steps` further on. An id below 0 is a place: -1 is the first of `chosen`.
extern "C" __global__ void embed(float* hidden, const Element* table, const Element* learned, const int* ids,
                                 const int* positions, int* positions_out, int steps, int features, const int* chosen) {
    let_next_start();  // to load weights
    wait_for_previous();
    const long long token = blockIdx.x;
    const int named = *const_cast<const volatile int*>(ids + token);
    const int id = named < 0 ? fresh(chosen - 1 - named) : named;
    const int position = *const_cast<const volatile int*>(positions + token) + steps;
    __syncthreads();  // it may be what is written
    if (threadIdx.x == 0) positions_out[token] = position;
    const Element* row = table + static_cast<long long>(id) * features;
    const Element* place = learned ? learned + static_cast<long long>(position) * features : nullptr;
    for (int i = threadIdx.x; i < features; i += blockDim.x)
        hidden[token * features + i] = to_float(row[i]) + (place ? to_float(place[i]) : 0.0f);
}

// out [columns, rows] = in [rows, columns] transposed. Grid (columns / 32, rows / 32), block (32, 8).
extern "C" __global__ void transpose(Element* out, const Element* in, int rows, int columns) {
    __shared__ Element tile[32][33];
    const int column = blockIdx.x * 32 + threadIdx.x;
    for (int i = threadIdx.y; i < 32; i += blockDim.y) {
        const int row = blockIdx.y * 32 + i;
        if (row < rows && column < columns) tile[i][threadIdx.x] = in[static_cast<long long>(row) * columns + column];
    }
    __syncthreads();
    const int row = blockIdx.y * 32 + threadIdx.x;
    for (int i = threadIdx.y; i < 32; i += blockDim.y) {
        const int to = blockIdx.x * 32 + i;
        if (row < rows && to < columns) out[static_cast<long long>(to) * rows + row] = tile[threadIdx.x][i];
    }
}
