// Memory that runs out and cancellation, at any moment: the session is as before, the model and others go on.
#include <cstring>
#include <optional>

#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

namespace {

const ojfa::TokenIds PROMPT = {5, 6, 7, 8, 9};

ojfa::Model open(std::uint64_t memory_limit = 0, const char* name = "llama.ojfa") {
    ojfa::LoadOptions options;
    options.backend = fixtures::BACKEND;
    options.memory_limit = memory_limit;
    options.check_golden = false;
    return ojfa::Model::load(fixtures::bundle(name), options);
}

ojfa::TokenIds tokens_of(ojfa::Generation generation) {
    ojfa::TokenIds tokens;
    for (const auto& step : generation) tokens.push_back(step.token);
    return tokens;
}

ojfa::GenerateOptions at(ojfa::Exit exit) {
    ojfa::GenerateOptions options;
    options.exit = std::move(exit);
    options.max_new_tokens = 12;
    options.ignore_eos = true;
    return options;
}

std::vector<ojfa::GenerateOptions> every_way() {
    std::vector<ojfa::GenerateOptions> ways = {at(ojfa::Exit::full()), at(2), at(ojfa::Exit::automatic()),
                                               at(ojfa::Exit::full()), at(ojfa::Exit::full())};
    ways[3].speculation.emplace();
    ways[4].speculation.emplace();
    ways[4].temperature = 0.9;
    return ways;
}

// Cancels its session at the nth event.
struct Canceller {
    ojfa_session session;
    int left;

    static void listen(void* user, const ojfa_event*) {
        auto* const self = static_cast<Canceller*>(user);
        if (--self->left == 0) ojfa_session_cancel(self->session);
    }
};

}  // namespace

TEST(Memory, RunsOutAnywhereAndTheModelGoesOn) {
    const auto model = open();
    const ojfa::TokenIds expected = tokens_of(model.session().generate(PROMPT, at(ojfa::Exit::full())));
    const std::uint64_t weights = model.memory();
    std::uint64_t whole = 0;
    {
        auto session = model.session();
        tokens_of(session.generate(PROMPT, at(ojfa::Exit::full())));
        whole = model.memory();
    }
    EXPECT_EQ(model.memory(), weights);  // everything of a session is given back
    ASSERT_GT(whole, weights);
    int failed = 0;
    for (std::uint64_t limit = weights; limit <= whole; limit += (whole - weights) / 23 + 1) {
        const auto tight = open(limit);
        std::optional<ojfa::Session> session;
        try {
            session = tight.session();
            EXPECT_EQ(tokens_of(session->generate(PROMPT, at(ojfa::Exit::full()))), expected);
        } catch (const ojfa::Error& error) {
            ++failed;
            EXPECT_EQ(error.status(), OJFA_ERROR_OUT_OF_MEMORY);
            EXPECT_NE(std::string(error.what()).find("of the limit of"), std::string::npos);
            EXPECT_FALSE(error.hint().empty());
            if (session) {
                EXPECT_EQ(session->lengths()[0], 0);  // the prompt was taken back
            }
        }
        EXPECT_LE(tight.memory(), limit);
    }
    EXPECT_GT(failed, 10);
}

TEST(Memory, AFailedSessionHarmsNoOther) {
    const auto model = open();
    auto first = model.session();
    const auto half = tokens_of(first.generate(PROMPT, at(ojfa::Exit::full())));
    const std::uint64_t one = model.memory();
    const auto tight = open(one + 1000);
    auto good = tight.session();
    auto generation = good.generate(PROMPT, at(ojfa::Exit::full()));
    ojfa::TokenIds tokens = {generation.next()->token};
    for (int i = 0; i < 2; ++i) EXPECT_THROW(tight.session().advance({PROMPT}), ojfa::Error);
    while (const auto step = generation.next()) tokens.push_back(step->token);
    EXPECT_EQ(tokens, half);
}

TEST(Cancellation, AtEveryMomentAndThenOn) {
    const auto model = open();
    for (const auto& way : every_way()) {
        const ojfa::TokenIds expected = tokens_of(model.session().generate(PROMPT, way));
        for (int moment = 1; moment < 24; ++moment) {
            auto session = model.session();
            Canceller canceller = {session.handle(), moment};
            ASSERT_EQ(ojfa_session_listen(session.handle(), Canceller::listen, &canceller), OJFA_OK);
            auto generation = session.generate(PROMPT, way);
            ojfa::TokenIds tokens;
            int cancelled = 0;
            for (bool going = true; going;) {
                try {
                    const auto step = generation.next();
                    going = step.has_value();
                    if (going) tokens.push_back(step->token);
                } catch (const ojfa::Error& error) {
                    ASSERT_EQ(error.status(), OJFA_ERROR_CANCELLED);
                    ++cancelled;
                }
            }
            EXPECT_LE(cancelled, 1);
            EXPECT_EQ(tokens, expected);
        }
    }
}

TEST(Cancellation, LeavesASessionAsItWas) {
    const auto model = open(0, "phi3.ojfa");
    auto session = model.session();
    session.advance({PROMPT}, 2);
    const auto marks = session.watermarks();
    session.cancel();
    try {
        session.advance({{1, 2, 3}});
        FAIL() << "it was not cancelled";
    } catch (const ojfa::Error& error) {
        EXPECT_EQ(error.status(), OJFA_ERROR_CANCELLED);
    }
    EXPECT_EQ(session.tokens(), PROMPT);
    EXPECT_EQ(session.watermarks(), marks);
    auto other = model.session();
    other.advance({PROMPT}, 2);
    EXPECT_EQ(session.advance({{1, 2, 3}}).logits, other.advance({{1, 2, 3}}).logits);
}

TEST(Leaks, NothingIsHeldAfterManyGenerations) {
    const auto model = open();
    auto session = model.session();
    tokens_of(session.generate(PROMPT, at(ojfa::Exit::automatic())));
    tokens_of(session.generate({1}, at(ojfa::Exit::full())));
    const std::uint64_t held = model.memory();
    for (int i = 0; i < 100; ++i) {
        session.rewind(0);
        tokens_of(session.generate(PROMPT, at(i % 2 ? ojfa::Exit::automatic() : ojfa::Exit::full())));
    }
    EXPECT_EQ(model.memory(), held);
}
