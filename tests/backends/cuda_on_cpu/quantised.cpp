// The products with quantised matrices, and their layout, as a library for the CPU: one entry point, kernels by name.
#include "around_products.cu"
#include "quantised_layout.cu"
#include "quantised_linear.cu"

using namespace quantised;

extern "C" int run_kernel(const char* name, const unsigned* grid, unsigned threads, void* const* arguments,
                          int shared_bytes) {
    const auto is = [=](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("normalize")) launch(normalize, grid, threads, arguments, shared_bytes);
    else if (is("lay_out_quantised")) launch(lay_out_quantised, grid, threads, arguments, shared_bytes);
    else if (is("dequantise")) launch(dequantise, grid, threads, arguments, shared_bytes);
    else if (is("quantised_linear_2")) launch(quantised_linear_2, grid, threads, arguments, shared_bytes);
    else if (is("quantised_linear_4")) launch(quantised_linear_4, grid, threads, arguments, shared_bytes);
    else if (is("quantised_linear_8")) launch(quantised_linear_8, grid, threads, arguments, shared_bytes);
    else if (is("quantised_linear_16")) launch(quantised_linear_16, grid, threads, arguments, shared_bytes);
    else if (is("quantised_up_2")) launch(quantised_up_2, grid, threads, arguments, shared_bytes);
    else if (is("quantised_up_4")) launch(quantised_up_4, grid, threads, arguments, shared_bytes);
    else if (is("quantised_up_8")) launch(quantised_up_8, grid, threads, arguments, shared_bytes);
    else if (is("quantised_up_16")) launch(quantised_up_16, grid, threads, arguments, shared_bytes);
    else if (is("norm_quantised_linear")) launch(norm_quantised_linear, grid, threads, arguments, shared_bytes);
    else if (is("norm_quantised_up")) launch(norm_quantised_up, grid, threads, arguments, shared_bytes);
    else return 1;
    return overrun(shared_bytes) ? 2 : 0;
}
