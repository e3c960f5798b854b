#include "engine.hpp"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <mutex>

#include "failure.hpp"
#include "plan.hpp"

namespace ojfa::tensorrt {
namespace {

using core::backend_failure;

#if NV_TENSORRT_MAJOR >= 10
constexpr int MAJOR_STEP = 10000;
constexpr int VERSION = NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
#else
constexpr int MAJOR_STEP = 1000;
constexpr int VERSION = NV_TENSORRT_MAJOR * 1000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
#endif
constexpr int PROFILES = 2;
const char* const REBUILD = "rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt'";

std::string shown(int version) {
    return std::to_string(version / MAJOR_STEP) + "." + std::to_string(version % MAJOR_STEP / 100) + "." +
           std::to_string(version % 100);
}

// TensorRT's library, found at run time: its functions without which nothing goes.
struct Library {
    void* (*create_runtime)(void* logger, std::int32_t version);
    int version;
};

Library load() {
    const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
#ifdef TENSORRT_LIBRARY
    if (!handle) handle = dlopen(TENSORRT_LIBRARY, RTLD_NOW | RTLD_GLOBAL);
#endif
    if (!handle)
        throw backend_failure(
            "TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + " is needed, and none was found: " + dlerror(),
            "put the directory of " + name +
                " into LD_LIBRARY_PATH, or build engines/ with the "
                "headers of the TensorRT that is there");
    const auto version = reinterpret_cast<std::int32_t (*)()>(dlsym(handle, "getInferLibVersion"));
    const auto create =
        reinterpret_cast<void* (*)(void*, std::int32_t)>(dlsym(handle, "createInferRuntime_INTERNAL"));
    if (!version || !create) throw backend_failure(name + " is no TensorRT");
    if (version() / MAJOR_STEP != NV_TENSORRT_MAJOR)
        throw backend_failure(
            "TensorRT " + shown(version()) + " was found, this library was built for " + shown(VERSION),
            "build engines/ with the headers of the TensorRT that is there");
    return {create, version()};
}

const Library& library() {
    static const Library loaded = load();
    return loaded;
}

// Keeps TensorRT's errors for our own messages; nothing is printed.
class Log : public nvinfer1::ILogger {
 public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::lock_guard lock(mutex_);
        if (first_.empty()) first_ = message;
    }
    // The first error since the last call: those after it are mostly its consequences.
    std::string take() {
        const std::lock_guard lock(mutex_);
        std::string first = std::move(first_);
        first_.clear();
        return first.empty() ? "no reason was given" : first;
    }

 private:
    std::mutex mutex_;
    std::string first_;
};

Log& the_log() {
    static Log& log = *new Log;  // TensorRT may log to the very end
    return log;
}

std::size_t activations_of(const nvinfer1::ICudaEngine& engine) {
#if NV_TENSORRT_MAJOR >= 10
    return static_cast<std::size_t>(engine.getDeviceMemorySizeV2());
#else
    return engine.getDeviceMemorySize();
#endif
}

nvinfer1::IExecutionContext* new_context(nvinfer1::ICudaEngine& engine) {
#if NV_TENSORRT_MAJOR >= 10
    return engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#else
    return engine.createExecutionContextWithoutDeviceMemory();
#endif
}

void set_memory(nvinfer1::IExecutionContext& context, const Buffer& memory) {
#if NV_TENSORRT_MAJOR >= 10
    context.setDeviceMemoryV2(reinterpret_cast<void*>(memory.address()),
                              static_cast<std::int64_t>(memory.bytes()));
#else
    context.setDeviceMemory(reinterpret_cast<void*>(memory.address()));
#endif
}

nvinfer1::Dims matrix(int rows, int columns) {
    nvinfer1::Dims dims{};
    dims.nbDims = 2;
    dims.d[0] = rows;
    dims.d[1] = columns;
    return dims;
}

}  // namespace

std::string library_version() {
    return shown(library().version);
}

EngineSet::EngineSet(Device& device, const core::HeldFiles& files, const std::set<std::string>& names,
                     CUstream stream)
    : device_(device) {
    device.make_current();
    try {
        runtime_ = static_cast<nvinfer1::IRuntime*>(library().create_runtime(&the_log(), VERSION));
        if (!runtime_)
            throw backend_failure("TensorRT " + library_version() + " can't start: " + the_log().take());
        std::size_t most = 1;
        for (const std::string& name : names) {
            const std::filesystem::path path = files.directory() / name;
            const std::vector<char> bytes = files.read(name);
            nvinfer1::ICudaEngine* const engine = runtime_->deserializeCudaEngine(bytes.data(), bytes.size());
            if (!engine)
                throw backend_failure("TensorRT " + library_version() + " can't open " + path.string() +
                                          ": " + the_log().take(),
                                      REBUILD);
            engines_[path.filename()] = engine;
            most = std::max(most, activations_of(*engine));
        }
        memory_ = std::make_unique<Buffer>(device, most);
        for (const auto& [name, engine] : engines_)
            for (int profile = 0; profile < PROFILES; ++profile) {
                nvinfer1::IExecutionContext* const context = new_context(*engine);
                if (context) contexts_[{name, profile}] = {context, 0};
                if (!context || !context->setOptimizationProfileAsync(profile, stream))
                    throw backend_failure("TensorRT " + library_version() + " can't run engine " + name +
                                          ": " + the_log().take());
                set_memory(*context, *memory_);
            }
    } catch (...) {
        close();
        throw;
    }
}

EngineSet::~EngineSet() {
    device_.try_make_current();
    close();
}

void EngineSet::close() {
    for (const auto& context : contexts_) delete context.second.context;
    for (const auto& engine : engines_) delete engine.second;
    delete runtime_;
}

void EngineSet::run(CUstream stream, const std::string& file, int tokens,
                    const std::vector<PerToken>& per_token,
                    const std::vector<std::pair<std::string, CUdeviceptr>>& fixed) {
    Context& chosen = contexts_.at({file, tokens <= MOST_DECODE_TOKENS ? 0 : 1});
    nvinfer1::IExecutionContext& context = *chosen.context;
    bool taken = true;
    for (const PerToken& each : per_token) {
        if (each.width && chosen.tokens != tokens)
            taken = taken && context.setInputShape(each.name, matrix(tokens, each.width));
        taken = taken && context.setTensorAddress(each.name, reinterpret_cast<void*>(each.address));
    }
    for (const auto& [name, address] : fixed)
        taken = taken && context.setTensorAddress(name.c_str(), reinterpret_cast<void*>(address));
    chosen.tokens = tokens;
    if (!taken || !context.enqueueV3(stream))
        throw backend_failure(
            "TensorRT " + library_version() + " can't run engine " + file + ": " + the_log().take(), REBUILD);
}

}  // namespace ojfa::tensorrt
