// Trying bundles that may be damaged: what they say, or how they are refused.
#pragma once

#include <unistd.h>

#include <csignal>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "failure.hpp"
#include "fixtures.hpp"
#include "runtime/model.hpp"

namespace tried {

using namespace ojfa::core;

inline const char* const NAMES[] = {"llama.ojfa", "gpt2.ojfa", "phi3.ojfa"};
constexpr unsigned MOST_SECONDS = 60;  // that a load may take, which is milliseconds on a machine at rest

inline std::string now;  // what is being tried, for who waits in vain

// Ends the process where something waits.
struct TimeLimit {
    TimeLimit() {
        signal(SIGALRM, [](int) {
            std::cerr << "it hangs: " << now << std::endl;
            abort();
        });
        alarm(MOST_SECONDS);
    }
    ~TimeLimit() { alarm(0); }
};

inline LoadOptions reference(bool check_golden = true) {
    LoadOptions options;
    options.backend = "reference";
    options.check_golden = check_golden;
    return options;
}

using Tokens = std::vector<std::int32_t>;

// What a model says of a prompt, at full depth and at an early exit.
inline Tokens tokens_of(Model& model) {
    Tokens tokens;
    for (const int exit : {model.spec().blocks, 2}) {
        const std::unique_ptr<Session> session = model.session({});
        Tokens pending = {5, 17, 200, 33, 8};
        for (int i = 0; i < 4; ++i) {
            std::int32_t chosen = -1;
            session->advance({pending}, exit, {nullptr, &chosen});
            tokens.push_back(chosen);
            pending = {chosen};
        }
    }
    return tokens;
}

inline const Tokens& right_tokens(const std::string& name) {
    static std::map<std::string, Tokens> known;
    Tokens& tokens = known[name];
    if (tokens.empty()) {
        Model model(fixtures::vectors(name), reference());
        tokens = tokens_of(model);
    }
    return tokens;
}

inline void expect_proper(const Failure& failure) {
    const std::string message = failure.what();
    EXPECT_TRUE(failure.status() == OJFA_ERROR_BUNDLE || failure.status() == OJFA_ERROR_BACKEND) << message;
    EXPECT_FALSE(failure.hint().empty()) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

// The tokens of a bundle; what was refused in `refusal` where it can't be used.
inline std::optional<Tokens> used(const std::filesystem::path& bundle, std::string* refusal = nullptr) {
    const TimeLimit limit;
    try {
        Model model(bundle, reference());
        return tokens_of(model);
    } catch (const Failure& failure) {
        expect_proper(failure);
        if (refusal) *refusal = failure.what();
        return std::nullopt;
    }
}

inline std::string refusal(const std::filesystem::path& bundle) {
    std::string said = "nothing was refused";
    used(bundle, &said);
    return said;
}

inline void expect_says(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
}

}  // namespace tried
