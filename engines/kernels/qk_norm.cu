// Norms of queries and keys, of models that have them: RMSNorm of the features of each head, before the rotation.
#include "common.cuh"

constexpr int QK_NORM_WARPS = 8;
constexpr int QK_NORM_EACH = (HEAD_DIM + LANES - 1) / LANES;  // features of a lane

// Grid (tokens, ceil((HEADS + KV_HEADS) / QK_NORM_WARPS)), a warp for each head; in place in
// qkv [tokens, (HEADS + 2 KV_HEADS) HEAD_DIM]. Weights [HEAD_DIM].
extern "C" __global__ void __launch_bounds__(QK_NORM_WARPS * LANES)
    norm_queries_and_keys(float* qkv, const float* query_weight, const float* key_weight, float epsilon) {
    const int head = blockIdx.y * QK_NORM_WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const float* weight = head < HEADS ? query_weight : key_weight;
    float weights[QK_NORM_EACH], values[QK_NORM_EACH];
#pragma unroll
    for (int j = 0; j < QK_NORM_EACH; ++j) {
        const int i = j * LANES + lane;
        weights[j] = i < HEAD_DIM ? weight[i] : 0.0f;
    }
    wait_for_previous();
    let_next_start();
    if (head >= HEADS + KV_HEADS) return;
    float* row = qkv + (static_cast<long long>(blockIdx.x) * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM;
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < QK_NORM_EACH; ++j) {
        const int i = j * LANES + lane;
        // Past the first-level cache, where attention must not find what was there before.
        values[j] = i < HEAD_DIM ? fresh(row + i) : 0.0f;
        square += values[j] * values[j];
    }
    const float scale = 1.0f / sqrtf(lanes_sum(square) / HEAD_DIM + epsilon);
#pragma unroll
    for (int j = 0; j < QK_NORM_EACH; ++j) {
        const int i = j * LANES + lane;
        if (i < HEAD_DIM) row[i] = values[j] * scale * weights[j];
    }
}
