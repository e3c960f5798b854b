// The GPU: its context, memory there and on the host, streams, recorded work.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/account.hpp"
#include "driver.hpp"

namespace ojfa::tensorrt {

// One GPU's primary context. Any thread, after `make_current` there.
class Device {
 public:
    // Throws Failure where there is no such GPU. `memory_limit` is as in core::OpenOptions.
    Device(int index, std::uint64_t memory_limit);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    // Makes the context that of this thread.
    void make_current() const { check(driver().cuCtxSetCurrent(context_), "choosing the GPU"); }

    // The same where things are given back: on a device that is lost that fails, too, and does no harm.
    void try_make_current() const noexcept { driver().cuCtxSetCurrent(context_); }

    std::string name;
    std::string compute_capability;  // "9.0"
    std::string driver_version;      // "13.0", of CUDA
    int multiprocessors = 0;
    int shared_bytes = 0;  // of shared memory that a thread block may have
    int major = 0;
    core::Account account;

 private:
    CUdevice handle_ = 0;
    CUcontext context_ = nullptr;
};

// Device memory, freed at its end.
class Buffer {
 public:
    Buffer(Device& device, std::size_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    CUdeviceptr address() const { return address_; }
    std::size_t bytes() const { return bytes_; }

 private:
    Device& device_;
    core::Taken taken_;
    std::size_t bytes_;
    CUdeviceptr address_ = 0;
};

// Memory of the host that the device reads and writes by the same address.
class Pinned {
 public:
    Pinned(Device& device, std::size_t bytes);
    ~Pinned();
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

    template <class T>
    T* as() const {
        return static_cast<T*>(memory_);
    }

 private:
    Device& device_;
    void* memory_ = nullptr;
};

// A point in a stream's work.
class Event {
 public:
    explicit Event(Device& device);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    CUevent handle() const { return event_; }

 private:
    Device& device_;
    CUevent event_ = nullptr;
};

// What work does the same as other work: numbers that hold every address and shape that it is given.
using Key = std::vector<std::uint64_t>;

// A stream and its recordings. Work is added and launched together, as late as it can be: the first time as
// it is, the second time it is recorded, and from then on the recording is launched. TensorRT wants to have
// run once with the shapes and addresses of a recording. One thread at a time.
class Stream {
 public:
    explicit Stream(Device& device);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    CUstream handle() const { return stream_; }
    std::uint64_t number() const { return number_; }  // from 1, no two streams' the same

    // Adds work that is the same whenever its key is.
    void add(const Key& key, std::function<void()> work);

    // Forgets what was added and not launched, and waits for all work, also of a launch that failed.
    void settle();

    // Takes back what was added last, if that is its key; whether it is.
    bool take_back(const Key& key);

    // Puts two pieces of work on the device at once, the small one on a stream of its own; what comes later
    // waits for both. To be called by work.
    void beside(const std::function<void()>& small, const std::function<void()>& work);

    // Launches what was added.
    void flush();

    // How often work was launched.
    std::uint64_t launches() const { return launches_; }

    // How often a launch failed: some of what was added may have been launched, or none.
    std::uint64_t failures() const { return failures_; }

    // The same, and waits for all work.
    void synchronize();

    // Throws Failure where work failed; to be called while waiting for something else than the end of all
    // work.
    void check_alive();

    // Forgets all recordings: they refer to memory that may be given back now.
    void forget();

    void upload(const void* host, CUdeviceptr to, std::size_t bytes);
    void copy(CUdeviceptr from, CUdeviceptr to, std::size_t bytes);
    void clear(CUdeviceptr at, std::size_t bytes);

 private:
    void drop();
    CUgraphExec record();
    void run_all();

    Device& device_;
    const std::uint64_t number_;
    CUstream stream_ = nullptr, side_ = nullptr;
    Event forked_, joined_;
    std::vector<Key> keys_;
    std::vector<std::function<void()>> added_;
    std::uint64_t launches_ = 0, failures_ = 0;
    std::map<std::vector<Key>, CUgraphExec> graphs_;  // null: ran once
};

}  // namespace ojfa::tensorrt
