// Operations of a session repeated:  replay_operations BUNDLE  reads one as JSON a line and writes what came
// of it as JSON a line. tests/both_runtimes does the same in Python and compares; its README says what
// operations there are. Only the public interface is used, on the exact reference backend.
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "ojfa/ojfa.hpp"

using Json = nlohmann::json;

namespace {

std::vector<ojfa::TokenIds> tokens_of(const Json& asked) {
    return asked["tokens"].get<std::vector<ojfa::TokenIds>>();
}

ojfa::Policy policy_of(const Json& json) {
    const std::string name = json["measure"];
    const auto measure = name == "top"      ? ojfa::Measure::top
                         : name == "margin" ? ojfa::Measure::margin
                                            : ojfa::Measure::entropy;
    return {json["exits"].get<std::vector<std::int32_t>>(), measure,
            json["thresholds"].get<std::vector<double>>()};
}

std::int32_t depth_of(const Json& asked) {
    return asked["exit"] == "full" ? OJFA_EXIT_FULL : asked["exit"].get<std::int32_t>();
}

ojfa::Exit exit_of(const Json& json) {
    if (json.is_object()) return policy_of(json);
    if (json.is_number()) return json.get<int>();
    if (json == "full") return ojfa::Exit::full();
    return json == "auto" ? ojfa::Exit::automatic() : ojfa::Exit::planned();
}

ojfa::GenerateOptions options_of(const Json& asked) {
    ojfa::GenerateOptions options;
    options.exit = exit_of(asked["exit"]);
    const Json& sampling = asked["sampling"];
    options.temperature = sampling["temperature"];
    options.top_k = sampling["top_k"].is_null() ? 0 : sampling["top_k"].get<int>();
    options.top_p = sampling["top_p"];
    options.seed = sampling["seed"];
    options.max_new_tokens = asked.value("max_new_tokens", 1);
    options.stop_tokens = asked.value("stop_tokens", ojfa::TokenIds());
    options.ignore_eos = asked.value("ignore_eos", false);
    const Json how = asked.value("speculation", Json());
    if (how.is_null()) return options;
    ojfa::Speculation& speculation = options.speculation.emplace();
    if (!how["exit"].is_null()) speculation.exit = how["exit"];
    if (!how["draft"].is_null()) speculation.draft = how["draft"];
    if (!how["draft_cost"].is_null()) speculation.draft_cost = how["draft_cost"];
    speculation.check_cost = how["check_cost"];
    speculation.round_cost = how["round_cost"];
    speculation.acceptance = how["acceptance"];
    return options;
}

const char* name_of(ojfa::Finish finish) {
    const char* const names[] = {"", "end_of_text", "max_new_tokens", "cache_full"};
    return names[static_cast<int>(finish)];
}

const char* name_of(ojfa_status status) {
    const char* const names[] = {"",          "usage", "bundle",  "backend", "out of memory",
                                 "cancelled", "busy",  "internal"};
    return names[status];
}

class Replay {
 public:
    explicit Replay(const std::string& bundle) : model_(open(bundle)) {}

    // What came of an operation, and what the session is like then.
    Json answer_to(const Json& asked) {
        Json result;
        try {
            result = asked["do"] == "begin" ? begin(asked) : done(asked["do"], asked);
        } catch (const ojfa::Error& error) {
            result = {{"error", name_of(error.status())}, {"message", error.what()}};
        }
        if (session_) result["state"] = state();
        return result;
    }

 private:
    static ojfa::Model open(const std::string& bundle) {
        ojfa::LoadOptions options;
        options.backend = "reference";
        return ojfa::Model::load(bundle, options);
    }

    Json begin(const Json& asked) {
        session_.reset();
        events_ = Json::array();
        ojfa::SessionOptions options;
        options.batch_size = asked["batch_size"];
        options.max_length = asked["max_length"];
        if (!asked["shadow"].is_null()) {
            options.shadow_share = asked["shadow"]["share"];
            options.shadow_seed = asked["shadow"]["seed"];
        }
        session_.emplace(model_.session(options));
        check(ojfa_session_listen(session_->handle(), listen, this));
        return Json::object();
    }

