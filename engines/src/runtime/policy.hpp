// Exits that decide per token: where the exit head is asked, and how sure it must be.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "span.hpp"

namespace ojfa::core {

enum class Measure { top, margin, entropy };

// As in a manifest. Throws Failure for another name.
Measure measure_named(const std::string& name);

// After each of `exits` blocks a token stops where its confidence reaches that exit's threshold; one that is
// sure nowhere takes the full model.
struct Policy {
    std::vector<std::int32_t> exits;
    Measure measure = Measure::top;
    std::vector<double> thresholds;

    // Throws Failure where exits don't increase from 1 on, or thresholds aren't finite, one for each.
    void check() const;
    // Throws Failure where an exit isn't before a model's last block.
    void check_fits(int blocks) const;
};

// How sure a head is of its next token, from logits [V]; larger is surer. The largest probability, what it
// has above the second largest, or the negated entropy in nats.
double confidence(Span<const float> logits, Measure measure);

}  // namespace ojfa::core
