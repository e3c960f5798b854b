// Early-exit bundles from C++17: a thin layer of objects and exceptions over the C interface in ojfa.h, whose
// conventions on threads, shapes and units hold here too. Token ids in, token ids out.
//
//     auto model = ojfa::Model::load("llama.ojfa");
//     auto session = model.session();
//     for (auto step : session.generate(prompt_ids, {ojfa::Exit::automatic()})) consume(step.token,
//     step.blocks_run);
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ojfa/types.hpp"

namespace ojfa {

// Tokens as they come: a range to be gone through once. Keeps its session alive in the library, not the
// Session object.
class Generation {
 public:
    class Iterator {
     public:
        using iterator_category = std::input_iterator_tag;
        using value_type = Step;
        using difference_type = std::ptrdiff_t;
        using pointer = const Step*;
        using reference = const Step&;

        Iterator() = default;
        explicit Iterator(Generation* generation) : generation_(generation) { ++*this; }
        reference operator*() const { return *step_; }
        pointer operator->() const { return &*step_; }
        Iterator& operator++() {
            step_ = generation_->next();
            if (!step_) generation_ = nullptr;
            return *this;
        }
        void operator++(int) { ++*this; }
        bool operator==(const Iterator& other) const { return generation_ == other.generation_; }
        bool operator!=(const Iterator& other) const { return !(*this == other); }

     private:
        Generation* generation_ = nullptr;
        std::optional<Step> step_;
    };

    // The next token, or none where all sequences have ended. After an Error of status OJFA_ERROR_CANCELLED a
    // further call goes on.
    std::optional<Step> next() {
        ojfa_step step;
        int more = 0;
        detail::check(ojfa_generation_next(owned_.handle, &step, &more));
        if (!more) return std::nullopt;
        return Step{step.row, step.token, step.blocks_run, step.drafted != 0,
                    static_cast<Finish>(step.finish)};
    }
    Iterator begin() { return Iterator(this); }
    Iterator end() { return {}; }

 private:
    friend class Session;
    Generation() = default;
    detail::Owned<ojfa_generation, ojfa_generation_close> owned_;
};

// Sequences in progress: one thread at a time, but for `cancel`.
class Session {
 public:
    // Goes on after the one sequence's tokens and these.
    Generation generate(const TokenIds& prompt, const GenerateOptions& options = {}) {
        return generate_batch({prompt}, options);
    }

    // Goes on after each sequence's tokens and these; one without new tokens is left alone.
    Generation generate_batch(const std::vector<TokenIds>& prompts, const GenerateOptions& options = {}) {
        need_rows(prompts.size());
        ojfa_generate_options given;
        ojfa_generate_options_init(&given);
        given.exit = options.exit.number();
        ojfa_policy policy;
        if (options.exit.policy()) {
            policy = options.exit.policy()->view();
            given.policy = &policy;
        }
        given.speculation = options.speculation ? &*options.speculation : nullptr;
        given.max_new_tokens = options.max_new_tokens;
        given.temperature = options.temperature;
        given.top_k = options.top_k;
        given.top_p = options.top_p;
        given.seed = options.seed;
        given.stop_tokens = options.stop_tokens.data();
        given.stop_token_count = options.stop_tokens.size();
        given.ignore_eos = options.ignore_eos;
        Generation generation;
        detail::check(ojfa_generation_start(owned_.handle, detail::tokens_of(prompts).data(), &given,
                                            &generation.owned_.handle));
        return generation;
    }

    // Appends tokens of each sequence and runs `exit` blocks, 0 for all; logits only where they are wanted.
    Answer advance(const std::vector<TokenIds>& tokens, std::int32_t exit = OJFA_EXIT_FULL,
                   bool logits = true) {
        need_rows(tokens.size());
        Answer answer = room_for<Answer>(logits);
        detail::check(ojfa_session_advance(owned_.handle, detail::tokens_of(tokens).data(), exit,
                                           logits ? answer.logits.data() : nullptr, answer.logits.size(),
                                           answer.likeliest.data()));
        return answer;
    }

