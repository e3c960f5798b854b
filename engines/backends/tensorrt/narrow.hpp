// Launching the products of a small model's step (engines/kernels/narrow_linear.cu); the shapes are those of
// ojfa_export/backends/tensorrt/narrow.py.
#pragma once

#include "tiled.hpp"

namespace ojfa::tensorrt {

// A small model's hidden states have up to so many features: its steps of one token are the tensor cores'
// too.
constexpr int SMALL_WIDTH = 1024;

// As TiledKernels, for a small model: norms are part of products, where they find room.
class NarrowKernels {
 public:
    NarrowKernels(const Device& device, Kernels& kernels, CUdeviceptr normed)
        : device_(device), kernels_(kernels), tiled_(device, kernels, normed) {}

    void norm_linear(CUstream stream, CUdeviceptr out, CUdeviceptr hidden, int tokens, int width,
                     const Norm& norm, const Array& matrix, CUdeviceptr bias) const;

    void norm_up(CUstream stream, CUdeviceptr inner, CUdeviceptr hidden, int tokens, int inner_width,
                 const Norm& norm, const Array& matrix, CUdeviceptr bias) const;

    void linear(CUstream stream, CUdeviceptr out, CUdeviceptr residual, CUdeviceptr x, int tokens,
                const Array& matrix, CUdeviceptr bias) const;

 private:
    // Bytes of shared memory for inputs, of which a norm of so many features is made (0: none); 0 for too
    // many.
    unsigned room(int tokens, const Array& matrix, int width) const;
    int blocks(const Array& matrix) const;  // thread blocks that share a matrix
    // Tiles of a thread block after which its warps wait for one another.
    int batch(int tokens, const Array& matrix) const;
    Launch launch(const char* kind, int tokens, const Array& matrix, unsigned shared) const;

    const Device& device_;
    Kernels& kernels_;
    TiledKernels tiled_;
};

}  // namespace ojfa::tensorrt
