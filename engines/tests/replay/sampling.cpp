// Sampling of the Python runtime repeated: reads a case as JSON a line, writes the distribution that tokens
// are drawn from and the token that a draw stands for, or that it was refused. See tests/both_runtimes.
#include "runtime/sampling.hpp"

#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "failure.hpp"

using Json = nlohmann::json;
using namespace ojfa::core;

namespace {

Json answer_to(const Json& asked) {
    Sampling sampling;
    sampling.temperature = asked["temperature"];
    if (!asked["top_k"].is_null()) sampling.top_k = asked["top_k"].get<int>();
    sampling.top_p = asked["top_p"];
    const auto logits = asked["logits"].get<std::vector<float>>();
    try {
        sampling.check();
    } catch (const Failure& failure) {
        return {{"error", failure.what()}};
    }
    if (sampling.greedy()) return {{"token", likeliest(logits)}};
    return {{"probabilities", sampling.probabilities(logits)},
            {"token", sampling.pick(logits, asked["draw"])}};
}

}  // namespace

int main() {
    std::ios::sync_with_stdio(false);
    for (std::string line; std::getline(std::cin, line);)
        std::cout << answer_to(Json::parse(line)) << std::endl;
}
