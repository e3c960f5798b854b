// What the Python runtime gave (tests/vectors/make.py), computed again through the public interface.
#include <cmath>

#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

using fixtures::Json;

namespace {

// Logits in fp32 by ONNX Runtime against sums in double: LOGITS_FP32 of tests/tolerances.py. Confidences
// differ by what their logits do.
constexpr double LOGITS = 1e-4, CONFIDENCE = 1e-4;

ojfa::Model open(const std::string& name) {
    ojfa::LoadOptions options;
    options.backend = fixtures::BACKEND;
    return ojfa::Model::load(fixtures::bundle(name + ".ojfa"), options);
}

ojfa::Policy policy_of(const Json& json) {
    const std::string measure = json["measure"];
    const ojfa::Measure known = measure == "top"      ? ojfa::Measure::top
                                : measure == "margin" ? ojfa::Measure::margin
                                                      : ojfa::Measure::entropy;
    return {json["exits"].get<std::vector<std::int32_t>>(), known,
            json["thresholds"].get<std::vector<double>>()};
}

ojfa::Exit exit_of(const Json& json) {
    if (json.is_object()) return policy_of(json);
    if (json.is_number()) return json.get<int>();
    if (json == "full") return ojfa::Exit::full();
    return json == "auto" ? ojfa::Exit::automatic() : ojfa::Exit::planned();
}

ojfa::GenerateOptions options_of(const Json& json) {
    ojfa::GenerateOptions options;
    options.exit = exit_of(json["exit"]);
    options.max_new_tokens = json["max_new_tokens"];
    options.temperature = json["temperature"];
    options.top_k = json["top_k"].is_null() ? 0 : json["top_k"].get<int>();
    options.top_p = json["top_p"];
    options.seed = json["seed"];
    if (json.contains("speculation")) {
        options.speculation.emplace();
        options.speculation->exit = json["speculation"].value("exit", 0);
        options.speculation->draft = json["speculation"].value("draft", 0);
    }
    return options;
}

void listen(void* user, const ojfa_event* event) {
    Json& events = *static_cast<Json*>(user);
    if (event->kind == OJFA_EVENT_EXIT) {
        events.push_back({"exit", event->row, event->position, event->blocks_run});
    } else if (event->kind == OJFA_EVENT_DRAFT) {
        events.push_back({"draft", event->row, event->drafted, event->accepted});
    } else {
        events.push_back({"shadow", event->row, event->position, event->blocks_run, event->agrees != 0});
    }
}

const char* name_of(ojfa::Finish finish) {
    const char* const names[] = {"", "end_of_text", "max_new_tokens", "cache_full"};
    return names[static_cast<int>(finish)];
}

template <class Values>
Json by_blocks(const Values& values) {
    Json result = Json::object();
    for (std::size_t blocks = 1; blocks < values.size(); ++blocks)
        if (values[blocks] != 0) result[std::to_string(blocks)] = values[blocks];
    return result;
}

void expect_stats(const ojfa::Stats& stats, const Json& expected) {
    EXPECT_EQ(by_blocks(stats.exits), expected["exits"]);
    EXPECT_EQ(by_blocks(stats.stopped), expected["stopped"]);
    for (const auto& sum : expected["confidence_sums"].items())
        EXPECT_NEAR(stats.confidence_sums.at(std::stoul(sum.key())), sum.value().get<double>(),
                    50 * CONFIDENCE);
    const Json counts = {{"exit_heads", stats.exit_heads},
                         {"final_heads", stats.final_heads},
                         {"checks", stats.checks},
                         {"drafted", stats.drafted},
                         {"accepted", stats.accepted},
                         {"rounds", stats.rounds},
                         {"shadow_checks", stats.shadow_checks},
                         {"shadow_disagreements", stats.shadow_disagreements}};
    for (const auto& count : counts.items()) EXPECT_EQ(count.value(), expected[count.key()]) << count.key();
}

void run_generation(const ojfa::Model& model, const Json& json) {
    const auto prompts = json["prompts"].get<std::vector<ojfa::TokenIds>>();
    const Json& expected = json["gives"];
    ojfa::SessionOptions settings;
    settings.batch_size = static_cast<int>(prompts.size());
    settings.max_length = json["max_length"];
    if (json.contains("shadow")) {
        settings.shadow_share = json["shadow"]["share"];
        settings.shadow_seed = json["shadow"]["seed"];
    }
    auto session = model.session(settings);
    Json events = Json::array();
    ASSERT_EQ(ojfa_session_listen(session.handle(), listen, &events), OJFA_OK);
    const std::vector<Json> rows(prompts.size(), Json::array());
    std::vector<Json> tokens = rows, blocks = rows, drafted = rows;
    std::vector<std::string> finish(prompts.size());
    for (const auto& step : session.generate_batch(prompts, options_of(json))) {
        const auto row = static_cast<std::size_t>(step.row);
        tokens[row].push_back(step.token);
        blocks[row].push_back(step.blocks_run);
        drafted[row].push_back(step.drafted);
        finish[row] = name_of(step.finish);
    }
    EXPECT_EQ(Json(tokens), expected["tokens"]);
    EXPECT_EQ(Json(blocks), expected["blocks_run"]);
    EXPECT_EQ(Json(drafted), expected["drafted"]);
    EXPECT_EQ(Json(finish), expected["finish"]);
    if (expected.contains("losses")) {
        session.run_shadow_checks();
        for (std::size_t row = 0; row < prompts.size(); ++row) {
            const Json& loss = expected["losses"][row];
            const double actual = session.shadow_loss(row);
            EXPECT_EQ(std::isnan(actual) ? Json() : Json(actual), loss);
        }
    }
    EXPECT_EQ(events, expected["events"]);
    expect_stats(session.stats(), expected["stats"]);
    // What a generation leaves is what it gave, but for the last token.
    for (std::size_t row = 0; row < prompts.size(); ++row) {
        ojfa::TokenIds held = prompts[row];
        for (std::size_t i = 0; i + 1 < tokens[row].size(); ++i) held.push_back(tokens[row][i]);
        EXPECT_EQ(session.tokens(row), held);
    }
}

struct Result {
    std::vector<float> logits;
    ojfa::TokenIds likeliest;  // where the call gives it
};

std::vector<ojfa::TokenIds> tokens_of(const Json& step) {
    return step["tokens"].get<std::vector<ojfa::TokenIds>>();
}

Result decide(ojfa::Session& session, const Json& step, const Json& expected) {
    const ojfa::Decision decision = session.decide(tokens_of(step), policy_of(step["policy"]));
    EXPECT_EQ(Json(decision.blocks_run), expected["blocks_run"]);
    std::size_t at = 0;
    for (const Json& exit : expected["confidence"])
        for (const Json& value : exit) {
            if (value.is_null()) {
                EXPECT_TRUE(std::isnan(decision.confidence.at(at)));
            } else {
                EXPECT_NEAR(decision.confidence.at(at), value.get<double>(), CONFIDENCE);
            }
            ++at;
        }
    return {decision.logits, decision.likeliest};
}

Result do_step(ojfa::Session& session, const Json& step, const Json& expected) {
    const std::string kind = step["do"];
    if (kind == "decide") return decide(session, step, expected);
    if (kind == "rewind") {
        session.rewind(step["length"], step["row"]);
        return {};
    }
    if (kind == "advance_every") return {session.advance_every(tokens_of(step), step["exit"]), {}};
    if (kind == "complete") return {session.complete(tokens_of(step), step["counts"]), {}};
    const ojfa::Answer answer =
        kind == "deepen" ? session.deepen(step["exit"]) : session.advance(tokens_of(step), step["exit"]);
    return {answer.logits, answer.likeliest};
}

void run_steps(const ojfa::Model& model, const Json& json) {
    ojfa::SessionOptions settings;
    settings.batch_size = json["batch_size"];
    settings.max_length = json["max_length"];
    auto session = model.session(settings);
    const auto width = static_cast<std::size_t>(model.info().vocab_size);
    for (std::size_t i = 0; i < json["steps"].size(); ++i) {
        SCOPED_TRACE(json["steps"][i].dump());
        const Json& expected = json["gives"][i];
        const Result result = do_step(session, json["steps"][i], expected);
        ASSERT_EQ(result.logits.size(), expected["logits"].size() * width);
        for (std::size_t row = 0; row < expected["logits"].size(); ++row) {
            const float* const logits = result.logits.data() + row * width;
            for (std::size_t k = 0; k < expected["logits"][row].size(); ++k)
                EXPECT_NEAR(logits[k], expected["logits"][row][k].get<double>(), LOGITS);
            const auto best = static_cast<int>(std::max_element(logits, logits + width) - logits);
            const int likeliest = expected["likeliest"][row];
            EXPECT_EQ(likeliest < 0 ? -1 : best, likeliest);
            EXPECT_EQ(result.likeliest.empty() ? likeliest : result.likeliest[row], likeliest);
        }
        EXPECT_EQ(Json(session.lengths()), expected["lengths"]);
        const auto marks = session.watermarks();
        std::size_t at = 0;
        for (const Json& block : expected["watermarks"])
            for (const int mark : block) EXPECT_EQ(marks.at(at++), mark);
    }
}

class Vectors : public testing::TestWithParam<const char*> {};

TEST_P(Vectors, Generations) {
    const auto model = open(GetParam());
    const Json document = fixtures::read_json(fixtures::vectors(std::string(GetParam()) + ".json"));
    ASSERT_FALSE(document["generations"].empty());
    for (const Json& each : document["generations"]) {
        SCOPED_TRACE(each["name"].get<std::string>());
        run_generation(model, each);
    }
}

TEST_P(Vectors, Sessions) {
    const auto model = open(GetParam());
    const Json document = fixtures::read_json(fixtures::vectors(std::string(GetParam()) + ".json"));
    ASSERT_FALSE(document["sessions"].empty());
    for (const Json& each : document["sessions"]) {
        SCOPED_TRACE(each["name"].get<std::string>());
        run_steps(model, each);
    }
}

#ifdef OJFA_STAND_IN  // in fp16 a device rounds on the way, where a CPU doesn't
INSTANTIATE_TEST_SUITE_P(Bundles, Vectors, testing::Values("llama", "phi3", "qwen3"));
#else
INSTANTIATE_TEST_SUITE_P(Bundles, Vectors, testing::Values("llama", "gpt2", "phi3", "qwen3", "gemma3"));
#endif

}  // namespace
