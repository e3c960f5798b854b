// A session: advancing sequences to an exit, fixed or decided, and checks in the shadow; see
// ojfa_export/runtime/session.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/events.hpp"
#include "runtime/policy.hpp"
#include "runtime/sequences.hpp"
#include "runtime/shadow.hpp"
#include "runtime/stats.hpp"

namespace ojfa::core {

// Where answers of each sequence go; what is null isn't wanted.
struct Answers {
    float* logits = nullptr;            // [sequences, V]; zero for sequences without new tokens
    std::int32_t* likeliest = nullptr;  // [sequences]; -1 for those
};

// Blocks to run for an exit: 0, for full depth, or 1 to all. Throws Failure for another.
int resolve_exit(int exit, int blocks);

// Used by one thread at a time, but for `cancel`. Where an operation fails, the sequences are as before.
class Session : public Sequences {
 public:
    Session(const ModelSpec& spec, Engines& engines, int batch_size, int max_length,
            std::optional<Shadow> shadow = std::nullopt);

    Stats stats;
    Listener on_event;  // called in the middle of a step; it must not use the session

    // Appends tokens and runs them through the first `depth` blocks.
    void advance(const TokenRows& tokens, int depth, Answers answers);

    // The same, with the logits of every new token: [all new tokens, V]. Shadow checks choose none of them.
    void advance_every(const TokenRows& tokens, int depth, float* logits);

    // Appends tokens and runs each sequence until the policy stops it. `blocks_run` [sequences], 0 without
    // new tokens; `confidence` [exits, sequences], NaN where the head wasn't asked.
    void decide(const TokenRows& tokens, const Policy& policy, Answers answers, std::int32_t* blocks_run,
                double* confidence);

    // Appends tokens and runs all that waits, and them, through all blocks: logits of each sequence's last
    // `counts` tokens, [sum of counts, V], and the likeliest tokens [sum of counts]; either may be null.
    void complete(const TokenRows& tokens, const std::vector<int>& counts, float* logits,
                  std::int32_t* likeliest);

    // Runs tokens that stopped earlier through more blocks, without new tokens.
    void deepen(int depth, Answers answers);

    void rewind(int length, int row) override;

    // Completes chosen early tokens to full depth and compares them, the oldest first, at most `budget`. How
    // many.
    int run_shadow_checks(std::optional<int> budget = std::nullopt);

    // The share of a sequence's chosen tokens that differ; none where none was chosen.
    std::optional<double> shadow_loss(int row) const;

    // Makes the operation in progress, or the next one, throw, once. From any thread.
    void cancel() { cancelled_ = true; }

 private:
    class Unless;  // rolls back

    void append_checked(const TokenRows& tokens);
    void answer(const Wanted& wanted, int depth, const HeadOutputs& outputs);
    void answer_scattered(const Wanted& wanted, int depth, Answers answers);
    void run_every(const std::vector<int>& counts, int depth, float* logits, std::int32_t* likeliest);
    void head(Address hidden, int count, int depth, const HeadOutputs& outputs);
    bool watching(bool choosing) const { return on_event || (shadow_ && choosing); }
    void watch(int row, int depth, std::optional<std::int32_t> choice);
    void checked(int row, int position, int blocks_run, bool agrees);
    Address gathered(std::size_t rows);

    std::optional<Shadow> shadow_;
    std::atomic<bool> cancelled_{false};
    std::unique_ptr<Memory> gathered_;  // hidden states of several sequences, for a head
    std::size_t gathered_rows_ = 0;
    std::vector<float> logits_;
    std::vector<std::int32_t> choices_;
};

}  // namespace ojfa::core
