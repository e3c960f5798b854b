#include "runtime/speculation.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "failure.hpp"

namespace ojfa::core {
namespace {

// How many tokens' worth the acceptance is believed before anything was drafted.
constexpr double PRIOR_WEIGHT = 4.0;
// A checked token counts this much less with each one after it: about 30 are remembered.
constexpr double MEMORY = 0.97;
// Where drafting doesn't pay, one token is drafted all the same after so many rounds, and then after twice as
// many each time, up to the most, until it pays again.
constexpr int PROBE_ROUNDS = 16, MOST_PROBE_ROUNDS = 128;
constexpr double LEAST_GAIN_TOGETHER = 1.1;

}  // namespace

void Speculation::check() const {
    if (draft && *draft < 1)
        throw usage_failure("the draft length must be 1 or more, not " + std::to_string(*draft));
    for (const double cost : {draft_cost.value_or(0.0), check_cost, round_cost})
        if (!(cost >= 0 && std::isfinite(cost)))
            throw usage_failure("a cost of speculation must be 0 or more, not " + std::to_string(cost));
    if (!(acceptance >= 0 && acceptance <= 1))
        throw usage_failure("an acceptance must be between 0 and 1, not " + std::to_string(acceptance));
}

int Speculation::resolve_exit(int blocks) const {
    const int depth = exit.value_or(std::max(1, blocks / 2));
    if (depth < 1 || depth >= blocks)
        throw usage_failure("exit " + std::to_string(depth) + " can't draft for this model of " +
                                std::to_string(blocks) + " blocks",
                            "drafts need an exit before the last block: 1.." + std::to_string(blocks - 1));
    return depth;
}

DraftLength::DraftLength(double cost, double round_cost, double acceptance, double check_cost)
    : cost_(cost),
      round_cost_(round_cost),
      check_cost_(check_cost),
      accepted_(acceptance * PRIOR_WEIGHT),
      checked_(PRIOR_WEIGHT),
      probe_after_(PROBE_ROUNDS) {}

int DraftLength::next(int together) {
    const double acceptance = accepted_ / checked_;
    const double cost = cost_ - check_cost_ + together * check_cost_ / (1 + (together - 1) * check_cost_);
    int best = 0;
    double tokens = 0, most = -1;
    for (int length = 0; length <= MOST_DRAFT; ++length) {
        tokens += std::pow(acceptance, length);
        const double rate = tokens / (1 + (length ? round_cost_ : 0.0) + length * cost);
        if (rate > most) most = rate, best = length;
    }
    if (best && (together == 1 || most >= LEAST_GAIN_TOGETHER)) {
        rounds_without_ = 0, probe_after_ = PROBE_ROUNDS;
        return best;
    }
    rounds_without_ += 1.0 / together;
    if (rounds_without_ < probe_after_) return 0;
    rounds_without_ = 0;
    probe_after_ = std::min(2 * probe_after_, MOST_PROBE_ROUNDS);
    return 1;
}

void DraftLength::learn(int accepted, int drafted) {
    const int told = accepted + (accepted < drafted);
    for (int i = 0; i < told; ++i) {
        accepted_ = MEMORY * accepted_ + (i < accepted);
        checked_ = MEMORY * checked_ + 1;
    }
}

}  // namespace ojfa::core
