// The compiled CUDA kernels of a bundle, and launching them.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "bundle/held.hpp"
#include "device.hpp"

namespace ojfa::tensorrt {

// A kernel's grid of thread blocks, threads of each, dynamic shared memory, and whether it waits by itself
// for the kernel before it.
struct Launch {
    std::string kernel;
    unsigned grid[3];
    unsigned threads[2];
    unsigned shared_bytes = 0;
    bool overlapping = false;
};

// Those for one precision. Any thread.
class Kernels {
 public:
    // Of a file of the bundle. Throws Failure where the driver can't load them.
    Kernels(Device& device, const core::HeldFiles& files, const std::string& cubin);
    ~Kernels();
    Kernels(const Kernels&) = delete;
    Kernels& operator=(const Kernels&) = delete;

    // Puts a kernel on a stream; arguments have just the types of its parameters.
    template <class... Arguments>
    void launch(CUstream stream, const Launch& launch, Arguments... arguments) {
        void* places[] = {&arguments..., nullptr};
        const std::vector<std::size_t> sizes = {sizeof(Arguments)...};
        launch_with(stream, launch, places, sizes);
    }

 private:
    struct Function {
        CUfunction handle;
        unsigned shared_bytes;  // that it may have
    };

    void launch_with(CUstream stream, const Launch& launch, void** arguments,
                     const std::vector<std::size_t>& sizes);
    CUfunction function(const Launch& launch, const std::vector<std::size_t>& sizes);
    CUfunction open(const std::string& name, const std::vector<std::size_t>& sizes) const;
    void check_parameters(CUfunction function, const std::string& name,
                          const std::vector<std::size_t>& sizes) const;

    Device& device_;
    std::string file_;
    CUmodule module_ = nullptr;
    std::mutex mutex_;
    std::map<std::string, Function> functions_;
};

}  // namespace ojfa::tensorrt
