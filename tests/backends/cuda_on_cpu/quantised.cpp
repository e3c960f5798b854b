// The products with quantised matrices, and their layout, as a library for the CPU: one entry point, kernels by name.
#include "around_products.cu"
#include "quantised_batch.cu"
#include "quantised_layout.cu"
#include "quantised_linear.cu"

using namespace quantised;

extern "C" int run_kernel(const char* name, const unsigned* grid, unsigned threads, void* const* arguments,
                          int shared_bytes) {
    const auto is = [=](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("normalize")) launch(normalize, grid, threads, arguments, shared_bytes);
    else if (is("lay_out_quantised")) launch(lay_out_quantised, grid, threads, arguments, shared_bytes);
    else if (is("dequantise")) launch(dequantise, grid, threads, arguments, shared_bytes);
    else if (is("gather_columns")) launch(gather_columns, grid, threads, arguments, shared_bytes);
    else if (is("quantised_linear")) launch(quantised_linear, grid, threads, arguments, shared_bytes);
    else if (is("quantised_batch_linear_8")) launch(quantised_batch_linear_8, grid, threads, arguments, shared_bytes);
    else if (is("quantised_batch_linear_16")) launch(quantised_batch_linear_16, grid, threads, arguments, shared_bytes);
    else if (is("quantised_batch_linear_32")) launch(quantised_batch_linear_32, grid, threads, arguments, shared_bytes);
    else if (is("quantised_batch_up_8")) launch(quantised_batch_up_8, grid, threads, arguments, shared_bytes);
    else if (is("quantised_batch_up_16")) launch(quantised_batch_up_16, grid, threads, arguments, shared_bytes);
    else if (is("quantised_batch_up_32")) launch(quantised_batch_up_32, grid, threads, arguments, shared_bytes);
    else if (is("norm_quantised_linear")) launch(norm_quantised_linear, grid, threads, arguments, shared_bytes);
    else if (is("norm_quantised_up")) launch(norm_quantised_up, grid, threads, arguments, shared_bytes);
    else return 1;
    return overrun(shared_bytes) ? 2 : 0;
}
