// A stand-in for the names of TensorRT 8.6's runtime that the backend uses; see cuda.h here.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

class ILogger {
 public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

struct Dims {
    std::int32_t nbDims;
    std::int32_t d[8];
};

class IExecutionContext {
 public:
    virtual ~IExecutionContext() = default;
    virtual bool setOptimizationProfileAsync(std::int32_t profile, CUstream stream) = 0;
    virtual void setDeviceMemory(void* memory) = 0;
    virtual bool setInputShape(const char* name, const Dims& dims) = 0;
    virtual bool setTensorAddress(const char* name, void* address) = 0;
    virtual bool enqueueV3(CUstream stream) = 0;
};

class ICudaEngine {
 public:
    virtual ~ICudaEngine() = default;
    virtual std::size_t getDeviceMemorySize() const = 0;
    virtual IExecutionContext* createExecutionContextWithoutDeviceMemory() = 0;
};

class IRuntime {
 public:
    virtual ~IRuntime() = default;
    virtual ICudaEngine* deserializeCudaEngine(const void* bytes, std::size_t size) = 0;
};

}  // namespace nvinfer1