    // The same, with the logits of every new token, [all new tokens, V].
    std::vector<float> advance_every(const std::vector<TokenIds>& tokens,
                                     std::int32_t exit = OJFA_EXIT_FULL) {
        need_rows(tokens.size());
        std::size_t count = 0;
        for (const TokenIds& ids : tokens) count += ids.size();
        std::vector<float> logits(count * vocab_size_ + 1);
        detail::check(ojfa_session_advance_every(owned_.handle, detail::tokens_of(tokens).data(), exit,
                                                 logits.data(), logits.size()));
        logits.pop_back();
        return logits;
    }

    // Appends tokens and runs each sequence until the policy stops it.
    Decision decide(const std::vector<TokenIds>& tokens, const Policy& policy, bool logits = true) {
        need_rows(tokens.size());
        Decision decision = room_for<Decision>(logits);
        decision.blocks_run.resize(batch_size_);
        decision.confidence.resize(policy.exits.size() * batch_size_);
        const ojfa_policy view = policy.view();
        detail::check(ojfa_session_decide(owned_.handle, detail::tokens_of(tokens).data(), &view,
                                          logits ? decision.logits.data() : nullptr, decision.logits.size(),
                                          decision.likeliest.data(), decision.blocks_run.data(),
                                          decision.confidence.data()));
        return decision;
    }

    // Appends tokens and runs all that waits through all blocks; logits [sum of counts, V].
    std::vector<float> complete(const std::vector<TokenIds>& tokens, const std::vector<std::size_t>& counts) {
        need_rows(tokens.size());
        need_rows(counts.size());
        std::size_t total = 0;
        for (const std::size_t count : counts) total += count;
        std::vector<float> logits(total * vocab_size_ + 1);
        detail::check(ojfa_session_complete(owned_.handle, detail::tokens_of(tokens).data(), counts.data(),
                                            logits.data(), logits.size()));
        logits.pop_back();
        return logits;
    }

    // Runs tokens that stopped earlier through more blocks, without new ones.
    Answer deepen(std::int32_t exit = OJFA_EXIT_FULL, bool logits = true) {
        Answer answer = room_for<Answer>(logits);
        detail::check(ojfa_session_deepen(owned_.handle, exit, logits ? answer.logits.data() : nullptr,
                                          answer.logits.size(), answer.likeliest.data()));
        return answer;
    }

    // Drops a sequence's tokens after the first `length`.
    void rewind(std::size_t length, std::size_t row = 0) {
        detail::check(ojfa_session_rewind(owned_.handle, row, length));
    }

    // Makes the call in progress, or the next, throw an Error of status OJFA_ERROR_CANCELLED. Any thread.
    void cancel() { detail::check(ojfa_session_cancel(owned_.handle)); }

    std::vector<std::int32_t> lengths() {
        std::vector<std::int32_t> result(batch_size_);
        detail::check(ojfa_session_lengths(owned_.handle, result.data()));
        return result;
    }

    TokenIds tokens(std::size_t row = 0) {
        std::size_t count = 0;
        detail::check(ojfa_session_tokens(owned_.handle, row, nullptr, 0, &count));
        TokenIds ids(count);
        detail::check(ojfa_session_tokens(owned_.handle, row, ids.data(), ids.size(), &count));
        return ids;
    }

    // Tokens that each block has processed, [blocks, sequences].
    std::vector<std::int32_t> watermarks() {
        std::vector<std::int32_t> marks(blocks_ * batch_size_);
        detail::check(ojfa_session_watermarks(owned_.handle, marks.data()));
        return marks;
    }

    Stats stats() {
        Stats stats;
        stats.exits.resize(blocks_ + 1);
        stats.stopped.resize(blocks_ + 1);
        stats.confidence_sums.resize(blocks_ + 1);
        detail::check(ojfa_session_stats(owned_.handle, &stats, stats.exits.data(), stats.stopped.data(),
                                         stats.confidence_sums.data()));
        return stats;
    }
    void reset_stats() { detail::check(ojfa_session_reset_stats(owned_.handle)); }

    // Completes chosen early tokens and compares them with the full model; how many, at most `budget` if 0 or
    // more.
    std::size_t run_shadow_checks(std::int64_t budget = -1) {
        std::size_t done = 0;
        detail::check(ojfa_session_run_shadow_checks(owned_.handle, budget, &done));
        return done;
    }

