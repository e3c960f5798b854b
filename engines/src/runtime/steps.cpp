#include "runtime/steps.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace ojfa::core {
namespace {

constexpr double NAN_VALUE = std::numeric_limits<double>::quiet_NaN();

}  // namespace

bool same(const Way& one, const Way& other) {
    if (one.index() != other.index()) return false;
    if (const int* const depth = std::get_if<int>(&one)) return *depth == std::get<int>(other);
    const Policy &a = std::get<Policy>(one), &b = std::get<Policy>(other);
    return a.exits == b.exits && a.measure == b.measure && a.thresholds == b.thresholds;
}

bool same(const Drawing& one, const Drawing& other) {
    const Sampling &a = one.sampling, &b = other.sampling;
    return a.temperature == b.temperature && a.top_k == b.top_k && a.top_p == b.top_p &&
           one.draws == other.draws;
}

int count_of(const Wanted& wanted) {
    return static_cast<int>(std::count(wanted.begin(), wanted.end(), 1));
}

std::vector<Stage> stages_of(const Way& way, int blocks) {
    if (const int* const depth = std::get_if<int>(&way)) return {{*depth, std::nullopt, std::nullopt}};
    const Policy& policy = std::get<Policy>(way);
    policy.check_fits(blocks);
    std::vector<Stage> stages;
    for (std::size_t i = 0; i < policy.exits.size(); ++i) {
        const int after = i + 1 < policy.exits.size() ? policy.exits[i + 1] : blocks;
        stages.push_back(
            {policy.exits[i], policy.measure, Stop{policy.thresholds[i], policy.exits[i], after}});
    }
    stages.push_back({blocks, std::nullopt, std::nullopt});
    return stages;
}

Step::Step(std::vector<Stage> stages, Wanted wanted, const Drawing& how)
    : stages_(std::move(stages)),
      going_(std::move(wanted)),
      how_(how),
      chosen_(going_.size(), Choice{-1, -1, NAN_VALUE}),
      blocks_run_(going_.size()),
      confidence_((stages_.size() - 1) * going_.size(), NAN_VALUE) {}

int Step::count() const {
    return count_of(going_);
}

Choosing Step::choosing() {
    draws_.clear();
    for (std::size_t row = 0; row < how_.draws.size(); ++row)
        if (going_[row]) draws_.push_back(how_.draws[row]);
    return {how_.sampling, draws_, next_stage().measure, next_stage().stop};
}

void Step::add(std::unique_ptr<Choices> choices) {
    pending_ = std::move(choices);
    ++asked_;
    asked_about_ = static_cast<std::size_t>(count());
}

std::vector<Step::Stopped> Step::judge() {
    const Stage& stage = stages_[asked_ - 1];
    const std::vector<Choice>& rows = pending_->wait();
    std::vector<Stopped> stopped;
    heads_[stage.depth] += rows.size();
    for (std::size_t row = 0, place = 0; row < going_.size(); ++row) {
        if (!going_[row]) continue;
        const Choice& choice = rows[place];
        if (stage.stop) {
            confidence_[(asked_ - 1) * going_.size() + row] = choice.confidence;
            ++counted_.checks;
        }
        if (!stage.stop || choice.confidence >= stage.stop->threshold) {
            going_[row] = 0;
            chosen_[row] = choice;
            blocks_run_[row] = stage.depth;
            stopped.push_back({row, place});
            if (stage.stop) {
                ++counted_.stopped[stage.depth];
                counted_.confidence_sums[stage.depth] += choice.confidence;
            }
        }
        ++place;
    }
    pending_.reset();
    return stopped;
}

void Step::count(Stats& stats, int blocks) const {
    for (const auto& [depth, rows] : heads_) (depth == blocks ? stats.final_heads : stats.exit_heads) += rows;
    for (const std::int32_t depth : blocks_run_)
        if (depth) ++stats.exits[depth];
    stats.checks += counted_.checks;
    for (const auto& [depth, rows] : counted_.stopped) stats.stopped[depth] += rows;
    for (const auto& [depth, sum] : counted_.confidence_sums) stats.confidence_sums[depth] += sum;
}

}  // namespace ojfa::core
