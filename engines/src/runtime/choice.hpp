// From what a head says to next tokens: what is asked, and what comes of it; see
// ojfa_export/backends/choice.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/policy.hpp"
#include "runtime/sampling.hpp"
#include "span.hpp"

namespace ojfa::core {

// What follows an exit's check. A hint: a device may begin with it before the host has looked.
struct Stop {
    double threshold;  // nothing follows where every row's confidence reaches it
    int first, stop;   // blocks [first, stop) run next on the same rows otherwise
};

// How tokens are chosen from a head's logits.
struct Choosing {
    Sampling sampling;
    Span<const double> draws;        // [rows] from [0, 1), where tokens are sampled
    std::optional<Measure> measure;  // of the confidence that is asked for
    std::optional<Stop> stop;        // at an exit that is checked
};

// Of a row.
struct Choice {
    std::int32_t token;      // the next one
    std::int32_t likeliest;  // that of the largest logit, the first of equal ones
    double confidence;       // as `core::confidence`; NaN where it wasn't asked for
};

// From logits on the host.
Choice choice_of(Span<const float> logits, std::size_t row, const Choosing& how);

// The choices of some rows, which may be on their way.
class Choices {
 public:
    virtual ~Choices() = default;
    Choices() = default;
    Choices(const Choices&) = delete;
    Choices& operator=(const Choices&) = delete;

    // Waits for them.
    virtual const std::vector<Choice>& wait() = 0;
};

// Choices that are there.
class KnownChoices : public Choices {
 public:
    explicit KnownChoices(std::vector<Choice> rows) : rows_(std::move(rows)) {}
    const std::vector<Choice>& wait() override { return rows_; }

 private:
    std::vector<Choice> rows_;
};

}  // namespace ojfa::core
