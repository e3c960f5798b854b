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
#include "runtime/steps.hpp"

namespace ojfa::core {

// Where answers of each sequence go; what is null isn't wanted. Without logits, the backend chooses.
struct Answers {
    float* logits = nullptr;            // [sequences, V]; zero for sequences without new tokens
    std::int32_t* likeliest = nullptr;  // [sequences]; -1 for those
};

// The same of a policy's decision.
struct Decided : Answers {
    std::int32_t* blocks_run = nullptr;  // [sequences]; 0 for those
    double* confidence = nullptr;        // [exits, sequences], NaN where the head wasn't asked
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

    // Appends tokens and chooses the next ones: `tokens_out` and blocks run [sequences]; -1 and 0 for
    // sequences without new tokens. With `next`, the step after this one begins where it can before its
    // tokens are known: the next call finds that done if it is of these tokens, way and drawing.
    void choose(const TokenRows& tokens, const Way& way, const Drawing& how, const Drawing* next,
                std::int32_t* tokens_out, std::int32_t* blocks_run);

    // Appends tokens and runs each sequence until the policy stops it.
    void decide(const TokenRows& tokens, const Policy& policy, const Decided& decided);

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

    // Whether it chooses tokens for shadow checks.
    bool has_shadow() const { return shadow_.has_value(); }

    // The share of a sequence's chosen tokens that differ; none where none was chosen.
    std::optional<double> shadow_loss(int row) const;

    // Makes the operation in progress, or the next one, throw, once. From any thread.
    void cancel() { cancelled_ = true; }

 private:
    class Unless;  // rolls back

    // A step that was begun before its tokens were known.
    struct Ahead {
        std::unique_ptr<Choices> choices;  // of its first stage
        Way way;
        Drawing how;
        std::vector<std::int32_t> tokens;  // that it follows, once they are known
    };

    void append_checked(const TokenRows& tokens);
    int compare(const std::vector<Due>& due);
    Address newest(const Wanted& wanted, int depth);
    std::unique_ptr<Choices> begin_choice(const Wanted& wanted, int depth, const Choosing& how);
    std::vector<Choice> ask(const Wanted& wanted, int depth, const Choosing& how, float* logits);
    void answer(const Wanted& wanted, int depth, Answers answers);
    std::unique_ptr<Choices> take_ahead(const TokenRows& tokens, const Way& way, const Drawing& how);
    bool can_follow(const Step& step) const;
    void follow(const Way& way, const Drawing& how);
    void tell(const Step& step);
    void run_every(const std::vector<int>& counts, int depth, float* logits, std::int32_t* likeliest);
    void count_heads(int count, int depth);
    bool watching() const { return on_event || shadow_; }
    void watch(int row, int depth, std::optional<std::int32_t> choice);
    void checked(int row, int position, int blocks_run, bool agrees);
    Address gathered(std::size_t rows);

    std::optional<Shadow> shadow_;
    std::atomic<bool> cancelled_{false};
    std::optional<Ahead> ahead_;
    std::unique_ptr<Memory> gathered_;  // hidden states of several sequences, for a head
    std::size_t gathered_rows_ = 0;
};

// Takes back the new tokens of an operation that fails.
class Session::Unless {
 public:
    explicit Unless(Session& session);
    ~Unless();
    Unless(const Unless&) = delete;
    Unless& operator=(const Unless&) = delete;

    bool done = false;

 private:
    Session& session_;
    std::vector<int> lengths_;
};

Wanted with_new(const TokenRows& tokens);

}  // namespace ojfa::core
