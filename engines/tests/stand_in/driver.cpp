// A stand-in for NVIDIA's driver: device memory is the host's, kernels are functions (kernels.cpp), and a
// stream does everything as late as it may. Calls can be made to fail.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "device.hpp"

using stand_in::Work;

struct CUstream_st {
    std::deque<Work> waiting;
    std::shared_ptr<std::vector<Work>> recording;
};
struct Mark {
    CUstream stream;
    bool passed = false;
};
struct CUevent_st {
    std::shared_ptr<Mark> mark;                    // where it was recorded last
    std::shared_ptr<std::vector<Work>> recording;  // in which it was recorded
};
struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::vector<Work> work;
};
struct CUfunc_st {
    const stand_in::Kernel* kernel;
    stand_in::Program* program;
    int tokens, shared_bytes = 48 << 10;
};
struct CUmod_st {
    stand_in::Program program;
    std::vector<std::unique_ptr<CUfunc_st>> functions;
};

namespace {

constexpr int AT_A_TIME = 29;

std::recursive_mutex mutex;
std::map<char*, std::size_t> memory, pinned;
std::set<CUstream> streams;
long calls = 0, fails_at = 0, objects = 0;
CUresult failure = CUDA_SUCCESS;
bool stays = false;

// Of one call of the driver: whether it shall fail.
class Call {
 public:
    Call() : lock_(mutex) {
        ++calls;
        if (fails_at && (calls == fails_at || (stays && calls > fails_at))) result = failure;
    }
    CUresult result = CUDA_SUCCESS;

 private:
    std::lock_guard<std::recursive_mutex> lock_;
};

#define BEGIN  \
    Call call; \
    if (call.result != CUDA_SUCCESS) return call.result;

void step(CUstream stream) {
    const Work work = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    work();
}

void finish(CUstream stream) {
    while (!stream->waiting.empty()) step(stream);
}

// Who asks again sees it go on.
void go_on(CUstream stream) {
    for (int i = 0; i < AT_A_TIME && !stream->waiting.empty(); ++i) step(stream);
}

void pass(const Mark& mark) {
    while (!mark.passed) step(mark.stream);
}

bool is_pinned(const void* at) {
    const char* const address = static_cast<const char*>(at);
    return std::any_of(pinned.begin(), pinned.end(), [address](const auto& each) {
        return address >= each.first && address < each.first + each.second;
    });
}

void* host(CUdeviceptr address) {
    return reinterpret_cast<void*>(address);
}

CUresult take(std::map<char*, std::size_t>& kind, void** at, std::size_t bytes) {
    char* const taken = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset(taken, 0xcd, bytes);  // what was there before is nobody's
    kind[taken] = bytes;
    *at = taken;
    return CUDA_SUCCESS;
}

CUresult give_back(std::map<char*, std::size_t>& kind, void* at) {
    for (const CUstream stream : streams) finish(stream);  // as it waits for work that may use it
    char* const address = static_cast<char*>(at);
    const auto found = kind.find(address);
    if (found == kind.end()) return CUDA_ERROR_INVALID_VALUE;
    std::memset(address, 0xab, found->second);
    std::free(address);
    kind.erase(found);
    return CUDA_SUCCESS;
}

template <class Object>
CUresult make(Object** made) {
    *made = new Object();
    ++objects;
    return CUDA_SUCCESS;
}

template <class Object>
CUresult destroy(Object* object) {
    delete object;
    --objects;
    return CUDA_SUCCESS;
}

}  // namespace

void stand_in::put(CUstream stream, Work work) {
    const std::lock_guard lock(mutex);
    if (stream->recording) {
        stream->recording->push_back(std::move(work));
    } else {
        stream->waiting.push_back(std::move(work));
    }
}

void stand_in_fail(int call, CUresult result, int stays_so) {
    const std::lock_guard lock(mutex);
    fails_at = call ? calls + call : 0;
    failure = result;
    stays = stays_so != 0;
}

long stand_in_calls() {
    const std::lock_guard lock(mutex);
    return calls;
}

