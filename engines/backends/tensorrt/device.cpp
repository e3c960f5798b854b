#include "device.hpp"

#include <atomic>
#include <utility>

#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

// Recordings that are kept; when there are more, all begin anew.
constexpr std::size_t MOST_GRAPHS = 256;

std::uint64_t next_number() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

}  // namespace

Device::Device(int index, std::uint64_t memory_limit) : account(memory_limit) {
    check(driver().cuInit(0), "looking for a GPU");
    int count = 0;
    check(driver().cuDeviceGetCount(&count), "counting GPUs");
    if (index >= count)
        throw core::backend_failure(
            "there is no GPU " + std::to_string(index) + ": this process sees " + std::to_string(count),
            "'nvidia-smi' lists them; CUDA_VISIBLE_DEVICES may hide some");
    check(driver().cuDeviceGet(&handle_, index), "opening the GPU");
    char text[128] = {};
    check(driver().cuDeviceGetName(text, sizeof text, handle_), "asking for the GPU's name");
    name = text;
    int minor = 0, version = 0;
    const auto attribute = [this](CUdevice_attribute which, int& value) {
        check(driver().cuDeviceGetAttribute(&value, which, handle_), "asking what the GPU is");
    };
    attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, major);
    attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, minor);
    attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, multiprocessors);
    attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, shared_bytes);
    compute_capability = std::to_string(major) + "." + std::to_string(minor);
    check(driver().cuDriverGetVersion(&version), "asking for the driver's version");
    driver_version = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    check(driver().cuDevicePrimaryCtxRetain(&context_, handle_), "opening the GPU's context");
    make_current();
}

Device::~Device() {
    if (context_) driver().cuDevicePrimaryCtxRelease(handle_);
}

Buffer::Buffer(Device& device, std::size_t bytes)
    : device_(device), taken_(device.account, bytes), bytes_(bytes) {
    device.make_current();
    check(driver().cuMemAlloc(&address_, bytes ? bytes : 1),
          ("taking " + std::to_string(bytes) + " bytes").c_str());
}

Buffer::~Buffer() {
    device_.try_make_current();
    // Waits for work that may use it.
    driver().cuMemFree(address_);
}

Pinned::Pinned(Device& device, std::size_t bytes) : device_(device) {
    device.make_current();
    check(driver().cuMemHostAlloc(&memory_, bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
          "taking memory of the host");
}

Pinned::~Pinned() {
    device_.try_make_current();
    driver().cuMemFreeHost(memory_);
}

Event::Event(Device& device) : device_(device) {
    device.make_current();
    check(driver().cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING), "making an event");
}

Event::~Event() {
    device_.try_make_current();
    driver().cuEventDestroy(event_);
}

Stream::Stream(Device& device) : device_(device), number_(next_number()), forked_(device), joined_(device) {
    device.make_current();
    // What runs beside the stream goes first where both could: it is small.
    int least = 0, greatest = 0;
    check(driver().cuCtxGetStreamPriorityRange(&least, &greatest), "asking for streams' priorities");
    check(driver().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "opening a stream");
    const CUresult made = driver().cuStreamCreateWithPriority(&side_, CU_STREAM_NON_BLOCKING, greatest);
    if (made != CUDA_SUCCESS) driver().cuStreamDestroy(stream_);
    check(made, "opening a stream");
}

Stream::~Stream() {
    device_.try_make_current();
    driver().cuStreamSynchronize(stream_);
    driver().cuStreamSynchronize(side_);
    for (const auto& graph : graphs_)
        if (graph.second) driver().cuGraphExecDestroy(graph.second);
    driver().cuStreamDestroy(stream_);
    driver().cuStreamDestroy(side_);
}

void Stream::add(const Key& key, std::function<void()> work) {
    keys_.push_back(key);
    added_.push_back(std::move(work));
}

void Stream::settle() {
    drop();
    check(driver().cuStreamSynchronize(stream_), "waiting for the GPU");
    check(driver().cuStreamSynchronize(side_), "waiting for the GPU");
}

void Stream::drop() {
    keys_.clear();
    added_.clear();
}

bool Stream::take_back(const Key& key) {
    if (keys_.empty() || keys_.back() != key) return false;
    keys_.pop_back();
    added_.pop_back();
    return true;
}

void Stream::beside(const std::function<void()>& small, const std::function<void()>& work) {
    check(driver().cuEventRecord(forked_.handle(), stream_), "dividing work");
    check(driver().cuStreamWaitEvent(side_, forked_.handle(), 0), "dividing work");
    std::swap(stream_, side_);
    try {
        small();
    } catch (...) {
        std::swap(stream_, side_);
        throw;
    }
    std::swap(stream_, side_);
    check(driver().cuEventRecord(joined_.handle(), side_), "joining work");
    work();
    check(driver().cuStreamWaitEvent(stream_, joined_.handle(), 0), "joining work");
}

void Stream::flush() {
    if (added_.empty()) return;
    ++launches_;
    auto found = graphs_.find(keys_);
    try {
        if (found == graphs_.end()) {
            if (graphs_.size() >= MOST_GRAPHS) forget();
            run_all();
            graphs_[keys_] = nullptr;
        } else {
            if (!found->second) found->second = record();
            check(driver().cuGraphLaunch(found->second, stream_), "launching recorded work");
        }
    } catch (...) {
        ++failures_;
        drop();
        throw;
    }
    drop();
}

void Stream::run_all() {
    for (const auto& work : added_) work();
}

CUgraphExec Stream::record() {
    // Relaxed: calls of other sessions' threads go on meanwhile.
    check(driver().cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_RELAXED), "beginning to record");
    CUgraph graph = nullptr;
    try {
        run_all();
    } catch (...) {
        driver().cuStreamEndCapture(stream_, &graph);
        if (graph) driver().cuGraphDestroy(graph);
        throw;
    }
    check(driver().cuStreamEndCapture(stream_, &graph), "ending to record");
    CUgraphExec executable = nullptr;
    const CUresult made = driver().cuGraphInstantiateWithFlags(&executable, graph, 0);
    driver().cuGraphDestroy(graph);
    check(made, "preparing recorded work");
    driver().cuGraphUpload(executable, stream_);
    return executable;
}

void Stream::synchronize() {
    flush();
    check(driver().cuStreamSynchronize(stream_), "waiting for the GPU");
}

void Stream::check_alive() {
    const CUresult state = driver().cuStreamQuery(stream_);
    if (state != CUDA_ERROR_NOT_READY) check(state, "waiting for an answer of the GPU");
}

void Stream::forget() {
    check(driver().cuStreamSynchronize(stream_), "waiting for the GPU");
    for (const auto& graph : graphs_)
        if (graph.second) driver().cuGraphExecDestroy(graph.second);
    graphs_.clear();
}

void Stream::upload(const void* host, CUdeviceptr to, std::size_t bytes) {
    flush();
    check(driver().cuMemcpyHtoDAsync(to, host, bytes, stream_), "copying to the GPU");
}

void Stream::copy(CUdeviceptr from, CUdeviceptr to, std::size_t bytes) {
    flush();
    check(driver().cuMemcpyDtoDAsync(to, from, bytes, stream_), "copying on the GPU");
}

void Stream::clear(CUdeviceptr at, std::size_t bytes) {
    flush();
    check(driver().cuMemsetD8Async(at, 0, bytes, stream_), "clearing memory of the GPU");
}

}  // namespace ojfa::tensorrt
