// A step on its way: the heads that are asked in turn, and where each sequence stops; see
// ojfa_export/runtime/steps.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "runtime/choice.hpp"
#include "runtime/sequences.hpp"
#include "runtime/stats.hpp"

namespace ojfa::core {

// A fixed exit (blocks run), or the policy that decides.
using Way = std::variant<int, Policy>;

bool same(const Way& one, const Way& other);

// How next tokens are chosen: a number from [0, 1) for each sequence, none where they aren't sampled.
struct Drawing {
    Sampling sampling;
    std::vector<double> draws;
};

bool same(const Drawing& one, const Drawing& other);

// A head that a step asks, after so many blocks; the last stage is no check: every sequence stops there.
struct Stage {
    int depth;
    std::optional<Measure> measure;
    std::optional<Stop> stop;
};

// Throws Failure where a policy's exits don't fit a model with this many blocks.
std::vector<Stage> stages_of(const Way& way, int blocks);

class Step {
 public:
    Step(std::vector<Stage> stages, Wanted wanted, const Drawing& how);

    // The sequences that no head was sure of, and how many.
    const Wanted& going() const { return going_; }
    int count() const;

    // The head to ask next.
    const Stage& next_stage() const { return stages_[asked_]; }

    // How the sequences that go on choose there; valid until the next call.
    Choosing choosing();

    // Takes what that head was asked about them, which may not be known yet.
    void add(std::unique_ptr<Choices> choices);

    // Whether it is known where each sequence stops, and whether every sequence was asked about last.
    bool decided() const { return !count() || asked_ == stages_.size(); }
    bool asked_everyone() const { return asked_ && asked_about_ == going_.size(); }

    // Waits for the head that was asked last: who is sure, or at the last one, stops there. The sequences
    // that have just stopped, in order, with their places among those that were asked about.
    struct Stopped {
        std::size_t row, place;
    };
    std::vector<Stopped> judge();

    // What each sequence stopped at; -1 and 0 blocks where it had no new tokens.
    const std::vector<Choice>& choices() const { return chosen_; }
    const std::vector<std::int32_t>& blocks_run() const { return blocks_run_; }

    // What each exit said of each sequence, [exits, sequences]; NaN where none was asked.
    const std::vector<double>& confidence() const { return confidence_; }

    // Counts the heads that were asked, of a model with this many blocks.
    void count(Stats& stats, int blocks) const;

 private:
    const std::vector<Stage> stages_;
    Wanted going_;
    const Drawing& how_;
    std::size_t asked_ = 0, asked_about_ = 0;  // heads, and sequences by the last of them
    std::unique_ptr<Choices> pending_;         // of the head that was asked last, until it is judged
    std::vector<double> draws_;
    std::vector<Choice> chosen_;
    std::vector<std::int32_t> blocks_run_;
    std::vector<double> confidence_;
    std::map<int, std::uint64_t> heads_;  // rows that were asked about, by blocks run
    Stats counted_;
};

int count_of(const Wanted& wanted);

}  // namespace ojfa::core
