#include "driver.hpp"

#include <dlfcn.h>

#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

using core::backend_failure;

Driver load() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        throw backend_failure(std::string("no NVIDIA driver was found: ") + dlerror(),
                              "install NVIDIA's driver; 'nvidia-smi' shows whether it works");
    using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t);
    const auto get = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress"));
    if (!get) throw backend_failure("the NVIDIA driver is older than CUDA 11.3", "install a newer driver");
    Driver loaded;
    const auto find = [&](const char* name, int version) {
        void* function = nullptr;
        return get(name, &function, version, CU_GET_PROC_ADDRESS_DEFAULT) == CUDA_SUCCESS ? function
                                                                                          : nullptr;
    };
#define OJFA_LOAD(name, version)                                                 \
    loaded.name = reinterpret_cast<decltype(loaded.name)>(find(#name, version)); \
    if (!loaded.name) throw backend_failure("the NVIDIA driver has no " #name, "install a newer driver");
    OJFA_DRIVER_FUNCTIONS(OJFA_LOAD)
#undef OJFA_LOAD
    loaded.cuFuncGetParamInfo =
        reinterpret_cast<decltype(loaded.cuFuncGetParamInfo)>(find("cuFuncGetParamInfo", 12040));
    return loaded;
}

}  // namespace

const Driver& driver() {
    static const Driver loaded = load();
    return loaded;
}

void check(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    const char *name = nullptr, *text = nullptr;
    driver().cuGetErrorName(result, &name);
    driver().cuGetErrorString(result, &text);
    const std::string message = std::string("CUDA, ") + what + ": " + (text ? text : "unknown error") + " (" +
                                (name ? name : "?") + ")";
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        throw core::Failure(
            OJFA_ERROR_OUT_OF_MEMORY, message,
            "use fewer sequences, a shorter cache, or an earlier fixed exit: blocks past it take "
            "no memory");
    throw backend_failure(message,
                          "'nvidia-smi' shows the GPU's state; after an error of a kernel, start anew");
}

}  // namespace ojfa::tensorrt
