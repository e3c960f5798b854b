// Files of weights to device memory: read into memory that the device can copy from while more is read.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle/files.hpp"
#include "device.hpp"

namespace ojfa::tensorrt {

// A stream, and pieces of pinned memory that it copies from in turns. One thread at a time.
class Lane {
 public:
    explicit Lane(Device& device);

    // The next piece of memory, when the device no longer reads it.
    core::Span<char> room();

    // Copies from that piece.
    void copy(std::size_t from, CUdeviceptr to, std::size_t bytes);

    // Waits for all copies.
    void finish() { stream_.synchronize(); }

 private:
    static constexpr std::size_t PIECES = 3;

    struct Piece {
        explicit Piece(Device& device);
        Pinned memory;
        Event copied;
    };

    Device& device_;
    Stream stream_;
    std::array<Piece, PIECES> pieces_;
    std::size_t at_ = 0;
};

// Lanes, as many as there are files at a time. Any thread.
class Lanes {
 public:
    explicit Lanes(Device& device) : device_(device) {}

    std::unique_ptr<Lane> lend();
    void take_back(std::unique_ptr<Lane> lane);

 private:
    Device& device_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Lane>> unused_;
};

// Where bytes [offset, offset + bytes) of a file go.
struct Destination {
    std::uint64_t offset, bytes;
    CUdeviceptr address;
};

// Copies parts of a file to the device as it is read. One thread at a time.
class Uploading : public core::Receiver {
 public:
    Uploading(Lanes& lanes, std::vector<Destination> destinations, std::uint64_t start = 0);
    ~Uploading() override;

    core::Span<char> room() override { return lane_->room(); }
    void take(std::size_t count) override;

    // Waits until all that was taken is on the device.
    void finish() { lane_->finish(); }

 private:
    Lanes& lanes_;
    std::unique_ptr<Lane> lane_;
    std::vector<Destination> destinations_;
    std::uint64_t position_;
};

}  // namespace ojfa::tensorrt
