// Wrong arguments over the C interface, and what handles do.
#include <cmath>
#include <cstring>

#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

extern "C" int generate_from_c(const char* bundle);

namespace {

ojfa_load_options reference() {
    ojfa_load_options options;
    ojfa_load_options_init(&options);
    options.backend = "reference";
    return options;
}

class Interface : public testing::Test {
 protected:
    void SetUp() override {
        const ojfa_load_options options = reference();
        ASSERT_EQ(ojfa_model_load(fixtures::vectors("llama.ojfa").c_str(), &options, &model), OJFA_OK);
        ASSERT_EQ(ojfa_session_open(model, nullptr, &session), OJFA_OK);
    }
    void TearDown() override {
        ojfa_session_close(session);
        ojfa_model_close(model);
    }

    ojfa_model model = {0};
    ojfa_session session = {0};
    const std::vector<std::int32_t> ids = {5, 6, 7};
    const ojfa_tokens tokens = {ids.data(), ids.size()};
    std::vector<float> logits = std::vector<float>(320);
};

void expect_usage(ojfa_status status, const char* part) {
    EXPECT_EQ(status, OJFA_ERROR_USAGE);
    EXPECT_NE(std::string(ojfa_last_error()).find(part), std::string::npos) << ojfa_last_error();
}

}  // namespace

TEST_F(Interface, NullPointersAreRefused) {
    expect_usage(ojfa_model_load(nullptr, nullptr, &model), "bundle is null");
    expect_usage(ojfa_model_load("x", nullptr, nullptr), "model is null");
    expect_usage(ojfa_session_open(model, nullptr, nullptr), "session is null");
    expect_usage(ojfa_model_get_info(model, nullptr), "info is null");
    expect_usage(ojfa_model_policy(model, nullptr), "policy is null");
    expect_usage(ojfa_model_memory(model, nullptr), "bytes is null");
    expect_usage(ojfa_model_backend(model, nullptr, 0, nullptr), "size is null");
    expect_usage(ojfa_session_advance(session, nullptr, 1, nullptr, 0, nullptr), "tokens is null");
    const ojfa_tokens no_ids = {nullptr, 2};
    expect_usage(ojfa_session_advance(session, &no_ids, 1, nullptr, 0, nullptr), "tokens.ids is null");
    expect_usage(ojfa_session_advance_every(session, &tokens, 1, nullptr, 0), "logits is null");
    expect_usage(ojfa_session_decide(session, &tokens, nullptr, nullptr, 0, nullptr, nullptr, nullptr),
                 "policy is null");
    ojfa_policy policy = {nullptr, nullptr, 1, OJFA_MEASURE_TOP};
    std::int32_t blocks = 0;
    expect_usage(ojfa_session_decide(session, &tokens, &policy, nullptr, 0, nullptr, &blocks, nullptr),
                 "policy.exits is null");
    expect_usage(ojfa_session_complete(session, &tokens, nullptr, logits.data(), 320), "counts is null");
    expect_usage(ojfa_session_lengths(session, nullptr), "lengths is null");
    expect_usage(ojfa_session_tokens(session, 0, nullptr, 1, nullptr), "count is null");
    expect_usage(ojfa_session_watermarks(session, nullptr), "marks is null");
    expect_usage(ojfa_session_stats(session, nullptr, nullptr, nullptr, nullptr), "stats is null");
    expect_usage(ojfa_session_run_shadow_checks(session, -1, nullptr), "done is null");
    expect_usage(ojfa_session_shadow_loss(session, 0, nullptr), "loss is null");
    expect_usage(ojfa_generation_start(session, &tokens, nullptr, nullptr), "generation is null");
    ojfa_load_options_init(nullptr);
    ojfa_session_options_init(nullptr);
    ojfa_generate_options_init(nullptr);
    ojfa_speculation_init(nullptr);
}

