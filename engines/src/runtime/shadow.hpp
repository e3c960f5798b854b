// Which tokens are compared with the full model, and what came of it; see ojfa_export/runtime/shadow.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "runtime/random.hpp"

namespace ojfa::core {

// A chosen early token that waits for its comparison.
struct Due {
    int row, position, blocks_run;
    std::int32_t choice;  // the exit's likeliest token
};

class Shadow {
 public:
    // `share` is the probability that a token is chosen, above 0 and at most 1. Throws Failure where it
    // isn't.
    Shadow(double share, const Random& random);

    // The early tokens that are still to be compared, oldest first.
    const std::vector<Due>& due() const { return due_; }

    // Whether the next token is one of those that are compared.
    bool choose() { return random_.uniform() < share_; }

    // Takes a chosen token that stopped early.
    void add(const Due& due);

    // Takes a comparison; one of a token that was due takes it from the list.
    void record(int row, int position, bool agrees);

    // Drops what was chosen after the first `length` tokens of a sequence.
    void forget(int row, int length);

    // The share of a sequence's chosen tokens that differ; none where none was chosen. Throws Failure where
    // some are still to be compared.
    std::optional<double> loss(int row) const;

 private:
    double share_;
    Random random_;
    std::vector<Due> due_;
    std::map<int, std::map<int, std::optional<bool>>> agrees_;  // by row, then position; none: due
};

}  // namespace ojfa::core
