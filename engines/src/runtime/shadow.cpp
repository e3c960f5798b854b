#include "runtime/shadow.hpp"

#include <algorithm>
#include <sstream>

#include "failure.hpp"

namespace ojfa::core {

Shadow::Shadow(double share, const Random& random) : share_(share), random_(random) {
    if (share > 0 && share <= 1) return;
    std::ostringstream text;
    text << "the share of tokens for shadow checks must be above 0 and at most 1, not " << share;
    throw usage_failure(text.str(), "one token in ten is 0.1");
}

void Shadow::add(const Due& due) {
    due_.push_back(due);
    agrees_[due.row][due.position] = std::nullopt;
}

void Shadow::record(int row, int position, bool agrees) {
    agrees_[row][position] = agrees;
    due_.erase(std::remove_if(due_.begin(), due_.end(),
                              [&](const Due& due) { return due.row == row && due.position == position; }),
               due_.end());
}

void Shadow::forget(int row, int length) {
    auto& known = agrees_[row];
    known.erase(known.lower_bound(length), known.end());
    due_.erase(std::remove_if(due_.begin(), due_.end(),
                              [&](const Due& due) { return due.row == row && due.position >= length; }),
               due_.end());
}

std::optional<double> Shadow::loss(int row) const {
    const auto found = agrees_.find(row);
    if (found == agrees_.end() || found->second.empty()) return std::nullopt;
    double differ = 0;
    for (const auto& [position, agrees] : found->second) {
        if (!agrees)
            throw usage_failure("tokens of sequence " + std::to_string(row) + " wait for their shadow checks",
                                "run the shadow checks first");
        differ += !*agrees;
    }
    return differ / static_cast<double>(found->second.size());
}

}  // namespace ojfa::core
