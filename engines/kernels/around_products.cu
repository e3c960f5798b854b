// What a pass of more tokens does before and after products that are made elsewhere: the norm before, activation
// and gate after.
#include "activation.cuh"

constexpr int NORM_THREADS = 512;
constexpr int ACTIVATE_THREADS = 256;

// Grid (tokens). x [tokens, columns] = norm(hidden [tokens, width]), rounded, zeros from `width` on. Without a
// weight it is x / rms.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    normalize(Element* x, const float* hidden, const float* norm_weight, const float* norm_bias,
              float epsilon, int width, int columns) {
    let_next_start();  // to load weights
    wait_for_previous();
    hidden += static_cast<long long>(blockIdx.x) * width;
    x += static_cast<long long>(blockIdx.x) * columns;
    float mean = 0.0f, square = 0.0f;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        const float value = fresh(hidden + i);
        mean += value;
        square += value * value;
    }
#if NORM_LAYER
    if (norm_weight) {
        mean = block_sum(mean) / width;
        square = 0.0f;
        for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
            const float centred = fresh(hidden + i) - mean;
            square += centred * centred;
        }
    } else {
        mean = 0.0f;
    }
#else
    mean = 0.0f;
#endif
    const float scale = 1.0f / sqrtf(block_sum(square) / width + epsilon);
    for (int i = threadIdx.x; i < columns; i += NORM_THREADS) {
        float y = i < width ? (fresh(hidden + i) - mean) * scale : 0.0f;
        if (norm_weight && i < width) y *= norm_weight[i];
        if (norm_bias && i < width) y += norm_bias[i];
        store(x + i, y);
    }
}

// Grid (tokens). out [tokens, width] = residual + RMSNorm(y); out may be the residual.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    add_normed(float* out, const float* residual, const float* y, const float* norm_weight, float epsilon, int width) {
    let_next_start();
    wait_for_previous();
    if (is_called_off()) return;
    const long long first = static_cast<long long>(blockIdx.x) * width;
    float square = 0.0f;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        const float value = fresh(y + first + i);
        square += value * value;
    }
    const float scale = 1.0f / sqrtf(block_sum(square) / width + epsilon);
    for (int i = threadIdx.x; i < width; i += NORM_THREADS)
        out[first + i] = fresh(residual + first + i) + fresh(y + first + i) * scale * norm_weight[i];
}

// Grid (any). logits [numbers] = tanh(logits / cap) * cap.
extern "C" __global__ void __launch_bounds__(ACTIVATE_THREADS) cap_logits(float* logits, int numbers, float cap) {
    let_next_start();
    wait_for_previous();
    for (int i = blockIdx.x * ACTIVATE_THREADS + threadIdx.x; i < numbers; i += gridDim.x * ACTIVATE_THREADS)
        logits[i] = tanhf(fresh(logits + i) / cap) * cap;
}

// Grid (ceil(width / (WIDE * ACTIVATE_THREADS)), tokens). inner [tokens, width] = act(gates + bias) * (ups + bias)
// of products [tokens, 2 width], a token's gates before its ups; without a gate act(products [tokens, width] + bias).
extern "C" __global__ void __launch_bounds__(ACTIVATE_THREADS)
    activate_products(Element* inner, const Element* products, const float* bias, int width) {
    wait_for_previous();
    let_next_start();
    const int first = (blockIdx.x * ACTIVATE_THREADS + threadIdx.x) * WIDE;
    const long long token = blockIdx.y;
    const Element* gates = products + token * width * (GATED ? 2 : 1);
    const auto value = [=](Element gate, Element up, int i) {
        const float y = activate(to_float(gate) + (bias ? bias[i] : 0.0f));
        return GATED ? y * (to_float(up) + (bias ? bias[width + i] : 0.0f)) : y;
    };
    if (width % WIDE == 0) {
        if (first >= width) return;
        const Chunk gate = load(gates + first), up = GATED ? load(gates + width + first) : gate;
        Chunk result;
#pragma unroll
        for (int j = 0; j < WIDE; ++j) store(&result.values[j], value(gate.values[j], up.values[j], first + j));
        *reinterpret_cast<Chunk*>(inner + token * width + first) = result;
    } else {
        for (int i = first; i < min(first + WIDE, width); ++i)
            store(inner + token * width + i, value(gates[i], GATED ? gates[width + i] : gates[i], i));
    }
}