long stand_in_held() {
    const std::lock_guard lock(mutex);
    long held = objects;
    for (const auto* kind : {&memory, &pinned})
        for (const auto& each : *kind) held += static_cast<long>(each.second);
    return held;
}

CUresult cuInit(unsigned) {
    BEGIN;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int) {
    BEGIN;
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
    BEGIN;
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
    BEGIN;
    std::strncpy(name, "stand-in", static_cast<std::size_t>(length));
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    BEGIN;
    *value = which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                ? 8
             : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR          ? 9
             : which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 << 10
                                                                              : 0;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
    BEGIN;
    *version = 13000;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    BEGIN;
    *context = reinterpret_cast<CUcontext>(&mutex);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) {
    BEGIN;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    BEGIN;
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "as the test asked for";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult result, const char** name) {
    *name = result == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return CUDA_SUCCESS;
}
CUresult cuMemGetInfo(size_t* free, size_t* all) {
    BEGIN;
    // A device works whoever waits: another session's thread may be held up by the one that asks this.
    for (const CUstream stream : streams) go_on(stream);
    *free = *all = std::size_t{1} << 30;
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    BEGIN;
    void* taken = nullptr;
    const CUresult result = take(memory, &taken, bytes);
    *address = reinterpret_cast<CUdeviceptr>(taken);
    return result;
}
CUresult cuMemFree(CUdeviceptr address) {
    const Call call;
    return give_back(memory, host(address));
}
CUresult cuMemHostAlloc(void** taken, size_t bytes, unsigned) {
    BEGIN;
    return take(pinned, taken, bytes);
}
CUresult cuMemFreeHost(void* at) {
    const Call call;
    return give_back(pinned, at);
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    BEGIN;
    if (is_pinned(from)) {
        stand_in::put(stream, [=] { std::memcpy(host(to), from, bytes); });
    } else {  // other memory is read at once
        const std::vector<char> now(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
        stand_in::put(stream, [=] { std::memcpy(host(to), now.data(), bytes); });
    }
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    BEGIN;
    stand_in::put(stream, [=] { std::memcpy(to, host(from), bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    BEGIN;
    stand_in::put(stream, [=] { std::memmove(host(to), host(from), bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
    BEGIN;
    stand_in::put(stream, [=] { std::memset(host(at), value, bytes); });
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* event, unsigned) {
    BEGIN;
    return make(event);
}
CUresult cuEventDestroy(CUevent event) {
    const Call call;
    for (const CUstream stream : streams) finish(stream);
    return destroy(event);
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    BEGIN;
    event->recording = stream->recording;
    if (event->recording) return CUDA_SUCCESS;  // recorded work is done in the order of its recording
    event->mark = std::make_shared<Mark>(Mark{stream});
    stand_in::put(stream, [mark = event->mark] { mark->passed = true; });
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    BEGIN;
    if (event->mark) pass(*event->mark);
    return CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* stream, unsigned) {
    BEGIN;
    make(stream);
    streams.insert(*stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}
CUresult cuStreamDestroy(CUstream stream) {
    const Call call;
    finish(stream);
    streams.erase(stream);
    return destroy(stream);
}
CUresult cuStreamQuery(CUstream stream) {
    BEGIN;
    if (stream->waiting.empty()) return CUDA_SUCCESS;
    go_on(stream);
    return CUDA_ERROR_NOT_READY;
}
CUresult cuStreamSynchronize(CUstream stream) {
    BEGIN;
    finish(stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    BEGIN;
    if (event->recording) {
        stream->recording = event->recording;  // it joins in
        return CUDA_SUCCESS;
    }
    if (event->mark) stand_in::put(stream, [mark = event->mark] { pass(*mark); });
    return CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
    BEGIN;
    stream->recording = std::make_shared<std::vector<Work>>();
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    const Call call;
    const auto recording = stream->recording;
    for (const CUstream each : streams)
        if (each->recording == recording) each->recording.reset();
    if (call.result != CUDA_SUCCESS) return call.result;
    make(graph);
    (*graph)->work = *recording;
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    BEGIN;
    make(executable);
    (*executable)->work = graph->work;
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    const Call call;
    return destroy(graph);
}
CUresult cuGraphExecDestroy(CUgraphExec executable) {
    const Call call;
    return destroy(executable);
}
CUresult cuGraphUpload(CUgraphExec, CUstream) {
    BEGIN;
    return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    BEGIN;
    for (const Work& work : executable->work) stand_in::put(stream, work);
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    BEGIN;
    make(module);
    (*module)->program = stand_in::Program::parse(static_cast<const char*>(image), 4096);
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    const Call call;
    return destroy(module);
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    BEGIN;
    std::string plain = name;
    int tokens = 0;
    if (const size_t end = plain.rfind('_'); end != std::string::npos && std::isdigit(plain[end + 1])) {
        tokens = std::stoi(plain.substr(end + 1));
        plain.resize(end);
    }
    const auto found = stand_in::kernels().find(plain);
    if (found == stand_in::kernels().end()) return CUDA_ERROR_NOT_FOUND;
    module->functions.emplace_back(new CUfunc_st{&found->second, &module->program, tokens});
    *function = module->functions.back().get();
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    BEGIN;
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) function->shared_bytes = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
    BEGIN;
    if (index >= function->kernel->sizes.size()) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0;
    *size = function->kernel->sizes[index];
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
    BEGIN;
    const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if (!threads || threads > 1024 || config->sharedMemBytes > static_cast<unsigned>(function->shared_bytes))
        return CUDA_ERROR_INVALID_VALUE;
    const stand_in::Launch launch = {static_cast<int>(config->gridDimX), static_cast<int>(config->gridDimY),
                                     static_cast<int>(config->gridDimZ), function->tokens};
    stand_in::put(config->hStream, function->kernel->bind(*function->program, launch, arguments));
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char* name, void** function, int, cuuint64_t) {
    static const std::map<std::string, void*> functions = {
#define NAMED(name) {#name, reinterpret_cast<void*>(&name)}
        NAMED(cuInit),
        NAMED(cuDeviceGet),
        NAMED(cuDeviceGetCount),
        NAMED(cuDeviceGetName),
        NAMED(cuDeviceGetAttribute),
        NAMED(cuDriverGetVersion),
        NAMED(cuDevicePrimaryCtxRetain),
        NAMED(cuDevicePrimaryCtxRelease),
        NAMED(cuCtxSetCurrent),
        NAMED(cuCtxGetStreamPriorityRange),
        NAMED(cuGetErrorString),
        NAMED(cuGetErrorName),
        NAMED(cuMemGetInfo),
        NAMED(cuMemAlloc),
        NAMED(cuMemFree),
        NAMED(cuMemHostAlloc),
        NAMED(cuMemFreeHost),
        NAMED(cuMemcpyHtoDAsync),
        NAMED(cuMemcpyDtoHAsync),
        NAMED(cuMemcpyDtoDAsync),
        NAMED(cuMemsetD8Async),
        NAMED(cuEventCreate),
        NAMED(cuEventDestroy),
        NAMED(cuEventRecord),
        NAMED(cuEventSynchronize),
        NAMED(cuStreamCreate),
        NAMED(cuStreamCreateWithPriority),
        NAMED(cuStreamDestroy),
        NAMED(cuStreamQuery),
        NAMED(cuStreamSynchronize),
        NAMED(cuStreamWaitEvent),
        NAMED(cuStreamBeginCapture),
        NAMED(cuStreamEndCapture),
        NAMED(cuGraphInstantiateWithFlags),
        NAMED(cuGraphDestroy),
        NAMED(cuGraphExecDestroy),
        NAMED(cuGraphUpload),
        NAMED(cuGraphLaunch),
        NAMED(cuModuleLoadData),
        NAMED(cuModuleUnload),
        NAMED(cuModuleGetFunction),
        NAMED(cuFuncSetAttribute),
        NAMED(cuFuncGetParamInfo),
        NAMED(cuLaunchKernelEx),
#undef NAMED
    };
    const auto found = functions.find(name);
    if (found == functions.end()) return CUDA_ERROR_NOT_FOUND;
    *function = found->second;
    return CUDA_SUCCESS;
}
