"""TensorRT engines and CUDA kernels on an NVIDIA GPU."""
