// Steps that begin before the token before is known: nobody may notice, whatever comes between.
#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

namespace {

const ojfa::TokenIds PROMPT = {5, 6, 7, 8, 9};

ojfa::Model open(const char* name = "llama.ojfa") {
    return ojfa::Model::load(fixtures::bundle(name), {0, fixtures::BACKEND});
}

ojfa::GenerateOptions at(ojfa::Exit exit, double temperature = 0) {
    ojfa::GenerateOptions options;
    options.exit = std::move(exit);
    options.max_new_tokens = 12;
    options.temperature = temperature;
    options.top_k = 40;
    options.seed = 3;
    options.ignore_eos = true;
    return options;
}

// The same tokens one step at a time, by what each step's logits say.
ojfa::TokenIds step_by_step(const ojfa::Model& model, int exit, int count) {
    auto session = model.session();
    ojfa::TokenIds tokens, pending = PROMPT;
    for (int i = 0; i < count; ++i) {
        const ojfa::Answer answer = session.advance({pending}, exit);
        const auto best = std::max_element(answer.logits.begin(), answer.logits.end());
        pending = {static_cast<std::int32_t>(best - answer.logits.begin())};
        tokens.push_back(pending[0]);
    }
    return tokens;
}

ojfa::TokenIds rest_of(ojfa::Generation& generation) {
    ojfa::TokenIds tokens;
    while (const auto step = generation.next()) tokens.push_back(step->token);
    return tokens;
}

class Ahead : public testing::TestWithParam<const char*> {};

}  // namespace

TEST_P(Ahead, GivesTheTokensOfSingleSteps) {
    const auto model = open(GetParam());
    for (int exit = 1; exit <= model.blocks(); ++exit) {
        auto session = model.session();
        auto generation = session.generate(PROMPT, at(exit));
        EXPECT_EQ(rest_of(generation), step_by_step(model, exit, 12));
    }
}

TEST_P(Ahead, WhereAPolicyDecidesToo) {
    const auto model = open(GetParam());
    for (const double threshold : {-1.0, 0.02, 0.05, 0.1, 2.0}) {
        const ojfa::Policy policy = {{1, 3}, ojfa::Measure::top, {threshold, threshold}};
        auto session = model.session(), single = model.session();
        ojfa::TokenIds pending = PROMPT;
        for (const auto& step : session.generate(PROMPT, at(policy))) {
            const ojfa::Decision decision = single.decide({pending}, policy);
            EXPECT_EQ(step.token, decision.likeliest[0]);
            EXPECT_EQ(step.blocks_run, decision.blocks_run[0]);
            pending = {step.token};
            EXPECT_EQ(session.watermarks(), single.watermarks());
        }
        EXPECT_EQ(session.stats().exits, single.stats().exits);
        EXPECT_EQ(session.stats().checks, single.stats().checks);
        EXPECT_EQ(session.stats().exit_heads, single.stats().exit_heads);
    }
}

TEST_P(Ahead, ASessionShowsNothingOfIt) {
    const auto model = open(GetParam());
    auto session = model.session();
    auto generation = session.generate(PROMPT, at(3));
    ojfa::TokenIds held = PROMPT;
    for (int i = 0; i < 6; ++i) {
        const auto token = generation.next()->token;
        EXPECT_EQ(session.tokens(), held);
        EXPECT_EQ(session.lengths()[0], static_cast<int>(held.size()));
        EXPECT_EQ(session.watermarks()[2], static_cast<int>(held.size()));
        EXPECT_EQ(session.stats().exits[3], static_cast<std::uint64_t>(i + 1));
        held.push_back(token);
    }
}

// A session that was alone leaves an answer on its way that no event marks: who joins waits for it by itself.
TEST_P(Ahead, AnotherSessionBeginsMeanwhile) {
    const auto model = open(GetParam());
    for (int exit = 1; exit <= model.blocks(); ++exit) {
        const ojfa::TokenIds expected = step_by_step(model, exit, 12);
        auto session = model.session();
        auto generation = session.generate(PROMPT, at(exit));
        ojfa::TokenIds first;
        for (int i = 0; i < 3; ++i) first.push_back(generation.next()->token);
        auto another = model.session();
        EXPECT_EQ(another.generate(PROMPT, at(exit)).next()->token, expected[0]);
        const ojfa::TokenIds rest = rest_of(generation);
        first.insert(first.end(), rest.begin(), rest.end());
        EXPECT_EQ(first, expected);
    }
}

