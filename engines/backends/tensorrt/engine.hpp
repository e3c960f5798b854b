// TensorRT's engines: opened once for a model, with contexts for each session.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

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

// Any thread, one at a time for `open`.
class EngineFiles {
 public:
    explicit EngineFiles(Device& device);
    ~EngineFiles();
    EngineFiles(const EngineFiles&) = delete;
    EngineFiles& operator=(const EngineFiles&) = delete;

    // Opens an engine that isn't yet. Throws Failure where TensorRT refuses.
    void open(const std::filesystem::path& path);

    const std::map<std::string, nvinfer1::ICudaEngine*>& all() const { return engines_; }

    // Memory that the largest works in.
    std::size_t activation_bytes() const;

 private:
    Device& device_;
    nvinfer1::IRuntime* runtime_ = nullptr;
    std::map<std::string, nvinfer1::ICudaEngine*> engines_;  // by file name
};

// A session's contexts: one for each engine and profile. They share the memory that they work in, as all work
// of a session is in order.
class EngineContexts {
 public:
    EngineContexts(Device& device, const EngineFiles& files, CUstream stream);
    ~EngineContexts();
    EngineContexts(const EngineContexts&) = delete;
    EngineContexts& operator=(const EngineContexts&) = delete;

    struct PerToken {
        const char* name;
        CUdeviceptr address;
        int width;  // of an input [tokens, width]; 0 for an output
    };

    // Puts an engine on the stream. Throws Failure where TensorRT refuses.
    void run(const std::string& file, int tokens, const std::vector<PerToken>& per_token,
             const std::vector<std::pair<std::string, CUdeviceptr>>& fixed);

 private:
    struct Context {
        nvinfer1::IExecutionContext* context;
        int tokens;  // of its shapes; 0 at first
    };

    CUstream stream_;
    Buffer memory_;
    std::map<std::pair<std::string, int>, Context> contexts_;
};

}  // namespace ojfa::tensorrt
