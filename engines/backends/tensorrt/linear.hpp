// Launching the matrix-vector kernels of a decode step (engines/kernels/linear.cu).
#pragma once

#include "kernels.hpp"
#include "weights.hpp"

namespace ojfa::tensorrt {

// Tokens of a step in these kernels; with more, tensor cores are faster (tiled.hpp, bench/NOTES.md).
constexpr int MOST_TOKENS = 2;

// A norm of the inputs: weight and bias, or none for x / rms(x).
struct Norm {
    CUdeviceptr weight = 0, bias = 0;
    float epsilon = 0;
};

// Products with matrices [outputs, columns] of one precision, columns a multiple of a 16-byte load.
class LinearKernels {
 public:
    LinearKernels(const Device& device, Kernels& kernels, std::size_t element_bytes)
        : multiprocessors_(static_cast<unsigned>(device.multiprocessors)),
          kernels_(kernels),
          element_bytes_(static_cast<unsigned>(element_bytes)) {}

    // out [tokens, outputs] = norm(hidden [tokens, width]) matrix^T + bias
    void norm_linear(CUstream stream, CUdeviceptr out, CUdeviceptr hidden, int tokens, int width,
                     const Norm& norm, const Array& matrix, CUdeviceptr bias) const;

    // inner [tokens, inner_width] = the MLP's activated (and gated) products with norm(hidden)
    void norm_up(CUstream stream, CUdeviceptr inner, CUdeviceptr hidden, int tokens, int inner_width,
                 const Norm& norm, const Array& matrix, CUdeviceptr bias) const;

    // out [tokens, outputs] = residual + x matrix^T + bias; out may be the residual, which may be 0
    void linear(CUstream stream, CUdeviceptr out, CUdeviceptr residual, CUdeviceptr x, int tokens,
                const Array& matrix, CUdeviceptr bias) const;

 private:
    Launch launch(const char* kind, int tokens, const Array& matrix, bool normed) const;

    unsigned multiprocessors_;
    Kernels& kernels_;
    unsigned element_bytes_;
};

}  // namespace ojfa::tensorrt
