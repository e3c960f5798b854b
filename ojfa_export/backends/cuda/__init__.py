"""What backends on NVIDIA GPUs share: the device, its memory, arrays in it. Needs cuda-python."""
