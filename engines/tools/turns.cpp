// ojfa-turns: generates what it is asked for, for benchmarks that take turns with another runtime. A line of
// JSON on the standard input asks, a line on the standard output answers; the first one tells of the loading.
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "options.hpp"

namespace {

const char* const USAGE =
    "usage: ojfa-turns BUNDLE [--backend NAME] [--backend-library FILE] [--device N] [--memory-limit BYTES]\n"
    "                  [--no-golden]\n"
    "asks: {\"ids\": [5, 6], \"exit\": \"full\" | \"auto\" | N | {\"exits\": [2], \"measure\": \"top\", "
    "\"thresholds\": [0.9]},\n"
    "       \"max_new_tokens\": 64, \"speculation\": {\"exit\": N, \"draft\": N}, \"temperature\": X, "
    "\"top_k\": N, \"top_p\": X,\n"
    "       \"seed\": N}; all but the ids may be left out. No token ends a text.\n"
    "answers: {\"tokens\": […], \"blocks_run\": […], \"drafted\": […], \"ms\": […]}, ms from each token to "
    "the next.\n";

using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;

double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

ojfa::Policy policy_of(const Json& json) {
    static const std::map<std::string, ojfa::Measure> measures = {
        {"top", ojfa::Measure::top}, {"margin", ojfa::Measure::margin}, {"entropy", ojfa::Measure::entropy}};
    return {json.at("exits").get<std::vector<std::int32_t>>(), measures.at(json.at("measure")),
            json.at("thresholds").get<std::vector<double>>()};
}

// A whole number of 1 or more; what is left out or null is `otherwise`.
int count_of(const Json& asked, const char* name, int otherwise) {
    const auto found = asked.find(name);
    if (found == asked.end() || found->is_null()) return otherwise;
    if (!found->is_number_integer() || *found < 1 || *found > tools::ANY_COUNT)
        throw tools::UsageError(std::string(name) + " must be a whole number of 1 or more, not " +
                                found->dump());
    return found->get<int>();
}

ojfa::GenerateOptions options_of(const Json& asked) {
    ojfa::GenerateOptions options;
    const Json exit = asked.value("exit", Json("full"));
    if (exit.is_object()) {
        options.exit = policy_of(exit);
    } else {
        options.exit = tools::exit_of(exit.is_string() ? exit.get<std::string>() : exit.dump());
    }
    if (asked.contains("speculation")) {
        options.speculation.emplace();
        options.speculation->exit = count_of(asked["speculation"], "exit", 0);
        options.speculation->draft = count_of(asked["speculation"], "draft", 0);
    }
    options.max_new_tokens = count_of(asked, "max_new_tokens", 64);
    options.temperature = asked.value("temperature", 0.0);
    options.top_k = count_of(asked, "top_k", 0);
    options.top_p = asked.value("top_p", 1.0);
    options.seed = tools::seed_of(asked.value("seed", Json(0)).dump());
    options.ignore_eos = true;
    return options;
}

Json answer(const ojfa::Model& model, const Json& asked) {
    auto session = model.session();
    std::vector<std::int32_t> tokens, blocks_run, drafted;
    std::vector<double> ms;
    auto start = Clock::now();
    for (const auto& step : session.generate(asked.at("ids").get<ojfa::TokenIds>(), options_of(asked))) {
        ms.push_back(ms_since(start));
        start = Clock::now();
        tokens.push_back(step.token);
        blocks_run.push_back(step.blocks_run);
        drafted.push_back(step.drafted);
    }
    return {{"tokens", tokens}, {"blocks_run", blocks_run}, {"drafted", drafted}, {"ms", ms}};
}

int body(int argc, char** argv) {
    const tools::CommandLine line(argc, argv, tools::LOAD_OPTIONS, tools::LOAD_FLAGS);
    ojfa::LoadOptions options = tools::load_options(line);
    std::uint64_t told = 0, bytes = 0;
    options.progress = [&](std::uint64_t, std::uint64_t total) {
        ++told;
        bytes = total;
    };
    options.blocks = OJFA_EXIT_FULL;
    const auto start = Clock::now();
    const auto model = ojfa::Model::load(line.operand(), options);
    std::cout << Json{{"loaded_ms", ms_since(start)},
                      {"bytes", bytes},
                      {"progress_calls", told},
                      {"memory_bytes", model.memory()},
                      {"backend", Json::parse(model.backend())}}
              << std::endl;
    for (std::string text; std::getline(std::cin, text);)
        std::cout << answer(model, Json::parse(text)) << std::endl;
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    return tools::run(USAGE, argc, argv, body);
}
