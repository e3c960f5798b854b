#include "mailbox.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace ojfa::tensorrt {
namespace {

// As in engines/kernels/choose.cuh: answers that may be on their way; what is told of a row, each four bytes
// with the number of the answer.
enum { TOKEN, LIKELIEST, TOP, MARGIN, ENTROPY, ANSWER_WORDS };
constexpr std::size_t SLOTS = 8, ROWS = Mailbox::MOST_ROWS;
struct Drawing {
    double draw, top_p;
    float temperature;
    std::int32_t top_k;
};
constexpr std::size_t DRAWINGS_AT = SLOTS * ROWS * ANSWER_WORDS * 8;
constexpr std::size_t MAIL_BYTES = DRAWINGS_AT + SLOTS * ROWS * sizeof(Drawing);
// Smaller temperatures leave the largest logit alone, as this does.
constexpr float LEAST_TEMPERATURE = 1e-30f;
constexpr std::size_t MOST_PARTS = 2048, PART_BYTES = 5 * 8;
constexpr std::size_t DESK_BYTES = 4 * ROWS + 2 * 4 + 4 * ROWS + MOST_PARTS * PART_BYTES + 4 * SLOTS * ROWS;
// Looks for an answer between two at the stream's state.
constexpr unsigned LOOKS_AT_STREAM = 1 << 14;

int word_of(core::Measure measure) {
    if (measure == core::Measure::top) return TOP;
    return measure == core::Measure::margin ? MARGIN : ENTROPY;
}

}  // namespace

Mailbox::Mailbox(Device& device, Stream& stream)
    : stream_(stream), desk_(device, DESK_BYTES), mail_(device, MAIL_BYTES) {
    reset();
}

void Mailbox::reset() {
    stream_.clear(desk_.address(), DESK_BYTES);
    stream_.synchronize();
    std::memset(mail_.as<char>(), 0, MAIL_BYTES);
    given_ = 0;
}

void Mailbox::leave(const core::Sampling& sampling, core::Span<const double> draws) {
    if (sampling.greedy()) return;
    char* at = mail_.as<char>() + DRAWINGS_AT + given_ % SLOTS * ROWS * sizeof(Drawing);
    for (const double draw : draws) {
        const Drawing drawing{draw, sampling.top_p,
                              std::max(static_cast<float>(sampling.temperature), LEAST_TEMPERATURE),
                              sampling.top_k.value_or(0)};
        std::memcpy(at, &drawing, sizeof drawing);
        at += sizeof drawing;
    }
}

core::Choice Mailbox::read(std::uint32_t answer, int row, std::optional<core::Measure> measure) {
    core::Choice choice{static_cast<std::int32_t>(await(answer, row, TOKEN)),
                        static_cast<std::int32_t>(await(answer, row, LIKELIEST)),
                        std::numeric_limits<double>::quiet_NaN()};
    if (measure) {
        const std::uint32_t bits = await(answer, row, word_of(*measure));
        float said;
        std::memcpy(&said, &bits, sizeof said);
        choice.confidence = static_cast<double>(said);
    }
    return choice;
}

const std::uint64_t* Mailbox::word(std::uint32_t answer, int row, int which) const {
    return mail_.as<std::uint64_t>() +
           ((answer - 1) % SLOTS * ROWS + static_cast<std::size_t>(row)) * ANSWER_WORDS +
           static_cast<std::size_t>(which);
}

const std::uint64_t* Mailbox::first_word(std::uint32_t answer) const {
    return word(answer, 0, LIKELIEST);
}

std::uint32_t Mailbox::await(std::uint32_t answer, int row, int which) {
    const std::uint64_t* const at = word(answer, row, which);
    for (unsigned looks = 1;; ++looks) {
        const std::uint64_t found = __atomic_load_n(at, __ATOMIC_ACQUIRE);
        if (found >> 32 == answer) return static_cast<std::uint32_t>(found);
        if (looks % LOOKS_AT_STREAM == 0) stream_.check_alive();
    }
}

}  // namespace ojfa::tensorrt
