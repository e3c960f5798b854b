// Generating with a session, token by token; see ojfa_export/runtime/generation.py. Stop strings need text
// and stay with the caller; stop tokens are here.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "runtime/decoding.hpp"

namespace ojfa::core {

enum class Finish { none, end_of_text, max_new_tokens, cache_full };

struct Token {
    int row;
    std::int32_t id;
    int blocks_run;
    bool drafted;
    Finish finish;
};

class Generation {
 public:
    // `end_tokens` end a sequence. Each sequence of the session continues with its prompt; one without is
    // left alone. Throws Failure where nothing is to be continued.
    Generation(Session& session, std::unique_ptr<Decoder> decoder, Pending prompts, int max_new_tokens,
               std::set<std::int32_t> end_tokens);

    // The next token, or none where all sequences have ended. Where it throws, it can be called again.
    std::optional<Token> next();

 private:
    void step();
    Finish finish(const Chosen& chosen, int count, int room) const;

    Session& session_;
    std::unique_ptr<Decoder> decoder_;
    Pending pending_;
    int max_new_tokens_;
    std::set<std::int32_t> end_tokens_;
    std::vector<int> counts_, lengths_;  // tokens of each sequence: new ones, and those before them
    std::deque<Token> known_;
};

}  // namespace ojfa::core
