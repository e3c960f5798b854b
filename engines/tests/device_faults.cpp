// What a device can do to the TensorRT backend, by the stand-in's driver: a call that fails, anywhere.
#include "device.hpp"
#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

namespace {

const ojfa::TokenIds PROMPT = {5, 6, 7, 8, 9};

ojfa::TokenIds generate(const ojfa::Model& model, ojfa::Exit exit, bool speculate) {
    ojfa::GenerateOptions options;
    options.exit = std::move(exit);
    if (speculate) options.speculation.emplace();
    options.max_new_tokens = 8;
    options.ignore_eos = true;
    auto session = model.session();
    ojfa::TokenIds tokens;
    for (const auto& step : session.generate(PROMPT, options)) tokens.push_back(step.token);
    return tokens;
}

std::vector<ojfa::TokenIds> every_way(const ojfa::Model& model) {
    return {generate(model, ojfa::Exit::full(), false), generate(model, 2, false),
            generate(model, ojfa::Policy{{1, 3}, ojfa::Measure::top, {0.05, 0.05}}, false),
            generate(model, ojfa::Exit::full(), true)};
}

std::vector<ojfa::TokenIds> load_and_generate() {
    ojfa::LoadOptions options;
    options.blocks = 2;
    return every_way(ojfa::Model::load(fixtures::bundle("llama.ojfa"), options));
}

class Faults : public testing::TestWithParam<CUresult> {};

}  // namespace

// From the first call of loading to the last of a generation: an error that says what it was, and all that
// was taken is given back. Afterwards everything works.
TEST_P(Faults, OfAnyCallAreSaidAndLeaveNothing) {
    const auto expected = load_and_generate();
    const long held = stand_in_held(), before = stand_in_calls();
    load_and_generate();
    EXPECT_EQ(stand_in_held(), held);
    const long calls = stand_in_calls() - before;
    ASSERT_GT(calls, 500);
    int failed = 0;
    for (long call = 1; call <= calls; call += 1 + call / 6) {
        stand_in_fail(static_cast<int>(call), GetParam(), 0);
        try {
            EXPECT_EQ(load_and_generate(), expected) << call;  // of calls whose failure does no harm
        } catch (const ojfa::Error& error) {
            ++failed;
            EXPECT_EQ(error.status(),
                      GetParam() == CUDA_ERROR_OUT_OF_MEMORY ? OJFA_ERROR_OUT_OF_MEMORY : OJFA_ERROR_BACKEND)
                << error.what();
            EXPECT_NE(std::string(error.what()).find("as the test asked for"), std::string::npos)
                << error.what();
            EXPECT_FALSE(error.hint().empty());
        }
        stand_in_fail(0, CUDA_SUCCESS, 0);
        ASSERT_EQ(stand_in_held(), held) << "after call " << call;
    }
    EXPECT_GT(failed, 20);
    EXPECT_EQ(load_and_generate(), expected);
}

// A device that is lost stays so: everything fails, and nothing hangs.
TEST(LostDevice, FailsEverythingAndHangsNothing) {
    const auto model = ojfa::Model::load(fixtures::bundle("llama.ojfa"), {});
    const auto expected = every_way(model);
    for (int call = 1; call < 400; call += 57) {
        const auto other = ojfa::Model::load(fixtures::bundle("llama.ojfa"), {});
        stand_in_fail(call, CUDA_ERROR_ILLEGAL_ADDRESS, 1);
        EXPECT_THROW(every_way(other), ojfa::Error);
        stand_in_fail(0, CUDA_SUCCESS, 0);
    }
    EXPECT_EQ(every_way(model), expected);
}

// A session whose step failed goes on as if nothing had been.
TEST(AfterAFailedCall, ASessionGivesTheSameTokens) {
    const auto model = ojfa::Model::load(fixtures::bundle("llama.ojfa"), {});
    ojfa::GenerateOptions options;
    options.exit = ojfa::Policy{{1, 3}, ojfa::Measure::top, {0.02, 0.02}};
    options.max_new_tokens = 10;
    options.ignore_eos = true;
    const auto tokens_of = [&](int failing) {
        auto session = model.session();
        auto generation = session.generate(PROMPT, options);
        ojfa::TokenIds tokens;
        for (int i = 0; i < 5; ++i) tokens.push_back(generation.next()->token);
        bool failed = false;
        if (failing) stand_in_fail(failing, CUDA_ERROR_OUT_OF_MEMORY, 0);
        for (bool going = true; going;) {
            try {
                const auto step = generation.next();
                going = step.has_value();
                if (going) tokens.push_back(step->token);
            } catch (const ojfa::Error&) {
                failed = true;
            }
        }
        stand_in_fail(0, CUDA_SUCCESS, 0);
        EXPECT_TRUE(failed || failing == 0 || failing > 12) << failing;
        return tokens;
    };
    const auto expected = tokens_of(0);
    for (int failing = 1; failing < 60; ++failing) EXPECT_EQ(tokens_of(failing), expected) << failing;
}

INSTANTIATE_TEST_SUITE_P(Results, Faults,
                         testing::Values(CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_ILLEGAL_ADDRESS));
