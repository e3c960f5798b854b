#include "runtime/policy.hpp"

#include <algorithm>
#include <cmath>

#include "failure.hpp"

namespace ojfa::core {

Measure measure_named(const std::string& name) {
    if (name == "top") return Measure::top;
    if (name == "margin") return Measure::margin;
    if (name == "entropy") return Measure::entropy;
    throw usage_failure("confidence measure '" + name + "' is not known", "known: top, margin, entropy");
}

void Policy::check() const {
    if (thresholds.size() != exits.size())
        throw usage_failure("an exit policy has " + std::to_string(exits.size()) + " exits and " +
                                std::to_string(thresholds.size()) + " thresholds",
                            "give one threshold for each exit");
    for (std::size_t i = 0; i < exits.size(); ++i)
        if (exits[i] < 1 || (i && exits[i] <= exits[i - 1]))
            throw usage_failure("the exits of an exit policy are not increasing from 1 on");
    if (!std::all_of(thresholds.begin(), thresholds.end(), [](double x) { return std::isfinite(x); }))
        throw usage_failure("the thresholds of an exit policy are not all finite",
                            "leave out an exit at which nothing shall stop");
}

void Policy::check_fits(int blocks) const {
    if (!exits.empty() && exits.back() >= blocks)
        throw usage_failure("exit " + std::to_string(exits.back()) +
                                " of the exit policy is outside this model's 1.." +
                                std::to_string(blocks - 1),
                            "tokens that no exit stops run all blocks without being named");
}

double confidence(Span<const float> logits, Measure measure) {
    const float* const best = std::max_element(logits.begin(), logits.end());
    // Terms in float, sums in double, as Python's runtime has them.
    double total = 0, products = 0;
    float second = 0;
    for (const float& logit : logits) {
        const float below = logit - *best, weight = std::exp(below);
        total += weight;
        if (measure == Measure::entropy) products += weight * below;
        if (&logit != best) second = std::max(second, weight);
    }
    if (measure == Measure::entropy) return products / total - std::log(total);
    if (measure == Measure::margin) return static_cast<double>(1.0f - second) / total;
    return 1.0 / total;
}

}  // namespace ojfa::core
