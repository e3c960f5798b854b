#include "runtime/random.hpp"

#include "fixtures.hpp"
#include "runtime/sampling.hpp"

using namespace ojfa::core;

namespace {

const fixtures::Json& stored() {
    static const fixtures::Json document = fixtures::read_json(fixtures::vectors("random.json"))[0];
    return document;
}

}  // namespace

TEST(RandomNumbers, AreNumPys) {
    const auto weights = stored()["weights"].get<std::vector<double>>();
    for (const auto& each : stored()["generators"]) {
        Random random(each["entropy"].get<std::vector<std::uint64_t>>(),
                      each["spawn_key"].get<std::vector<std::uint32_t>>());
        for (const double expected : each["uniform"]) EXPECT_EQ(random.uniform(), expected);
        for (const std::size_t expected : each["drawn"]) EXPECT_EQ(random.choice(weights), expected);
    }
}

TEST(RandomNumbers, NothingWithoutWeightIsDrawn) {
    Random random({1});
    for (int i = 0; i < 1000; ++i) EXPECT_EQ(random.choice({0.0, 0.0, 1.0, 0.0}), 2u);
}

TEST(SamplingCuts, AreThoseOfPython) {
    const auto logits = stored()["logits"].get<std::vector<float>>();
    for (const auto& each : stored()["cuts"]) {
        Sampling sampling;
        sampling.temperature = each["temperature"];
        if (!each["top_k"].is_null()) sampling.top_k = each["top_k"].get<int>();
        sampling.top_p = each["top_p"];
        const std::vector<double> actual = sampling.probabilities(logits);
        const auto expected = each["probabilities"].get<std::vector<double>>();
        ASSERT_EQ(actual.size(), expected.size());
        // As tests/tolerances.py has it for probabilities: sums of a few dozen roundings.
        for (std::size_t i = 0; i < actual.size(); ++i) EXPECT_NEAR(actual[i], expected[i], 1e-12);
    }
}

TEST(SamplingCuts, ATopPOf1KeepsAllWhateverTheirSumsAreRoundedTo) {
    Sampling sampling;
    sampling.temperature = 0.5;
    sampling.top_k = 3;
    const std::vector<float> logits = {0.0f, -9.0f, 9.25f};
    for (const double each : sampling.probabilities(logits)) EXPECT_GT(each, 0);
}

TEST(SamplingCuts, ATinyTemperatureLeavesTheLikeliestAlone) {
    Sampling sampling;
    sampling.temperature = 1e-300;
    const std::vector<float> logits = {1.0f, 3.0f, 2.0f};
    EXPECT_EQ(sampling.probabilities(logits), (std::vector<double>{0, 1, 0}));
}