    // The share of a sequence's chosen tokens that differ; NaN where none was chosen.
    double shadow_loss(std::size_t row = 0) {
        double loss = 0;
        detail::check(ojfa_session_shadow_loss(owned_.handle, row, &loss));
        return loss;
    }

    std::size_t batch_size() const { return batch_size_; }
    ojfa_session handle() const { return owned_.handle; }

 private:
    friend class Model;
    Session() = default;

    void need_rows(std::size_t rows) const {
        if (rows != batch_size_)
            throw Error(OJFA_ERROR_USAGE,
                        "got tokens for " + std::to_string(rows) + " sequences, the session has " +
                            std::to_string(batch_size_),
                        "give one list of token ids per sequence");
    }

    template <class Result>
    Result room_for(bool logits) const {
        Result result;
        result.logits.resize(logits ? batch_size_ * vocab_size_ : 0);
        result.likeliest.resize(batch_size_);
        return result;
    }

    detail::Owned<ojfa_session, ojfa_session_close> owned_;
    std::size_t batch_size_ = 0, vocab_size_ = 0, blocks_ = 0;
};

// An opened bundle; any number of threads may use it.
class Model {
 public:
    // Checks every file of the bundle and opens it.
    static Model load(const std::string& bundle, const LoadOptions& options = {}) {
        ojfa_load_options given;
        ojfa_load_options_init(&given);
        given.backend = options.backend.c_str();
        given.backend_library = options.backend_library.empty() ? nullptr : options.backend_library.c_str();
        given.device = options.device;
        given.memory_limit = options.memory_limit;
        given.check_golden = options.check_golden;
        given.blocks = options.blocks.value_or(-1);
        if (options.progress) {
            given.progress = [](void* user, std::uint64_t done, std::uint64_t total) {
                (*static_cast<const decltype(options.progress)*>(user))(done, total);
            };
            given.user = const_cast<void*>(static_cast<const void*>(&options.progress));
        }
        Model model;
        detail::check(ojfa_model_load(bundle.c_str(), &given, &model.owned_.handle));
        detail::check(ojfa_model_get_info(model.owned_.handle, &model.info_));
        return model;
    }

    // Starts sequences, which keep what they need of the model alive.
    Session session(const SessionOptions& options = {}) const {
        ojfa_session_options given;
        ojfa_session_options_init(&given);
        given.batch_size = options.batch_size;
        given.max_length = options.max_length;
        given.shadow_share = options.shadow_share;
        given.shadow_seed = options.shadow_seed;
        given.shadow_index = options.shadow_index;
        Session session;
        detail::check(ojfa_session_open(owned_.handle, &given, &session.owned_.handle));
        session.batch_size_ = static_cast<std::size_t>(options.batch_size);
        session.vocab_size_ = static_cast<std::size_t>(info_.vocab_size);
        session.blocks_ = static_cast<std::size_t>(info_.blocks);
        return session;
    }

    const ojfa_model_info& info() const { return info_; }
    int blocks() const { return info_.blocks; }

    // The policy behind Exit::automatic().
    Policy policy() const {
        ojfa_policy view;
        detail::check(ojfa_model_policy(owned_.handle, &view));
        return {{view.exits, view.exits + view.count},
                static_cast<Measure>(view.measure),
                {view.thresholds, view.thresholds + view.count}};
    }

    // Uploads the first `depth` blocks now, 0 for all.
    void load_blocks(std::int32_t depth = OJFA_EXIT_FULL) const {
        detail::check(ojfa_model_load_blocks(owned_.handle, depth));
    }

    // Bytes on the device that the model and its sessions hold now.
    std::uint64_t memory() const {
        std::uint64_t bytes = 0;
        detail::check(ojfa_model_memory(owned_.handle, &bytes));
        return bytes;
    }

    // What the backend is and runs on, as JSON.
    std::string backend() const {
        std::size_t size = 0;
        detail::check(ojfa_model_backend(owned_.handle, nullptr, 0, &size));
        std::string text(size, '\0');
        detail::check(ojfa_model_backend(owned_.handle, text.data(), size, &size));
        text.resize(size - 1);
        return text;
    }

 private:
    Model() = default;

    detail::Owned<ojfa_model, ojfa_model_close> owned_;
    ojfa_model_info info_{};
};

}  // namespace ojfa