    Json done(const std::string& kind, const Json& asked) {
        ojfa::Session& session = session_.value();
        if (kind == "advance") return answered(session.advance(tokens_of(asked), depth_of(asked)));
        if (kind == "advance_every")
            return logits_only(session.advance_every(tokens_of(asked), depth_of(asked)));
        if (kind == "deepen") return answered(session.deepen(depth_of(asked)));
        if (kind == "complete")
            return logits_only(
                session.complete(tokens_of(asked), asked["counts"].get<std::vector<std::size_t>>()));
        if (kind == "decide") return decided(session, asked);
        if (kind == "generate" || kind == "choose") return generated(session, asked);
        if (kind == "shadow_checks")
            return {{"done",
                     session.run_shadow_checks(asked["budget"].is_null() ? -1 : asked["budget"].get<int>())}};
        if (kind == "shadow_loss") return {{"loss", session.shadow_loss(asked["row"])}};
        if (kind == "reset_stats") return session.reset_stats(), Json::object();
        session.rewind(asked["length"], asked["row"]);
        return Json::object();
    }

    Json logits_only(const std::vector<float>& logits) const {
        const auto width = static_cast<std::ptrdiff_t>(model_.info().vocab_size);
        Json rows = Json::array();
        for (auto row = logits.begin(); row != logits.end(); row += width)
            rows.push_back(std::vector<float>(row, row + width));
        return {{"logits", rows}};
    }

    Json answered(const ojfa::Answer& answer) const {
        Json result = logits_only(answer.logits);
        result["likeliest"] = answer.likeliest;
        return result;
    }

    Json decided(ojfa::Session& session, const Json& asked) const {
        const ojfa::Decision decision = session.decide(tokens_of(asked), policy_of(asked["policy"]));
        Json result = answered(decision);
        result["blocks_run"] = decision.blocks_run;
        result["confidence"] = decision.confidence;
        return result;
    }

    static Json generated(ojfa::Session& session, const Json& asked) {
        Json steps = Json::array();
        for (const auto& step : session.generate_batch(tokens_of(asked), options_of(asked)))
            steps.push_back({step.row, step.token, step.blocks_run, step.drafted, name_of(step.finish)});
        return {{"steps", steps}};
    }

    Json state() {
        const ojfa::Stats stats = session_->stats();
        Json held = Json::array();
        for (std::size_t row = 0; row < session_->batch_size(); ++row) held.push_back(session_->tokens(row));
        Json result = {{"lengths", session_->lengths()},
                       {"tokens", held},
                       {"watermarks", session_->watermarks()},
                       {"events", events_},
                       {"exits", stats.exits},
                       {"stopped", stats.stopped},
                       {"confidence_sums", stats.confidence_sums},
                       {"exit_heads", stats.exit_heads},
                       {"final_heads", stats.final_heads},
                       {"checks", stats.checks},
                       {"drafted", stats.drafted},
                       {"accepted", stats.accepted},
                       {"rounds", stats.rounds},
                       {"shadow_checks", stats.shadow_checks},
                       {"shadow_disagreements", stats.shadow_disagreements}};
        events_ = Json::array();
        return result;
    }

    static void listen(void* user, const ojfa_event* event) {
        Json& events = static_cast<Replay*>(user)->events_;
        if (event->kind == OJFA_EVENT_EXIT) {
            events.push_back({"exit", event->row, event->position, event->blocks_run});
        } else if (event->kind == OJFA_EVENT_DRAFT) {
            events.push_back({"draft", event->row, event->drafted, event->accepted});
        } else {
            events.push_back({"shadow", event->row, event->position, event->blocks_run, event->agrees != 0});
        }
    }

    static void check(ojfa_status status) { ojfa::detail::check(status); }

    ojfa::Model model_;
    std::optional<ojfa::Session> session_;
    Json events_ = Json::array();
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return std::cerr << "usage: replay_operations BUNDLE < operations\n", 2;
    std::ios::sync_with_stdio(false);
    try {
        Replay replay(arguments[1]);
        for (std::string line; std::getline(std::cin, line);)
            std::cout << replay.answer_to(Json::parse(line)) << std::endl;
    } catch (const std::exception& error) {
        return std::cerr << "error: " << error.what() << "\n", 1;
    }
}
