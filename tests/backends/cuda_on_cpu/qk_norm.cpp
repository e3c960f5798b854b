// The norms of queries and keys as a library for the CPU: one entry point, kernels by name.
#include "qk_norm.cu"

extern "C" int run_kernel(const char* name, const unsigned* grid, unsigned threads, void* const* arguments, int) {
    if (std::strcmp(name, "norm_queries_and_keys") != 0) return 1;
    launch(norm_queries_and_keys, grid, threads, arguments, 0);
    return 0;
}
