#include "narrow.hpp"

#include <algorithm>
#include <cstdint>

namespace ojfa::tensorrt {
namespace {

// As in the kernels: warps of a thread block, rows of a tile, columns of a span; bytes beyond the inputs of a
// token in shared memory, and of a token's sums of a warp.
constexpr int WARPS = 12, TILE = 8, SPAN = 64, SHIFT = 64, SUMS_BYTES = 4 * (TILE + 4);
// Elements of a matrix at most: offsets are of 32 bits.
constexpr std::int64_t MOST_ELEMENTS = std::int64_t{1} << 31;

int divided_up(int count, int each) {
    return (count + each - 1) / each;
}

// Groups of eight tokens, of a product.
int groups(int tokens) {
    return divided_up(tokens, 8);
}

// Tiles at most after which a thread block's warps wait for one another.
int most_batch(int tokens) {
    return groups(tokens) == 1 ? 4 : 2;
}

}  // namespace

void NarrowKernels::norm_linear(CUstream stream, CUdeviceptr out, CUdeviceptr hidden, int tokens, int width,
                                const Norm& norm, const Array& matrix, CUdeviceptr bias) const {
    const unsigned shared = room(tokens, matrix, width);
    if (shared == 0) {
        tiled_.normalize(stream, hidden, tokens, width, norm, matrix.columns());
        linear(stream, out, 0, tiled_.normed(), tokens, matrix, bias);
        return;
    }
    kernels_.launch(stream, launch("norm_narrow_linear_", tokens, matrix, shared), out, hidden, norm.weight,
                    norm.bias, norm.epsilon, width, matrix.address(), bias, matrix.columns(), matrix.rows(),
                    tokens, batch(tokens, matrix));
}

void NarrowKernels::norm_up(CUstream stream, CUdeviceptr inner, CUdeviceptr hidden, int tokens,
                            int inner_width, const Norm& norm, const Array& matrix, CUdeviceptr bias) const {
    const int width = matrix.columns();
    const unsigned shared = room(tokens, matrix, width);
    if (shared == 0) return tiled_.norm_up(stream, inner, hidden, tokens, inner_width, norm, matrix, bias);
    kernels_.launch(stream, launch("norm_narrow_up_", tokens, matrix, shared), inner, hidden, norm.weight,
                    norm.bias, norm.epsilon, width, matrix.address(), bias, matrix.columns(), inner_width,
                    tokens, batch(tokens, matrix));
}

void NarrowKernels::linear(CUstream stream, CUdeviceptr out, CUdeviceptr residual, CUdeviceptr x, int tokens,
                           const Array& matrix, CUdeviceptr bias) const {
    const unsigned shared = room(tokens, matrix, 0);
    if (shared == 0) return tiled_.linear(stream, out, residual, x, tokens, matrix, bias);
    kernels_.launch(stream, launch("narrow_linear_", tokens, matrix, shared), out, residual, x,
                    matrix.address(), bias, matrix.columns(), matrix.rows(), tokens, batch(tokens, matrix));
}

unsigned NarrowKernels::room(int tokens, const Array& matrix, int width) const {
    if (width > SMALL_WIDTH || width % 4 != 0) return 0;
    if (std::int64_t{matrix.rows()} * matrix.columns() > MOST_ELEMENTS) return 0;
    const int staged = tokens * (2 * SPAN * divided_up(matrix.columns(), SPAN) + SHIFT);
    const int sums = 2 * batch(tokens, matrix) * WARPS * groups(tokens) * 8 * SUMS_BYTES;
    // The norm's weight and bias, hidden states, and mean and scale of each.
    const int norms = width > 0 ? 4 * ((2 + tokens) * width + 2 * tokens) : 0, shared = staged + norms + sums;
    return shared <= device_.shared_bytes ? static_cast<unsigned>(shared) : 0;
}

int NarrowKernels::blocks(const Array& matrix) const {
    return std::min(divided_up(matrix.rows(), TILE), device_.multiprocessors);
}

int NarrowKernels::batch(int tokens, const Array& matrix) const {
    const int tiles = divided_up(matrix.rows(), TILE);
    return std::min(most_batch(tokens), divided_up(tiles, blocks(matrix)));
}

Launch NarrowKernels::launch(const char* kind, int tokens, const Array& matrix, unsigned shared) const {
    return {kind + std::to_string(groups(tokens) * 8),
            {static_cast<unsigned>(blocks(matrix)), 1, 1},
            {32 * WARPS, 1},
            shared,
            true};
}

}  // namespace ojfa::tensorrt
