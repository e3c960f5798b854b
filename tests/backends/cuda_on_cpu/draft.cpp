// What a draft layer's kernels do beside those of a block, as a library for the CPU: one entry point, kernels by name.
#include "draft.cu"

extern "C" int run_kernel(const char* name, const unsigned* grid, unsigned threads, void* const* arguments, int) {
    const auto is = [=](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("side_by_side")) launch(side_by_side, grid, threads, arguments, 0);
    else if (is("see")) launch(see, grid, threads, arguments, 0);
    else if (is("name_tokens")) launch(name_tokens, grid, threads, arguments, 0);
    else return 1;
    return 0;
}
