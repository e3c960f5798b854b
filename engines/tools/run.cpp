// ojfa-run: generates with a bundle, token ids in, JSON out; the sibling of `ojfa-export run --json`.
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "options.hpp"

namespace {

const char* const USAGE =
    "usage: ojfa-run BUNDLE --ids 1,2,3 [--ids …] [--exit full|auto|N] [--speculate] [--draft-exit N]\n"
    "                [--draft-length N] [--max-new-tokens N] [--temperature X] [--top-p X] [--top-k N]\n"
    "                [--seed N] [--shadow-share X] [--backend NAME] [--backend-library FILE] [--device N]\n"
    "                [--memory-limit BYTES] [--no-golden]\n";

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

const char* name_of(ojfa::Finish finish) {
    switch (finish) {
        case ojfa::Finish::end_of_text:
            return "end_of_text";
        case ojfa::Finish::max_new_tokens:
            return "max_new_tokens";
        case ojfa::Finish::cache_full:
            return "cache_full";
        case ojfa::Finish::none:
            break;
    }
    return nullptr;
}

ojfa::GenerateOptions generate_options(const tools::CommandLine& line) {
    ojfa::GenerateOptions options;
    if (line.has("--exit")) options.exit = tools::exit_of(line.text("--exit", ""));
    if (line.has("--speculate")) {
        options.speculation.emplace();
        options.speculation->exit = line.count("--draft-exit", 0);
        options.speculation->draft = line.count("--draft-length", 0);
    } else if (line.has("--draft-exit") || line.has("--draft-length")) {
        throw tools::UsageError("--draft-exit and --draft-length are settings of --speculate");
    }
    options.max_new_tokens = line.count("--max-new-tokens", 64);
    options.temperature = line.number("--temperature", 0);
    options.top_p = line.number("--top-p", 1);
    if (line.has("--top-k")) {
        const std::int64_t top_k = line.integer("--top-k", 0, std::numeric_limits<std::int64_t>::min());
        tools::check_top_k(top_k);
        options.top_k = static_cast<int>(top_k);
    }
    options.seed = tools::seed_of(line.text("--seed", "0"));
    return options;
}

double shadow_share(const tools::CommandLine& line) {
    const double share = line.number("--shadow-share", 0);
    if (line.has("--shadow-share") && !(share > 0 && share <= 1))
        throw tools::UsageError(
            "--shadow-share must be above 0 and at most 1, not " + line.text("--shadow-share", ""),
            "one token in ten is 0.1");
    return share;
}

int body(int argc, char** argv) {
    std::set<std::string> known = {
        "--ids",         "--exit",  "--draft-exit", "--draft-length", "--max-new-tokens",
        "--temperature", "--top-p", "--top-k",      "--seed",         "--shadow-share"};
    known.insert(tools::LOAD_OPTIONS.begin(), tools::LOAD_OPTIONS.end());
    std::set<std::string> flags = {"--speculate"};
    flags.insert(tools::LOAD_FLAGS.begin(), tools::LOAD_FLAGS.end());
    const tools::CommandLine line(argc, argv, known, flags);
    std::vector<ojfa::TokenIds> prompts;
    for (const std::string& text : line.all("--ids")) prompts.push_back(tools::token_ids(text));
    if (prompts.empty()) throw tools::UsageError("--ids is missing");
    const ojfa::GenerateOptions how = generate_options(line);

    const auto model = ojfa::Model::load(line.operand(), tools::load_options(line));
    ojfa::SessionOptions settings;
    settings.batch_size = static_cast<int>(prompts.size());
    settings.shadow_share = shadow_share(line);
    settings.shadow_seed = how.seed;
    auto session = model.session(settings);
    Json completions = Json::array();
    for (const auto& prompt : prompts)
        completions.push_back({{"prompt_token_ids", prompt},
                               {"token_ids", Json::array()},
                               {"exit_blocks", Json::array()},
                               {"finish_reason", nullptr},
                               {"passes", 0}});
    const auto start = Clock::now();
    double first = 0, seconds = 0;
    std::size_t count = 0;
    for (const auto& step : session.generate_batch(prompts, how)) {
        seconds = seconds_since(start);
        if (!count++) first = seconds;
        Json& completion = completions[static_cast<std::size_t>(step.row)];
        completion["token_ids"].push_back(step.token);
        completion["exit_blocks"].push_back(step.blocks_run);
        // Each pass gives one token that wasn't drafted, unless the text ends before it.
        const bool last = step.finish != ojfa::Finish::none;
        if (!step.drafted || last) completion["passes"] = completion["passes"].get<int>() + 1;
        if (last) completion["finish_reason"] = name_of(step.finish);
    }
    Json document = {{"exit", line.text("--exit", "default")},
                     {"prompts", completions},
                     {"tokens_per_second", seconds > 0 ? static_cast<double>(count) / seconds : 0.0},
                     {"time_to_first_token_ms", first * 1000}};
    if (line.has("--shadow-share")) {
        session.run_shadow_checks();
        const auto stats = session.stats();
        document["shadow"] = {{"checks", stats.shadow_checks}, {"disagreements", stats.shadow_disagreements}};
    }
    std::cout << document.dump(2) << "\n";
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    return tools::run(USAGE, argc, argv, body);
}
