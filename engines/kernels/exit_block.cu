// What a block behind an exit needs beside the kernels of a block: its input, which the exit's scale and
// shift make of the model's states.
#include "common.cuh"

constexpr int SCALE_THREADS = 256;

// y [tokens, features] = x * scale + shift, which may be in place. Grid (tokens).
extern "C" __global__ void __launch_bounds__(SCALE_THREADS)
    scale_and_shift(float* y, const float* x, const float* scale, const float* shift, int features) {
    let_next_start();  // to load weights
    wait_for_previous();
    const long long first = static_cast<long long>(blockIdx.x) * features;
    for (int i = threadIdx.x; i < features; i += SCALE_THREADS)
        y[first + i] = fresh(x + first + i) * scale[i] + shift[i];
}
