// Choosing the next token; the same choices as ojfa_export/decoding/sampling.py, from the same random
// numbers.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/random.hpp"
#include "span.hpp"

namespace ojfa::core {

// The largest logit's index, the first of equal ones.
std::int32_t likeliest(Span<const float> logits);

struct Sampling {
    double temperature = 0;    // 0 for greedy; else logits are divided by it
    std::optional<int> top_k;  // sample among so many most likely tokens
    double top_p = 1;          // sample among the fewest tokens that hold this much probability
    std::uint64_t seed = 0;

    // Throws Failure where a setting is out of range.
    void check() const;

    bool greedy() const { return temperature == 0; }

    // The random numbers of one sequence.
    Random generator(int row) const;

    // The token that a number from [0, 1) stands for, by logits [V]; temperature must not be 0.
    std::int32_t pick(Span<const float> logits, double draw) const;

    // The distribution [V] that tokens are drawn from; temperature must not be 0.
    std::vector<double> probabilities(Span<const float> logits) const;
};

}  // namespace ojfa::core
