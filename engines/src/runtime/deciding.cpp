// Sessions that let a policy decide how deep each sequence goes.
#include <algorithm>
#include <limits>

#include "runtime/session.hpp"

namespace ojfa::core {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

}  // namespace

// What the sequences of a decision have come to; nothing of it is told before the end.
class Session::Deciding {
 public:
    Deciding(Session& session, const Policy& policy, const Drawing& how, const Wanted& wanted,
             const Decided& decided)
        : session_(session),
          policy_(policy),
          how_(how),
          decided_(decided),
          going_(wanted),
          chosen_(wanted.size(), Choice{-1, -1, std::numeric_limits<double>::quiet_NaN()}),
          blocks_run_(wanted.size()),
          asked_(policy.exits.size() * wanted.size(), std::numeric_limits<double>::quiet_NaN()) {
        if (decided.logits) std::fill_n(decided.logits, wanted.size() * width(), 0.0f);
    }

    void run() {
        for (std::size_t index = 0; index <= policy_.exits.size() && count_of(going_); ++index) ask(index);
    }

    // Writes the results, and counts them.
    void tell(Stats& stats) const {
        for (std::size_t row = 0; row < chosen_.size(); ++row) {
            if (decided_.tokens) decided_.tokens[row] = chosen_[row].token;
            if (decided_.likeliest) decided_.likeliest[row] = chosen_[row].likeliest;
            if (decided_.blocks_run) decided_.blocks_run[row] = blocks_run_[row];
            if (blocks_run_[row]) ++stats.exits[blocks_run_[row]];
        }
        if (decided_.confidence) std::copy(asked_.begin(), asked_.end(), decided_.confidence);
        stats.checks += counted_.checks;
        for (const auto& [depth, count] : counted_.stopped) stats.stopped[depth] += count;
        for (const auto& [depth, sum] : counted_.confidence_sums) stats.confidence_sums[depth] += sum;
    }

    int blocks_run(int row) const { return blocks_run_[at(row)]; }
    std::int32_t likeliest(int row) const { return chosen_[at(row)].likeliest; }

 private:
    std::size_t width() const { return at(session_.spec().vocab_size); }

    // Blocks run before a check, or all of them after the last one.
    int depth(std::size_t index) const {
        return index < policy_.exits.size() ? policy_.exits[index] : session_.spec().blocks;
    }

    // Asks the head after an exit's blocks, or the model's own; who is sure, or there, stops.
    void ask(std::size_t index) {
        const bool is_check = index < policy_.exits.size();
        std::vector<double> draws;
        for (std::size_t row = 0; row < how_.draws.size(); ++row)
            if (going_[row]) draws.push_back(how_.draws[row]);
        Choosing how = {how_.sampling, draws, std::nullopt, std::nullopt};
        if (is_check) {
            how.measure = policy_.measure;
            how.stop = Stop{policy_.thresholds[index], depth(index), depth(index + 1)};
        }
        std::vector<float> logits(decided_.logits ? at(count_of(going_)) * width() : 0);
        const std::vector<Choice> rows =
            session_.ask(going_, depth(index), how, decided_.logits ? logits.data() : nullptr);
        for (std::size_t row = 0, place = 0; row < going_.size(); ++row) {
            if (!going_[row]) continue;
            const Choice& choice = rows[place];
            if (!is_check || checked(index, row, choice.confidence)) {
                going_[row] = 0;
                chosen_[row] = choice;
                blocks_run_[row] = depth(index);
                if (decided_.logits)
                    std::copy_n(logits.data() + place * width(), width(), decided_.logits + row * width());
            }
            ++place;
        }
    }

    // Whether a check finds a sequence sure.
    bool checked(std::size_t index, std::size_t row, double sure) {
        asked_[index * going_.size() + row] = sure;
        ++counted_.checks;
        if (sure < policy_.thresholds[index]) return false;
        ++counted_.stopped[depth(index)];
        counted_.confidence_sums[depth(index)] += sure;
        return true;
    }

    Session& session_;
    const Policy& policy_;
    const Drawing& how_;
    const Decided& decided_;
    Wanted going_;
    std::vector<Choice> chosen_;
    std::vector<std::int32_t> blocks_run_;
    std::vector<double> asked_;
    Stats counted_;
};

void Session::decide(const TokenRows& tokens, const Policy& policy, const Drawing& how,
                     const Decided& decided) {
    policy.check_fits(spec().blocks);
    check(tokens);
    Unless failed(*this);
    append_checked(tokens);
    Deciding deciding(*this, policy, how, with_new(tokens), decided);
    deciding.run();
    failed.done = true;
    deciding.tell(stats);
    for (int row = 0; watching() && row < batch_size(); ++row)
        if (deciding.blocks_run(row)) watch(row, deciding.blocks_run(row), deciding.likeliest(row));
}

}  // namespace ojfa::core
