// Launching the products of a step with a few tokens (engines/kernels/tiled_linear.cu).
#pragma once

#include "linear.hpp"
#include "plan.hpp"

namespace ojfa::tensorrt {

constexpr int MOST_TILED_TOKENS = 16;

// How many tokens at once find room in shared memory, with every matrix of a model; 0 for none.
int most_tiled_tokens(const core::ModelSpec& spec, const Device& device);

// Products in fp16 as LinearKernels has them, for at most so many tokens.
class TiledKernels {
 public:
    // `normed` [MOST_TILED_TOKENS, columns] fp16 is where norms leave what products take.
    TiledKernels(const Device& device, Kernels& kernels, CUdeviceptr normed)
        : device_(device), kernels_(kernels), normed_(normed) {}

    void norm_linear(CUstream stream, CUdeviceptr out, CUdeviceptr hidden, int tokens, int width,
                     const Norm& norm, const Array& matrix, CUdeviceptr bias) const;

    void norm_up(CUstream stream, CUdeviceptr inner, CUdeviceptr hidden, int tokens, int inner_width,
                 const Norm& norm, const Array& matrix, CUdeviceptr bias) const;

    void linear(CUstream stream, CUdeviceptr out, CUdeviceptr residual, CUdeviceptr x, int tokens,
                const Array& matrix, CUdeviceptr bias) const;

    // Leaves normed hidden states in `normed`.
    void normalize(CUstream stream, CUdeviceptr hidden, int tokens, int width, const Norm& norm,
                   int columns) const;
    CUdeviceptr normed() const { return normed_; }

 private:
    Launch launch(const char* kind, int tokens, const Array& matrix, int pass_spans) const;
    int pass_spans(int tokens, const Array& matrix) const;

    const Device& device_;
    Kernels& kernels_;
    CUdeviceptr normed_;
};

}  // namespace ojfa::tensorrt
