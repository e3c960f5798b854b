// The products of a few tokens, and what is around those of many, as a library for the CPU: one entry point, kernels by name.
#include "around_products.cu"
#include "narrow_linear.cu"
#include "tiled_linear.cu"

extern "C" int run_kernel(const char* name, const unsigned* grid, unsigned threads, void* const* arguments,
                          int shared_bytes) {
    const auto is = [=](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("normalize")) launch(normalize, grid, threads, arguments, shared_bytes);
    else if (is("tiled_linear_8")) launch(tiled_linear_8, grid, threads, arguments, shared_bytes);
    else if (is("tiled_linear_16")) launch(tiled_linear_16, grid, threads, arguments, shared_bytes);
    else if (is("tiled_up_8")) launch(tiled_up_8, grid, threads, arguments, shared_bytes);
    else if (is("tiled_up_16")) launch(tiled_up_16, grid, threads, arguments, shared_bytes);
    else if (is("narrow_linear_8")) launch(narrow_linear_8, grid, threads, arguments, shared_bytes);
    else if (is("narrow_linear_16")) launch(narrow_linear_16, grid, threads, arguments, shared_bytes);
    else if (is("norm_narrow_linear_8")) launch(norm_narrow_linear_8, grid, threads, arguments, shared_bytes);
    else if (is("norm_narrow_linear_16")) launch(norm_narrow_linear_16, grid, threads, arguments, shared_bytes);
    else if (is("norm_narrow_up_8")) launch(norm_narrow_up_8, grid, threads, arguments, shared_bytes);
    else if (is("norm_narrow_up_16")) launch(norm_narrow_up_16, grid, threads, arguments, shared_bytes);
    else if (is("add_normed")) launch(add_normed, grid, threads, arguments, shared_bytes);
    else if (is("cap_logits")) launch(cap_logits, grid, threads, arguments, shared_bytes);
    else if (is("activate_products")) launch(activate_products, grid, threads, arguments, shared_bytes);
    else return 1;
    return overrun(shared_bytes) ? 2 : 0;
}
