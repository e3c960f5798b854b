// The attention kernels as a library for the CPU: one entry point, kernels by name.
#include "attention.cu"
#include "prompt.cu"

extern "C" int run_kernel(const char* name, const unsigned* grid, unsigned threads, void* const* arguments,
                          int shared_bytes) {
    const auto is = [=](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("append")) launch(append, grid, threads, arguments, shared_bytes);
    else if (is("attention")) launch(attention, grid, threads, arguments, shared_bytes);
    else if (is("wide_attention")) launch(wide_attention, grid, threads, arguments, shared_bytes);
    else if (is("prompt_attention")) launch(prompt_attention, grid, threads, arguments, shared_bytes);
#if WINDOWS_DIFFER
    else if (is("attention_of_all")) launch(attention_of_all, grid, threads, arguments, shared_bytes);
    else if (is("wide_attention_of_all")) launch(wide_attention_of_all, grid, threads, arguments, shared_bytes);
    else if (is("prompt_attention_of_all")) launch(prompt_attention_of_all, grid, threads, arguments, shared_bytes);
#endif
    else return 1;
    return overrun(shared_bytes) ? 2 : 0;
}