TEST_F(Interface, ValuesOutOfRangeAreRefused) {
    expect_usage(ojfa_session_advance(session, &tokens, 5, nullptr, 0, nullptr),
                 "exit 5 is outside this model's 1..4");
    expect_usage(ojfa_session_advance(session, &tokens, -1, nullptr, 0, nullptr), "exit -1");
    expect_usage(ojfa_session_advance(session, &tokens, 1, logits.data(), 319, nullptr),
                 "there is room for 319");
    expect_usage(ojfa_session_advance_every(session, &tokens, 1, logits.data(), 320), "the logits need 960");
    const std::int32_t foreign[] = {320, -1};
    for (const std::int32_t& id : foreign) {
        const ojfa_tokens wrong = {&id, 1};
        expect_usage(ojfa_session_advance(session, &wrong, 1, nullptr, 0, nullptr),
                     "token ids outside 0..319");
    }
    const std::vector<std::int32_t> many(65, 1);
    const ojfa_tokens long_text = {many.data(), many.size()};
    expect_usage(ojfa_session_advance(session, &long_text, 1, nullptr, 0, nullptr), "the cache holds 64");
    const ojfa_tokens huge = {ids.data(), SIZE_MAX};
    expect_usage(ojfa_session_advance(session, &huge, 1, nullptr, 0, nullptr), "the cache holds 64");
    expect_usage(ojfa_session_rewind(session, 0, 1), "can't rewind to 1 tokens");
    expect_usage(ojfa_session_rewind(session, 1, 0), "row 1 is outside 0..0");
    expect_usage(ojfa_session_rewind(session, SIZE_MAX, 0), "too large");
    const std::size_t counts[] = {4};
    expect_usage(ojfa_session_complete(session, &tokens, counts, logits.data(), 320), "the logits need 1280");
    std::vector<float> four(4 * 320);
    expect_usage(ojfa_session_complete(session, &tokens, counts, four.data(), four.size()),
                 "of which 3 wait");
    expect_usage(ojfa_model_load_blocks(model, 9), "exit 9");
    std::size_t done = 0;
    expect_usage(ojfa_session_run_shadow_checks(session, -1, &done), "chooses no tokens");
    std::int32_t length = -1;
    EXPECT_EQ(ojfa_session_lengths(session, &length), OJFA_OK);
    EXPECT_EQ(length, 0);  // nothing of all that was taken
}

TEST_F(Interface, OptionsOutOfRangeAreRefused) {
    ojfa_session opened;
    ojfa_session_options options;
    const auto refused = [&](const char* part) {
        expect_usage(ojfa_session_open(model, &options, &opened), part);
        EXPECT_EQ(opened.id, 0u);
        ojfa_session_options_init(&options);
    };
    ojfa_session_options_init(&options);
    options.batch_size = 5, refused("batch size 5 is outside this bundle's 1..4");
    options.batch_size = 0, refused("batch size 0");
    options.max_length = 65, refused("cache length 65");
    options.max_length = -1, refused("cache length -1");
    options.shadow_share = 1.5, refused("must be above 0 and at most 1");
    options.shadow_share = std::nan(""), refused("must be above 0 and at most 1");
    options.struct_size = 3, refused("options have 3 bytes");

    ojfa_generation generation;
    ojfa_generate_options how;
    ojfa_speculation speculation;
    const auto no_start = [&](const char* part) {
        expect_usage(ojfa_generation_start(session, &tokens, &how, &generation), part);
        ojfa_generate_options_init(&how);
        ojfa_speculation_init(&speculation);
    };
    ojfa_generate_options_init(&how);
    ojfa_speculation_init(&speculation);
    how.temperature = -1, no_start("temperature must be finite");
    how.temperature = INFINITY, no_start("temperature must be finite");
    how.top_p = 0, no_start("top-p must be");
    how.top_k = -1, no_start("top-k must be");
    how.max_new_tokens = 0, no_start("max-new-tokens must be 1 or more");
    how.exit = -3, no_start("exit -3");
    how.exit = 7, no_start("exit 7");
    how.speculation = &speculation, how.exit = 2, no_start("an exit was asked for");
    how.speculation = &speculation, speculation.exit = 4, no_start("exit 4 can't draft");
    how.speculation = &speculation, speculation.draft = -1, no_start("0 or more");
    how.speculation = &speculation, speculation.acceptance = 2, no_start("between 0 and 1");
    how.stop_token_count = 1, no_start("stop_tokens is null");
    const ojfa_tokens nothing = {nullptr, 0};
    expect_usage(ojfa_generation_start(session, &nothing, &how, &generation), "every prompt is empty");
    const std::int32_t exits[] = {2, 1}, late[] = {4};
    const double thresholds[] = {0.5, NAN};
    ojfa_policy policy = {exits, thresholds, 2, OJFA_MEASURE_TOP};
    how.policy = &policy, no_start("not increasing");
    policy = {late, thresholds, 1, OJFA_MEASURE_TOP};
    how.policy = &policy, no_start("exit 4 of the exit policy");
    policy = {exits, thresholds + 1, 1, OJFA_MEASURE_TOP};
    how.policy = &policy, no_start("not all finite");
    policy.measure = 9;
    policy.thresholds = thresholds;
    how.policy = &policy, no_start("measure is not known");
}

