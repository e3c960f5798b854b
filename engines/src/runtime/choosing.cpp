// Sessions that choose tokens: what a head is asked, and steps that begin before the token before is known.
#include <algorithm>
#include <utility>

#include "runtime/session.hpp"

namespace ojfa::core {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

bool same(const Drawing& one, const Drawing& other) {
    const Sampling &a = one.sampling, &b = other.sampling;
    return a.temperature == b.temperature && a.top_k == b.top_k && a.top_p == b.top_p &&
           one.draws == other.draws;
}

// The draws of some sequences.
std::vector<double> of(const std::vector<double>& draws, const Wanted& wanted) {
    std::vector<double> result;
    for (std::size_t row = 0; row < draws.size(); ++row)
        if (wanted[row]) result.push_back(draws[row]);
    return result;
}

}  // namespace

void Session::choose(const TokenRows& tokens, int depth, const Drawing& how, const Drawing* next,
                     std::int32_t* chosen) {
    check(tokens);
    const Wanted wanted = with_new(tokens);
    Unless failed(*this);
    check_interruption();  // what was begun ahead computes nothing more
    std::unique_ptr<Choices> choices = take_ahead(tokens, depth, how);
    if (!choices) {
        append_checked(tokens);
        const std::vector<double> draws = of(how.draws, wanted);
        choices = begin_choice(wanted, depth, {how.sampling, draws, std::nullopt, std::nullopt});
    }
    if (next && can_follow(wanted)) follow(depth, *next);
    const std::vector<Choice> rows = choices ? choices->wait() : std::vector<Choice>();
    std::size_t place = 0;
    for (int row = 0; row < batch_size(); ++row) chosen[row] = wanted[at(row)] ? rows[place++].token : -1;
    if (ahead_) ahead_->tokens.assign(chosen, chosen + batch_size());
    failed.done = true;
    if (rows.empty()) return;
    count_heads(static_cast<int>(rows.size()), depth);
    stats.exits[depth] += rows.size();
    place = 0;
    for (int row = 0; watching() && row < batch_size(); ++row)
        if (wanted[at(row)]) watch(row, depth, rows[place++].likeliest);
}

// Where everyone goes on and has room, and nobody looks at what is chosen.
bool Session::can_follow(const Wanted& wanted) const {
    if (at(count_of(wanted)) != wanted.size() || spec().rotary_switch || watching()) return false;
    for (int row = 0; row < batch_size(); ++row)
        if (length(row) >= max_length()) return false;
    return true;
}

// Begins the step after one that has just begun.
void Session::follow(int depth, const Drawing& how) {
    const Address states = run_ahead(depth);
    ahead_ = Ahead{
        cache().choose(states, batch_size(), depth, {how.sampling, how.draws, std::nullopt, std::nullopt}),
        depth,
        how,
        {}};
}

// The choices of a step that was begun ahead, if it is the one that is asked for.
std::unique_ptr<Choices> Session::take_ahead(const TokenRows& tokens, int depth, const Drawing& how) {
    if (!ahead_ || ahead_->depth != depth || !same(ahead_->how, how)) return nullptr;
    for (int row = 0; row < batch_size(); ++row)
        if (tokens[at(row)].size() != 1 || tokens[at(row)][0] != ahead_->tokens[at(row)]) return nullptr;
    std::unique_ptr<Choices> choices = std::move(ahead_->choices);
    ahead_.reset();
    Sequences::take_ahead(tokens, depth);
    return choices;
}

// Hidden states [wanted, H] of sequences' newest tokens after the first blocks.
Address Session::newest(const Wanted& wanted, int depth) {
    const int count = count_of(wanted);
    const std::vector<Group> together = groups(wanted, depth);
    Address newest = 0;
    std::size_t place = 0;
    for (const Group group : together) {
        const States states = Sequences::deepen(group, depth, wanted);
        // One token of neighbours that are all wanted lies as a head takes it.
        if (together.size() == 1 && group.stop - group.first == count)
            return row_of(states.address, at(states.tokens - 1));
        if (!newest) newest = gathered(at(count));
        for (int row = group.first; row < group.stop; ++row) {
            if (!wanted[at(row)]) continue;
            const std::size_t last = at((row - group.first + 1) * states.tokens - 1);
            cache().copy(row_of(states.address, last), row_of(newest, place++), 1);
        }
    }
    return newest;
}

std::unique_ptr<Choices> Session::begin_choice(const Wanted& wanted, int depth, const Choosing& how) {
    const int count = count_of(wanted);
    if (!count) return nullptr;
    const Address states = newest(wanted, depth);
    check_interruption();
    return cache().choose(states, count, depth, how);
}

// What a head says of each wanted sequence; where its logits [wanted, V] are asked for, the host chooses.
std::vector<Choice> Session::ask(const Wanted& wanted, int depth, const Choosing& how, float* logits) {
    const int count = count_of(wanted);
    if (!count) return {};
    std::vector<Choice> rows;
    if (logits) {
        const Address states = newest(wanted, depth);
        check_interruption();
        cache().logits(states, count, depth, logits);
        const std::size_t width = at(spec().vocab_size);
        for (std::size_t row = 0; row < at(count); ++row)
            rows.push_back(choice_of({logits + row * width, width}, row, how));
    } else {
        rows = begin_choice(wanted, depth, how)->wait();
    }
    count_heads(count, depth);
    return rows;
}

void Session::answer(const Wanted& wanted, int depth, Answers answers) {
    const std::size_t width = at(spec().vocab_size), count = at(count_of(wanted));
    const bool all = count == wanted.size();
    std::vector<float> packed(answers.logits && !all ? count * width : 0);
    const std::vector<Choice> rows =
        ask(wanted, depth, {}, answers.logits && !all ? packed.data() : answers.logits);
    if (answers.logits && !all) std::fill_n(answers.logits, wanted.size() * width, 0.0f);
    std::size_t place = 0;
    for (std::size_t row = 0; row < wanted.size(); ++row) {
        if (answers.likeliest) answers.likeliest[row] = wanted[row] ? rows[place].likeliest : -1;
        if (!wanted[row]) continue;
        if (answers.logits && !all)
            std::copy_n(packed.data() + place * width, width, answers.logits + row * width);
        ++place;
    }
}

}  // namespace ojfa::core
