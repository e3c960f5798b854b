// ojfa-run and ojfa-bench as users run them.
#include <sys/wait.h>

#include <cstdio>

#include "fixtures.hpp"

using fixtures::Json;

namespace {

struct Done {
    int status;
    std::string output;
};

Done run(const std::string& command) {
    FILE* const pipe = popen((command + " 2>&1").c_str(), "r");
    std::string output;
    char buffer[4096];
    while (const std::size_t count = fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, count);
    return {WEXITSTATUS(pclose(pipe)), output};
}

std::string bundle() {
    return " " + fixtures::vectors("llama.ojfa").string() + " --backend reference ";
}

}  // namespace

TEST(Programs, RunGivesTheVectorsTokens) {
    const Json stored = fixtures::read_json(fixtures::vectors("llama.json"));
    ASSERT_FALSE(stored["generations"].empty());
    for (const Json& each : stored["generations"]) {
        if (each["exit"].is_object() || each["max_length"] != 64 || each.contains("shadow")) continue;
        std::string command = OJFA_RUN + bundle();
        for (const Json& prompt : each["prompts"]) {
            std::string ids = prompt.dump();
            command += " --ids " + ids.substr(1, ids.size() - 2);
        }
        const Json& exit = each["exit"];
        if (exit != "default")
            command += " --exit " + (exit.is_string() ? exit.get<std::string>() : exit.dump());
        if (each.contains("speculation")) {
            command += " --speculate";
            for (const auto& [key, option] :
                 {std::pair{"exit", " --draft-exit "}, {"draft", " --draft-length "}})
                if (each["speculation"].contains(key)) command += option + each["speculation"][key].dump();
        }
        command += " --max-new-tokens " + each["max_new_tokens"].dump() + " --temperature " +
                   each["temperature"].dump() + " --top-p " + each["top_p"].dump() + " --seed " +
                   each["seed"].dump();
        if (!each["top_k"].is_null()) command += " --top-k " + each["top_k"].dump();
        const Done done = run(command);
        ASSERT_EQ(done.status, 0) << command << "\n" << done.output;
        const Json document = Json::parse(done.output);
        for (std::size_t row = 0; row < each["prompts"].size(); ++row) {
            EXPECT_EQ(document["prompts"][row]["token_ids"], each["gives"]["tokens"][row]) << command;
            EXPECT_EQ(document["prompts"][row]["exit_blocks"], each["gives"]["blocks_run"][row]);
            EXPECT_EQ(document["prompts"][row]["finish_reason"], each["gives"]["finish"][row]);
        }
    }
}

TEST(Programs, BenchMeasuresWhatIsAsked) {
    const Done done = run(OJFA_BENCH + bundle() +
                          "--exit 2 --exit full --prompt-length 8 --warmup 1 --iterations 9 "
                          "--sessions 2");
    ASSERT_EQ(done.status, 0) << done.output;
    const Json document = Json::parse(done.output);
    EXPECT_EQ(document["exits"][0]["blocks"], 2);
    EXPECT_EQ(document["exits"][1]["blocks"], 4);
    EXPECT_EQ(document["samples_ms"]["4"]["decode"].size(), 16u);  // whole bursts
    EXPECT_GT(document["concurrent"]["tokens_per_second"], 0);
}

TEST(Programs, TurnsAnswersEachLine) {
    const Json stored = fixtures::read_json(fixtures::vectors("llama.json"));
    const fixtures::TemporaryDirectory directory;
    std::string lines;
    std::vector<Json> expected;
    for (const Json& each : stored["generations"]) {
        if (each["prompts"].size() != 1 || each["exit"] == "default" || each.contains("shadow")) continue;
        const Json& tokens = each["gives"]["tokens"][0];
        if (each["gives"]["finish"][0] != "max_new_tokens") continue;
        Json asked = {{"ids", each["prompts"][0]},       {"exit", each["exit"]},
                      {"max_new_tokens", tokens.size()}, {"temperature", each["temperature"]},
                      {"top_p", each["top_p"]},          {"seed", each["seed"]},
                      {"top_k", each["top_k"]}};
        if (each.contains("speculation")) asked["speculation"] = each["speculation"];
        lines += asked.dump() + "\n";
        expected.push_back(each["gives"]);
    }
    ASSERT_GT(expected.size(), 3u);
    fixtures::write(directory.path / "asked", lines);
    const Done done = run(OJFA_TURNS + bundle() + "< " + (directory.path / "asked").string());
    ASSERT_EQ(done.status, 0) << done.output;
    std::istringstream answers(done.output);
    std::string line;
    std::getline(answers, line);
    EXPECT_GT(Json::parse(line)["progress_calls"], 3);
    for (const Json& gives : expected) {
        ASSERT_TRUE(std::getline(answers, line));
        const Json answer = Json::parse(line);
        EXPECT_EQ(answer["tokens"], gives["tokens"][0]);
        EXPECT_EQ(answer["blocks_run"], gives["blocks_run"][0]);
        EXPECT_EQ(answer["ms"].size(), answer["tokens"].size());
    }
}

