// ojfa-bench: decode and prefill latency of a bundle's exits, JSON out; the sibling of `ojfa-export bench
// --json`.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "options.hpp"

namespace {

const char* const USAGE =
    "usage: ojfa-bench BUNDLE [--exit N|full] [--exit …] [--prompt-length N] [--warmup N] [--iterations N]\n"
    "                  [--logits] [--sessions N] [--backend NAME] [--backend-library FILE] [--device N]\n"
    "                  [--memory-limit BYTES] [--no-golden]\n"
    "--logits copies each step's logits to the host; without it only the likeliest token is asked for.\n"
    "--sessions N also measures N sessions at once, a thread each.\n";

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

// Tokens that an exit decodes before it is the next one's turn, so that noise hits all exits alike.
constexpr int BURST = 8;
constexpr int PREFILLS = 5;
constexpr std::int64_t MOST_SESSIONS = 1024;  // a thread each

struct Settings {
    int prompt_length, warmup, iterations;
    bool logits;
};

double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// The sample below which this share of them lies.
double quantile(std::vector<double> samples, double share) {
    std::sort(samples.begin(), samples.end());
    return samples[static_cast<std::size_t>(share * static_cast<double>(samples.size() - 1) + 0.5)];
}

// One exit: a session whose sequence is about as long as the prompt all the time.
class Measured {
 public:
    Measured(const ojfa::Model& model, int exit, const Settings& settings)
        : session_(model.session()), exit_(exit), settings_(settings) {
        for (int i = 0; i < settings.prompt_length; ++i)
            prompt_.push_back((31 * i + 7) % model.info().vocab_size);
        const int room = model.info().max_length - settings.prompt_length;
        if (room < BURST)
            throw tools::UsageError("the bundle holds " + std::to_string(model.info().max_length) +
                                    " tokens: give a smaller --prompt-length");
    }

    void prefill(bool counts) {
        session_.rewind(0);
        const auto start = Clock::now();
        token_ = session_.advance({prompt_}, exit_, settings_.logits).likeliest[0];
        if (counts) prefills.push_back(ms_since(start));
    }

    void burst(bool counts) {
        session_.rewind(prompt_.size());
        for (int i = 0; i < BURST; ++i) {
            const auto start = Clock::now();
            token_ = session_.advance({{token_}}, exit_, settings_.logits).likeliest[0];
            if (counts) decodes.push_back(ms_since(start));
        }
    }

    Json report() const {
        const double decode = quantile(decodes, 0.5), prefill = quantile(prefills, 0.5);
        return {{"blocks", exit_},
                {"decode_ms_median", decode},
                {"decode_ms_p95", quantile(decodes, 0.95)},
                {"tokens_per_second", 1000 / decode},
                {"prefill_ms_median", prefill},
                {"prefill_ms_p95", quantile(prefills, 0.95)},
                {"prefill_tokens_per_second", 1000 * settings_.prompt_length / prefill}};
    }

    std::vector<double> decodes, prefills;

 private:
    ojfa::Session session_;
    int exit_;
    Settings settings_;
    ojfa::TokenIds prompt_;
    std::int32_t token_ = 0;
};

// Tokens per second of all sessions together.
double concurrent(const ojfa::Model& model, int sessions, int exit, const Settings& settings) {
    std::vector<std::unique_ptr<Measured>> measured;
    for (int i = 0; i < sessions; ++i) {
        measured.push_back(std::make_unique<Measured>(model, exit, settings));
        measured.back()->prefill(false);
        for (int at = 0; at < settings.warmup; at += BURST) measured.back()->burst(false);
    }
    const int bursts = (settings.iterations + BURST - 1) / BURST;
    std::vector<std::thread> threads;
    const auto start = Clock::now();
    for (auto& each : measured)
        threads.emplace_back([&each, bursts] {
            for (int i = 0; i < bursts; ++i) each->burst(false);
        });
    for (auto& thread : threads) thread.join();
    return 1000.0 * sessions * bursts * BURST / ms_since(start);
}

int body(int argc, char** argv) {
    std::set<std::string> known = {"--exit", "--prompt-length", "--warmup", "--iterations", "--sessions"};
    known.insert(tools::LOAD_OPTIONS.begin(), tools::LOAD_OPTIONS.end());
    std::set<std::string> flags = {"--logits"};
    flags.insert(tools::LOAD_FLAGS.begin(), tools::LOAD_FLAGS.end());
    const tools::CommandLine line(argc, argv, known, flags);
    const Settings settings = {line.count("--prompt-length", 128), line.count("--warmup", 10, 0),
                               line.count("--iterations", 50), line.has("--logits")};
    const auto sessions = static_cast<int>(line.integer("--sessions", 0, 0, MOST_SESSIONS));

    const auto loading = Clock::now();
    const auto model = ojfa::Model::load(line.operand(), tools::load_options(line));
    const double load_ms = ms_since(loading);
    std::vector<int> exits;
    for (const std::string& text : line.all("--exit")) {
        const int exit = tools::exit_of(text).number();
        if (exit < 0)
            throw tools::UsageError("exits that decide for each token have no latency of their own");
        exits.push_back(exit ? exit : model.blocks());
    }
    for (int exit = 1; line.all("--exit").empty() && exit <= model.blocks(); ++exit) exits.push_back(exit);

    std::vector<std::unique_ptr<Measured>> measured;
    for (const int exit : exits) measured.push_back(std::make_unique<Measured>(model, exit, settings));
    for (int turn = -1; turn < PREFILLS; ++turn)
        for (auto& each : measured) each->prefill(turn >= 0);
    for (int at = 0; at < settings.warmup; at += BURST)
        for (auto& each : measured) each->burst(false);
    for (int at = 0; at < settings.iterations; at += BURST)
        for (auto& each : measured) each->burst(true);
    Json rows = Json::array(), samples = Json::object();
    for (std::size_t i = 0; i < exits.size(); ++i) {
        rows.push_back(measured[i]->report());
        samples[std::to_string(exits[i])] = {{"decode", measured[i]->decodes},
                                             {"prefill", measured[i]->prefills}};
    }
    Json document = {{"backend", Json::parse(model.backend())},
                     {"version", ojfa_version()},
                     {"load_ms", load_ms},
                     {"settings",
                      {{"prompt_length", settings.prompt_length},
                       {"warmup", settings.warmup},
                       {"iterations", settings.iterations},
                       {"logits", settings.logits}}},
                     {"exits", rows}};
    if (sessions) {
        const double alone = concurrent(model, 1, model.blocks(), settings);
        document["concurrent"] = {
            {"sessions", sessions},
            {"tokens_per_second", concurrent(model, sessions, model.blocks(), settings)},
            {"tokens_per_second_alone", alone}};
    }
    document["memory_bytes"] = model.memory();
    document["samples_ms"] = samples;
    std::cout << document.dump(2) << "\n";
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    return tools::run(USAGE, argc, argv, body);
}
