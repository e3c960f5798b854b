// A stand-in for TensorRT's library: engines that compute by the stand-in's kernels.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <cmath>
#include <stdexcept>

#include "device.hpp"

namespace {

using stand_in::Program;

constexpr int MOST_TOKENS[] = {16, 1024};  // of the profiles

// A run of an engine: its tensors by name.
struct Run {
    const Program& program;
    std::map<std::string, void*> tensors;
    int tokens;

    template <class T>
    T* get(const std::string& name) const {
        const auto found = tensors.find(name);
        return found == tensors.end() ? nullptr : static_cast<T*>(found->second);
    }
    void norm_linear(const char* out, const std::string& norm, const std::string& weight, int outputs) const {
        stand_in::norm_linear(
            program, get<float>(out), get<float>("hidden"), tokens, get<float>(norm + ".weight"),
            get<float>(norm + ".bias"), epsilon(), program.at("WIDTH"), get<void>(weight),
            get<float>(weight.substr(0, weight.rfind('.')) + ".bias"), program.at("WIDTH"), outputs);
    }
    float epsilon() const { return std::pow(10.0f, static_cast<float>(-program.at("EPSILON_DIGITS"))); }

    void qkv() const {
        const int outputs = (program.at("HEADS") + 2 * program.at("KV_HEADS")) * program.at("HEAD_DIM");
        norm_linear("qkv", "attention.norm", "attention.qkv.weight", outputs);
    }
    void mlp() const {
        const int width = program.at("WIDTH"), inner_width = program.at("INNER");
        std::vector<char> inner(static_cast<std::size_t>(tokens * inner_width) * program.element_bytes());
        float* const out = get<float>("hidden_out");
        stand_in::linear(program, out, get<float>("hidden"), get<void>("mixed"), tokens,
                         get<void>("attention.out.weight"), get<float>("attention.out.bias"),
                         program.at("HEADS") * program.at("HEAD_DIM"), width);
        stand_in::norm_up(program, inner.data(), out, tokens, get<float>("mlp.norm.weight"),
                          get<float>("mlp.norm.bias"), epsilon(), get<void>("mlp.up.weight"),
                          get<float>("mlp.up.bias"), width, inner_width);
        stand_in::linear(program, out, out, inner.data(), tokens, get<void>("mlp.down.weight"),
                         get<float>("mlp.down.bias"), inner_width, width);
    }
    void final_head() const { norm_linear("logits", "final_norm", "head", program.at("VOCABULARY")); }
    void exit_head() const {
        const int rank = program.at("RANK"), width = program.at("WIDTH");
        const auto *hidden = get<float>("hidden"), *project = get<float>("project"),
                   *bias = get<float>("project.bias");
        std::vector<float> z;
        for (int token = 0; token < tokens; ++token)
            for (int column = 0; column < rank; ++column) {
                double sum = bias[column];
                for (int i = 0; i < width; ++i)
                    sum += static_cast<double>(hidden[token * width + i]) * project[i * rank + column];
                z.push_back(static_cast<float>(sum));
            }
        stand_in::norm_linear(program, get<float>("logits"), z.data(), tokens, nullptr, nullptr, epsilon(),
                              rank, get<void>("vocabulary"), get<float>("vocabulary.bias"), rank,
                              program.at("VOCABULARY"));
    }
    void run() const {
        void (Run::*const parts[])() const = {&Run::qkv, &Run::mlp, &Run::exit_head, &Run::final_head};
        (this->*parts[program.at("PART")])();
    }
};

class Context : public nvinfer1::IExecutionContext {
 public:
    explicit Context(const Program& program) : program_(program) {}
    bool setOptimizationProfileAsync(std::int32_t profile, CUstream) override {
        profile_ = profile;
        return true;
    }
    void setDeviceMemory(void* memory) override { memory_ = memory; }
    bool setInputShape(const char*, const nvinfer1::Dims& dims) override {
        tokens_ = dims.d[0];
        return tokens_ <= MOST_TOKENS[profile_];
    }
    bool setTensorAddress(const char* name, void* address) override {
        tensors_[name] = address;
        return reinterpret_cast<std::uintptr_t>(address) % 256 == 0;
    }
    bool enqueueV3(CUstream stream) override {
        if (!memory_ || !tokens_) return false;
        const Run run = {program_, tensors_, tokens_};
        stand_in::put(stream, [run] { run.run(); });
        return true;
    }

 private:
    const Program& program_;
    std::map<std::string, void*> tensors_;
    int profile_ = 0, tokens_ = 0;
    void* memory_ = nullptr;
};

class Engine : public nvinfer1::ICudaEngine {
 public:
    explicit Engine(Program program) : program_(std::move(program)) {}
    std::size_t getDeviceMemorySize() const override { return 512; }
    nvinfer1::IExecutionContext* createExecutionContextWithoutDeviceMemory() override {
        return new Context(program_);
    }

 private:
    const Program program_;
};

class Runtime : public nvinfer1::IRuntime {
 public:
    explicit Runtime(nvinfer1::ILogger& log) : log_(log) {}
    nvinfer1::ICudaEngine* deserializeCudaEngine(const void* bytes, std::size_t size) override try {
        return new Engine(Program::parse(static_cast<const char*>(bytes), size));
    } catch (const std::exception& error) {
        log_.log(nvinfer1::ILogger::Severity::kERROR, error.what());
        return nullptr;
    }

 private:
    nvinfer1::ILogger& log_;
};

}  // namespace

extern "C" void* createInferRuntime_INTERNAL(void* logger, std::int32_t) {
    return new Runtime(*static_cast<nvinfer1::ILogger*>(logger));
}

extern "C" std::int32_t getInferLibVersion() {
    return NV_TENSORRT_MAJOR * 1000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}