TEST_F(Interface, APolicyNeedsAThresholdForEachExit) {
    ojfa::LoadOptions options;
    options.backend = "reference";
    auto opened = ojfa::Model::load(fixtures::vectors("llama.ojfa"), options).session();
    const ojfa::Policy policy = {{1, 2}, ojfa::Measure::top, {0.5}};
    EXPECT_THROW(opened.decide({ids}, policy), ojfa::Error);
    EXPECT_THROW(opened.generate(ids, {policy}), ojfa::Error);
    EXPECT_EQ(opened.lengths(), std::vector<std::int32_t>{0});
}

TEST_F(Interface, ClosedAndMadeUpHandlesAreRefused) {
    ojfa_model_info info;
    expect_usage(ojfa_model_get_info({0}, &info), "the handle of a model is null");
    expect_usage(ojfa_model_get_info({987654321}, &info), "is closed or was never one");
    expect_usage(ojfa_model_get_info({session.id}, &info), "is closed or was never one");
    ojfa_generation generation;
    ASSERT_EQ(ojfa_generation_start(session, &tokens, nullptr, &generation), OJFA_OK);
    ojfa_session second;
    ASSERT_EQ(ojfa_session_open(model, nullptr, &second), OJFA_OK);
    ASSERT_EQ(ojfa_session_close(second), OJFA_OK);
    expect_usage(ojfa_session_close(second), "closed");
    expect_usage(ojfa_session_cancel(second), "closed");
    ASSERT_EQ(ojfa_generation_close(generation), OJFA_OK);
    ojfa_step step;
    int more;
    expect_usage(ojfa_generation_next(generation, &step, &more), "closed");
}

TEST_F(Interface, ASessionOutlivesItsModelsHandleAndAGenerationItsSessions) {
    ojfa_generation generation;
    ASSERT_EQ(ojfa_generation_start(session, &tokens, nullptr, &generation), OJFA_OK);
    ASSERT_EQ(ojfa_model_close(model), OJFA_OK);
    ASSERT_EQ(ojfa_session_close(session), OJFA_OK);
    ojfa_step step;
    int more = 0;
    EXPECT_EQ(ojfa_generation_next(generation, &step, &more), OJFA_OK);
    EXPECT_EQ(more, 1);
    EXPECT_EQ(ojfa_generation_close(generation), OJFA_OK);
}

TEST_F(Interface, FromC) {
    EXPECT_GT(generate_from_c(fixtures::vectors("llama.ojfa").c_str()), 0);
}

TEST_F(Interface, ErrorsAreTheThreadsOwn) {
    expect_usage(ojfa_session_close({0}), "null");
    const auto model_again = ojfa::Model::load(fixtures::vectors("llama.ojfa"), {0, "reference"});
    EXPECT_NE(std::strlen(ojfa_last_error()), 0u);  // of the last failed call still
    EXPECT_STREQ(ojfa_version(), OJFA_VERSION);
}

TEST_F(Interface, DescribesItself) {
    std::size_t size = 0;
    ASSERT_EQ(ojfa_model_backend(model, nullptr, 0, &size), OJFA_OK);
    std::vector<char> text(size);
    expect_usage(ojfa_model_backend(model, text.data(), size - 1, &size), "needs");
    ASSERT_EQ(ojfa_model_backend(model, text.data(), size, &size), OJFA_OK);
    EXPECT_EQ(fixtures::Json::parse(text.data())["backend"], "reference");
}
