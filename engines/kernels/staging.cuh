// Inputs of products on tensor cores, of 16 bits, as they get to shared memory: those of a few tokens, in spans of
// columns that a thread block's warps share in turn.
#pragma once
#include "instructions.cuh"

#if HALF
constexpr int TILED_THREADS = 512;
constexpr int TILED_WARPS = TILED_THREADS / LANES;
constexpr int SPAN = 64;  // columns: 8 halves of a lane, eight lanes
// Inputs of a token lie so far apart, beyond whole spans, that those of two are in different banks.
constexpr int INPUTS_SHIFT = 32;

// The work of a thread block: every tile over all columns, or, where the inputs don't fit in shared memory
// together, every tile over a part of the columns after the other.
struct Pass {
    int first_span, stop_span;  // of the matrix
};

// Inputs of this warp's spans of a pass into shared memory, zeros beyond the columns. No other warp looks at
// them; there are WARPS.
template <int WARPS>
__device__ __forceinline__ void stage_inputs(Element* inputs, int apart, const Element* x, int columns,
                                             int tokens, const Pass& pass) {
    constexpr int CHUNKS = SPAN / WIDE;  // of a span
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (int span = pass.first_span + warp; span < pass.stop_span; span += WARPS) {
        const int column = span * SPAN + lane % CHUNKS * WIDE;
        const Element* from = x + (column < columns ? column : 0);
        Element* to = inputs + (span - pass.first_span) * SPAN + lane % CHUNKS * WIDE;
        for (int token = lane / CHUNKS; token < tokens; token += LANES / CHUNKS)
            copy_async<16>(to + token * apart, from + static_cast<long long>(token) * columns,
                           column < columns);
    }
    copies_end();
    copies_wait<0>();
    __syncwarp();
}
#endif
