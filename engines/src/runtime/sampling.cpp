#include "runtime/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

std::string shown(double value) {
    std::ostringstream text;
    text << value;
    return text.str();
}

// The most likely tokens: `top_k` of them, and of those the fewest that hold a share `top_p`. Equal ones in
// the order of their ids. Of the vocabulary only they are sorted.
std::vector<std::size_t> kept_tokens(const std::vector<double>& weights, std::optional<int> top_k,
                                     double top_p) {
    std::vector<std::size_t> heap(weights.size());
    std::iota(heap.begin(), heap.end(), std::size_t{0});
    const auto below = [&](std::size_t a, std::size_t b) {
        return weights[a] != weights[b] ? weights[a] < weights[b] : a > b;
    };
    std::make_heap(heap.begin(), heap.end(), below);
    const auto pop = [&] {
        std::pop_heap(heap.begin(), heap.end(), below);
        const std::size_t token = heap.back();
        heap.pop_back();
        return token;
    };
    std::vector<std::size_t> ranked;
    double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    if (top_k) {
        total = 0;
        for (int rank = 0; rank < *top_k && !heap.empty(); ++rank) {
            ranked.push_back(pop());
            total += weights[ranked.back()];
        }
    }
    if (top_p == 1 && top_k) return ranked;  // all, whatever their sums are rounded to
    // A token stays if those before it hold less than top_p: the first always does.
    std::vector<std::size_t> kept;
    double before = 0;
    for (std::size_t rank = 0; before < top_p && (top_k ? rank < ranked.size() : !heap.empty()); ++rank) {
        kept.push_back(top_k ? ranked[rank] : pop());
        before += weights[kept.back()] / total;
    }
    return kept;
}

}  // namespace

std::int32_t likeliest(Span<const float> logits) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

void Sampling::check() const {
    if (!(temperature >= 0 && std::isfinite(temperature)))
        throw usage_failure("temperature must be finite and 0 or more, not " + shown(temperature),
                            "0 is greedy decoding, 1 the model's own distribution");
    if (top_k && *top_k < 1)
        throw usage_failure("top-k must be 1 or more, not " + std::to_string(*top_k),
                            "leave it out to sample among all tokens");
    if (!(top_p > 0 && top_p <= 1))
        throw usage_failure("top-p must be above 0 and at most 1, not " + shown(top_p),
                            "leave it out, or give 1, to sample among all tokens");
}

Random Sampling::generator(int row) const {
    return Random({seed, static_cast<std::uint64_t>(row)});
}

std::int32_t Sampling::pick(Span<const float> logits, double draw) const {
    return static_cast<std::int32_t>(Random::choice(probabilities(logits), draw));
}

std::vector<double> Sampling::probabilities(Span<const float> logits) const {
    const std::size_t size = logits.size();
    const float largest = *std::max_element(logits.begin(), logits.end());
    std::vector<double> weights(size);
    for (std::size_t i = 0; i < size; ++i)
        weights[i] = std::exp((static_cast<double>(logits[i]) - largest) / temperature);
    std::vector<double> probabilities(size, 0.0);
    double sum = 0;
    if (!top_k && top_p == 1) {
        probabilities = std::move(weights);
        sum = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
    } else {
        for (const std::size_t token : kept_tokens(weights, top_k, top_p)) {
            probabilities[token] = weights[token];
            sum += weights[token];
        }
    }
    for (double& each : probabilities) each /= sum;
    return probabilities;
}

}  // namespace ojfa::core