TEST(Programs, MistakesAreSaidAndGiveStatusTwo) {
    const std::pair<std::string, const char*> cases[] = {
        {OJFA_RUN + std::string(""), "BUNDLE is missing"},
        {OJFA_RUN + bundle(), "--ids is missing"},
        {OJFA_RUN + bundle() + "--ids 1,x", "'x' is no number"},
        {OJFA_RUN + bundle() + "--ids 99999", "token ids outside"},
        {OJFA_RUN + bundle() + "--ids 1 --exit 9", "exit 9 is outside"},
        {OJFA_RUN + bundle() + "--ids 1 --colour red", "no such option"},
        {OJFA_RUN + bundle() + "--ids 1 --draft-exit 1", "settings of --speculate"},
        {OJFA_RUN + bundle() + "--ids 1 --exit 0", "is not full, auto, or a number of blocks"},
        {OJFA_RUN + bundle() + "--ids 1 --seed -1", "seed must be 0 or more, not -1\nhint: leave it out"},
        {OJFA_RUN + bundle() + "--ids 1 --seed 1.5", "'1.5' is no number"},
        {OJFA_RUN + bundle() + "--ids 1 --top-k 0", "top-k must be 1 or more, not 0\nhint: leave it out"},
        {OJFA_RUN + bundle() + "--ids 1 --top-k 4294967297", "--top-k must be 2147483647 or less"},
        {OJFA_RUN + bundle() + "--ids 1 --top-p 0", "top-p must be above 0 and at most 1, not 0"},
        {OJFA_RUN + bundle() + "--ids 1 --temperature nan", "temperature must be finite and 0 or more"},
        {OJFA_RUN + bundle() + "--ids 1 --max-new-tokens 0", "--max-new-tokens must be 1 or more, not 0"},
        {OJFA_RUN + bundle() + "--ids 1 --max-new-tokens 4294967297", "must be 2147483647 or less"},
        {OJFA_RUN + bundle() + "--ids 1 --speculate --draft-exit 0", "--draft-exit must be 1 or more"},
        {OJFA_RUN + bundle() + "--ids 1 --speculate --draft-length 0", "--draft-length must be 1 or more"},
        {OJFA_RUN + bundle() + "--ids 1 --shadow-share 0", "must be above 0 and at most 1, not 0"},
        {OJFA_RUN + bundle() + "--ids 1 --speculate --shadow-share 0.5", "nothing to check in the shadow"},
        {OJFA_RUN + bundle() + "--ids 1 --device 4294967296", "--device must be 2147483647 or less"},
        {OJFA_RUN + bundle() + "--ids 1 --memory-limit -1", "--memory-limit must be 0 or more"},
        {OJFA_BENCH + bundle() + "--iterations 0", "--iterations must be 1 or more, not 0"},
        {OJFA_BENCH + bundle() + "--exit auto", "no latency of their own"},
        {OJFA_BENCH + bundle() + "--prompt-length 60", "smaller --prompt-length"},
    };
    for (const auto& [command, said] : cases) {
        const Done done = run(command);
        EXPECT_EQ(done.status, 2) << command;
        EXPECT_NE(done.output.find(said), std::string::npos) << done.output;
    }
    for (const char* const asked : {R"({"ids": [1], "seed": -1})", R"({"ids": [1], "top_k": 0})",
                                    R"({"ids": [1], "exit": 0})", R"({"ids": [1], "max_new_tokens": 1.5})"}) {
        const Done done = run("echo '" + std::string(asked) + "' | " + OJFA_TURNS + bundle());
        EXPECT_EQ(done.status, 2) << asked;
        EXPECT_NE(done.output.find("error: "), std::string::npos) << done.output;
    }
    const Done absent = run(OJFA_RUN + std::string(" /nowhere --backend reference --ids 1"));
    EXPECT_EQ(absent.status, 1);
    EXPECT_NE(absent.output.find("hint: "), std::string::npos);
}
