// The MLP's activation.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == 0
    return x / (1.0f + __expf(-x));
#elif ACTIVATION == 1
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
#elif ACTIVATION == 2
    return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
#else
    return fmaxf(x, 0.0f);
#endif
}
