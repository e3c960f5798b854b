// Checking a bundle's files, which are given away while they are read.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bundle/held.hpp"
#include "bundle/manifest.hpp"
#include "span.hpp"

namespace ojfa::core {

// Told bytes that were checked, and all that are to be.
using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

// Takes a file's bytes as they are read, in order. Nothing is known of them before all were checked.
class Receiver {
 public:
    virtual ~Receiver() = default;
    Receiver() = default;
    Receiver(const Receiver&) = delete;
    Receiver& operator=(const Receiver&) = delete;

    // Memory for the next bytes; it isn't changed before the next call.
    virtual Span<char> room() = 0;

    // So many bytes are there.
    virtual void take(std::size_t count) = 0;
};

// Who takes a file's bytes; null where nobody does. Any thread.
using Receive = std::function<std::unique_ptr<Receiver>(const std::string& name)>;

// Checks the sizes and digests of files of a bundle, several at a time, which hides the disk's latency.
class Checker {
 public:
    // `progress` is told of all calls together, of which `total` bytes are expected.
    Checker(const HeldFiles& files, const Progress& progress, std::uint64_t total);

    // Throws Failure for a file that can't be read or was altered.
    void check(const std::vector<std::pair<std::string, FileEntry>>& files, const Receive& receive);

 private:
    void check(const std::string& name, const FileEntry& entry, const Receive& receive);
    void tell(std::uint64_t count);

    const HeldFiles& files_;
    const Progress& progress_;
    const std::uint64_t total_;
    std::uint64_t done_ = 0;
    std::mutex mutex_;
};

}  // namespace ojfa::core
