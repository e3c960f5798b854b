// How answers of the device come to the host: a few numbers in memory that both can reach. Kernels write them
// there, each with the number of its answer (engines/kernels/choose.cuh); the host looks until they are
// there. That is sooner known than the end of all work, which need not have come.
#pragma once

#include <cstdint>
#include <vector>

#include "device.hpp"
#include "runtime/choice.hpp"

namespace ojfa::tensorrt {

// Of one session. One thread at a time.
class Mailbox {
 public:
    // Rows of one answer.
    static constexpr int MOST_ROWS = 64;

    explicit Mailbox(Device& device, Stream& stream);

    // What kernels make answers in, and where they put them. At the first address lie the newest answer's
    // tokens.
    CUdeviceptr desk() const { return desk_.address(); }
    CUdeviceptr mail() const { return reinterpret_cast<CUdeviceptr>(mail_.as<void>()); }

    // Begins anew, with no answer on its way: after a launch of which nobody knows how far it came.
    void reset();

    // Leaves how the tokens of the answer that is launched next are drawn, by a random number each; nothing
    // where they are the likeliest.
    void leave(const core::Sampling& sampling, core::Span<const double> draws);

    // The number of the answer that is launched next, and of one that has been launched.
    std::uint32_t next() const { return given_ + 1; }
    std::uint32_t expect() { return ++given_; }

    // A word that has an answer's number when all of its first row but a sampled token is known.
    const std::uint64_t* first_word(std::uint32_t answer) const;

    // Waits for a row of an answer, one of the last few.
    core::Choice read(std::uint32_t answer, int row, std::optional<core::Measure> measure);

 private:
    const std::uint64_t* word(std::uint32_t answer, int row, int which) const;
    std::uint32_t await(std::uint32_t answer, int row, int which);

    Stream& stream_;
    Buffer desk_;
    Pinned mail_;
    std::uint32_t given_ = 0;  // answers so far
};

}  // namespace ojfa::tensorrt
