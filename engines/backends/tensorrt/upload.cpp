#include "upload.hpp"

#include <algorithm>
#include <utility>

namespace ojfa::tensorrt {
namespace {

constexpr std::size_t PIECE_BYTES = std::size_t{2} << 20;

}  // namespace

Lane::Piece::Piece(Device& device) : memory(device, PIECE_BYTES), copied(device) {}

Lane::Lane(Device& device)
    : device_(device), stream_(device), pieces_{Piece(device), Piece(device), Piece(device)} {}

core::Span<char> Lane::room() {
    device_.make_current();
    at_ = (at_ + 1) % PIECES;
    check(driver().cuEventSynchronize(pieces_[at_].copied.handle()), "copying weights");
    return {pieces_[at_].memory.as<char>(), PIECE_BYTES};
}

void Lane::copy(std::size_t from, CUdeviceptr to, std::size_t bytes) {
    Piece& piece = pieces_[at_];
    stream_.upload(piece.memory.as<char>() + from, to, bytes);
    check(driver().cuEventRecord(piece.copied.handle(), stream_.handle()), "copying weights");
}

std::unique_ptr<Lane> Lanes::lend() {
    {
        const std::lock_guard lock(mutex_);
        if (!unused_.empty()) {
            std::unique_ptr<Lane> lane = std::move(unused_.back());
            unused_.pop_back();
            return lane;
        }
    }
    return std::make_unique<Lane>(device_);
}

void Lanes::take_back(std::unique_ptr<Lane> lane) {
    const std::lock_guard lock(mutex_);
    unused_.push_back(std::move(lane));
}

Uploading::Uploading(Lanes& lanes, std::vector<Destination> destinations, std::uint64_t start)
    : lanes_(lanes), lane_(lanes.lend()), destinations_(std::move(destinations)), position_(start) {}

Uploading::~Uploading() {
    try {
        lane_->finish();
        lanes_.take_back(std::move(lane_));
    } catch (...) {  // its lane isn't used again
    }
}

void Uploading::take(std::size_t count) {
    const std::uint64_t stop = position_ + count;
    for (const Destination& each : destinations_) {
        const std::uint64_t from = std::max(position_, each.offset);
        const std::uint64_t to = std::min(stop, each.offset + each.bytes);
        if (from < to) lane_->copy(from - position_, each.address + (from - each.offset), to - from);
    }
    position_ = stop;
}

}  // namespace ojfa::tensorrt
