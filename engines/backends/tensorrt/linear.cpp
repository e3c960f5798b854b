#include "linear.hpp"

#include <algorithm>

namespace ojfa::tensorrt {
namespace {

// As in the kernel: threads and warps of a block, matrix rows of a warp's task; thread blocks on a
// multiprocessor.
constexpr unsigned THREADS = 512, WARPS = 16, RESIDENT = 1;

}  // namespace

void LinearKernels::norm_linear(CUstream stream, CUdeviceptr out, CUdeviceptr hidden, int tokens, int width,
                                const Norm& norm, const Array& matrix, CUdeviceptr bias) const {
    kernels_.launch(stream, launch("norm_linear_", tokens, matrix, true), out, hidden, norm.weight, norm.bias,
                    norm.epsilon, width, matrix.address(), bias, matrix.columns(), matrix.rows());
}

void LinearKernels::norm_up(CUstream stream, CUdeviceptr inner, CUdeviceptr hidden, int tokens,
                            int inner_width, const Norm& norm, const Array& matrix, CUdeviceptr bias) const {
    kernels_.launch(stream, launch("norm_up_", tokens, matrix, true), inner, hidden, norm.weight, norm.bias,
                    norm.epsilon, matrix.address(), bias, matrix.columns(), inner_width);
}

void LinearKernels::linear(CUstream stream, CUdeviceptr out, CUdeviceptr residual, CUdeviceptr x, int tokens,
                           const Array& matrix, CUdeviceptr bias) const {
    kernels_.launch(stream, launch("linear_", tokens, matrix, false), out, residual, x, matrix.address(),
                    bias, matrix.columns(), matrix.rows());
}

Launch LinearKernels::launch(const char* kind, int tokens, const Array& matrix, bool normed) const {
    const auto columns = static_cast<unsigned>(matrix.columns()),
               outputs = static_cast<unsigned>(matrix.rows());
    const unsigned blocks = (outputs + WARPS - 1) / WARPS;
    // The inputs; for a norm a token's hidden states and the norm's weight beside them.
    const unsigned shared = columns * (static_cast<unsigned>(tokens) * element_bytes_ + (normed ? 8 : 0));
    return {kind + std::to_string(tokens),
            {std::min(blocks, RESIDENT * multiprocessors_), 1, 1},
            {THREADS, 1},
            shared,
            true};
}

}  // namespace ojfa::tensorrt