// What a generation has begun is not what the session is asked for next.
TEST_P(Ahead, IsDroppedWhereSomethingElseComes) {
    const auto model = open(GetParam());
    const auto after = [&](bool began, auto&& between) {
        auto session = model.session();
        if (began) {
            auto generation = session.generate(PROMPT, at(2));
            for (int i = 0; i < 4; ++i) generation.next();
        } else {
            session.advance({PROMPT}, 2);
            for (const auto token : step_by_step(model, 2, 3)) session.advance({{token}}, 2);
        }
        return between(session);
    };
    const std::vector<std::function<std::vector<float>(ojfa::Session&)>> others = {
        [](ojfa::Session& session) { return session.advance({{11}}, 2).logits; },
        [](ojfa::Session& session) { return session.advance({{11}}).logits; },
        [](ojfa::Session& session) { return session.deepen().logits; },
        [](ojfa::Session& session) {
            session.rewind(6);
            return session.advance({{17}}, 2).logits;
        },
        [](ojfa::Session& session) {
            return session.complete({{12, 13}}, {2});
        },
        [](ojfa::Session& session) {
            return session.decide({{14}}, {{1, 3}, ojfa::Measure::top, {2, 2}}).logits;
        },
        [](ojfa::Session& session) {
            auto generation = session.generate({15}, at(2));
            generation.next();
            return session.advance({{16}}, 2).logits;
        },
    };
    for (std::size_t i = 0; i < others.size(); ++i) {
        SCOPED_TRACE(i);
        EXPECT_EQ(after(true, others[i]), after(false, others[i]));
    }
}

TEST_P(Ahead, OfBatchesOfWhichSomeEnd) {
    const auto model = open(GetParam());
    const std::vector<ojfa::TokenIds> prompts = {PROMPT, {3}, {40, 41}};
    std::vector<ojfa::TokenIds> alone, together(3);
    for (const auto& prompt : prompts) {
        auto session = model.session();
        auto generation = session.generate(prompt, at(2));
        alone.push_back(rest_of(generation));
    }
    ojfa::SessionOptions settings;
    settings.batch_size = 3;
    auto session = model.session(settings);
    auto options = at(2);
    options.stop_tokens = {alone[1][4]};  // one ends before the others, and perhaps more
    for (const auto& step : session.generate_batch(prompts, options))
        together[static_cast<std::size_t>(step.row)].push_back(step.token);
    for (std::size_t row = 0; row < 3; ++row) {
        const auto stop = std::find(alone[row].begin(), alone[row].end(), alone[1][4]);
        const ojfa::TokenIds expected(alone[row].begin(), stop == alone[row].end() ? stop : stop + 1);
        EXPECT_EQ(together[row], expected);
    }
}

TEST_P(Ahead, CancellingBetweenAnyTwoTokensChangesNone) {
    const auto model = open(GetParam());
    for (const double temperature : {0.0, 0.9}) {
        auto first = model.session();
        auto whole = first.generate(PROMPT, at(3, temperature));
        const ojfa::TokenIds expected = rest_of(whole);
        for (std::size_t moment = 0; moment < expected.size(); ++moment) {
            auto session = model.session();
            auto generation = session.generate(PROMPT, at(3, temperature));
            ojfa::TokenIds tokens;
            for (std::size_t i = 0; i < moment; ++i) tokens.push_back(generation.next()->token);
            session.cancel();
            EXPECT_THROW(generation.next(), ojfa::Error);
            const ojfa::TokenIds rest = rest_of(generation);
            tokens.insert(tokens.end(), rest.begin(), rest.end());
            EXPECT_EQ(tokens, expected);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Bundles, Ahead, testing::Values("llama.ojfa", "gpt2.ojfa", "phi3.ojfa"));
