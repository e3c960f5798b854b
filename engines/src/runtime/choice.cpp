#include "runtime/choice.hpp"

#include <limits>

namespace ojfa::core {

Choice choice_of(Span<const float> logits, std::size_t row, const Choosing& how) {
    const std::int32_t best = likeliest(logits);
    const double sure =
        how.measure ? confidence(logits, *how.measure) : std::numeric_limits<double>::quiet_NaN();
    return {how.sampling.greedy() ? best : how.sampling.pick(logits, how.draws[row]), best, sure};
}

}  // namespace ojfa::core
