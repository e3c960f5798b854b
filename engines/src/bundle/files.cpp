#include "bundle/files.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>

#include "bundle/sha256.hpp"
#include "failure.hpp"

namespace ojfa::core {
namespace {

const char* const WHOLE = "copy the bundle again whole, or build it again";
constexpr std::size_t PIECE = 1 << 20;
// Files that are read at a time even where there are fewer cores: the disk has other things to wait for.
constexpr std::size_t LEAST_READERS = 8;

}  // namespace

Checker::Checker(const HeldFiles& files, const Progress& progress, std::uint64_t total)
    : files_(files), progress_(progress), total_(total) {}

void Checker::check(const std::vector<std::pair<std::string, FileEntry>>& files, const Receive& receive) {
    std::vector<const std::pair<std::string, FileEntry>*> order;
    order.reserve(files.size());
    for (const auto& file : files) order.push_back(&file);
    // The largest files first, so that none is last.
    std::stable_sort(order.begin(), order.end(),
                     [](auto* a, auto* b) { return a->second.size > b->second.size; });
    std::atomic<std::size_t> next{0};
    std::atomic<bool> stop{false};
    std::exception_ptr failed;
    const auto work = [&] {
        for (std::size_t at = next++; at < order.size() && !stop; at = next++) {
            try {
                check(order[at]->first, order[at]->second, receive);
            } catch (...) {
                const std::lock_guard lock(mutex_);
                if (!failed) failed = std::current_exception();
                stop = true;
            }
        }
    };
    const std::size_t wanted = std::max<std::size_t>(LEAST_READERS, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    try {
        for (std::size_t i = 1; i < std::min(wanted, order.size()); ++i) threads.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads: those that are there do it
    }
    work();
    for (std::thread& thread : threads) thread.join();
    if (failed) std::rethrow_exception(failed);
}

void Checker::check(const std::string& name, const FileEntry& entry, const Receive& receive) {
    const std::filesystem::path path = files_.directory() / name;
    const std::uint64_t size = files_.size(name);
    if (size != entry.size)
        throw bundle_failure(path.string() + " has " + std::to_string(size) + " bytes, its manifest says " +
                                 std::to_string(entry.size),
                             WHOLE);
    const std::unique_ptr<Receiver> receiver = receive ? receive(name) : nullptr;
    std::vector<char> own(receiver ? 0 : PIECE);
    Sha256 digest;
    HeldFile file = files_.open(name);
    while (true) {
        const Span<char> room = receiver ? receiver->room() : Span<char>(own);
        const std::size_t count = file.read(room);
        if (!count) break;
        if (receiver) receiver->take(count);
        digest.add(room.data(), count);
        tell(count);
    }
    if (digest.hex() != entry.sha256)
        throw bundle_failure(path.string() + " was altered: its SHA-256 differs", WHOLE);
}

void Checker::tell(std::uint64_t count) {
    if (!progress_) return;
    const std::lock_guard lock(mutex_);
    done_ += count;
    progress_(done_, total_);
}

}  // namespace ojfa::core
