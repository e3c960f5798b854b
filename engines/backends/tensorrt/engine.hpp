// TensorRT's engines: opened once for a model, with contexts for each session.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bundle/held.hpp"
#include "device.hpp"

namespace nvinfer1 {
class ICudaEngine;
class IExecutionContext;
class IRuntime;
}  // namespace nvinfer1

namespace ojfa::tensorrt {

// TensorRT's version, "8.6.0", of the library that was found. Throws Failure where there is none, or one of
// another major version than the headers that this was built with.
std::string library_version();

// All engines of a model, opened, with a context for each profile: for one session at a time, as TensorRT 8.6
// lets a profile be used by one context of an engine only. Weights are no part of them, so that they are
// small. Contexts share the memory that they work in, as all work of a session is in order.
class EngineSet {
 public:
    // Of files of the bundle. Throws Failure where TensorRT refuses.
    EngineSet(Device& device, const core::HeldFiles& files, const std::set<std::string>& names,
              CUstream stream);
    ~EngineSet();
    EngineSet(const EngineSet&) = delete;
    EngineSet& operator=(const EngineSet&) = delete;

    struct PerToken {
        const char* name;
        CUdeviceptr address;
        int width;  // of an input [tokens, width]; 0 for an output
    };

    // Puts an engine on a stream. Throws Failure where TensorRT refuses.
    void run(CUstream stream, const std::string& file, int tokens, const std::vector<PerToken>& per_token,
             const std::vector<std::pair<std::string, CUdeviceptr>>& fixed);

 private:
    struct Context {
        nvinfer1::IExecutionContext* context;
        int tokens;  // of its shapes; 0 at first
    };

    void close();

    Device& device_;
    nvinfer1::IRuntime* runtime_ = nullptr;
    std::map<std::string, nvinfer1::ICudaEngine*> engines_;  // by file name
    std::map<std::pair<std::string, int>, Context> contexts_;
    std::unique_ptr<Buffer> memory_;
};

}  // namespace ojfa::tensorrt
