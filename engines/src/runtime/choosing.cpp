// Sessions that choose tokens: what a head is asked, and steps that begin before the token before is known.
#include <algorithm>
#include <utility>

#include "runtime/session.hpp"

namespace ojfa::core {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

}  // namespace

void Session::choose(const TokenRows& tokens, const Way& way, const Drawing& how, const Drawing* next,
                     std::int32_t* tokens_out, std::int32_t* blocks_run) {
    check(tokens);
    Step step(stages_of(way, spec().blocks), with_new(tokens), how);
    Unless failed(*this);
    check_interruption();  // what was begun ahead computes nothing more
    if (std::unique_ptr<Choices> begun = take_ahead(tokens, way, how)) {
        step.add(std::move(begun));
        if (!step.decided()) step.judge();
    } else {
        append_checked(tokens);
    }
    while (!step.decided()) {
        const int depth = step.next_stage().depth;
        step.add(begin_choice(step.going(), depth, step.choosing()));
        if (!step.decided()) step.judge();
    }
    // The device begins with the next tokens before anything else is done about these.
    if (next && can_follow(step)) follow(way, *next);
    if (step.count()) step.judge();
    for (int row = 0; row < batch_size(); ++row) {
        tokens_out[row] = step.choices()[at(row)].token;
        blocks_run[row] = step.blocks_run()[at(row)];
    }
    if (ahead_) ahead_->tokens.assign(tokens_out, tokens_out + batch_size());
    failed.done = true;
    tell(step);
}

void Session::decide(const TokenRows& tokens, const Policy& policy, const Decided& decided) {
    check(tokens);
    const Drawing greedy;
    Step step(stages_of(policy, spec().blocks), with_new(tokens), greedy);
    Unless failed(*this);
    append_checked(tokens);
    const std::size_t width = at(spec().vocab_size);
    if (decided.logits) std::fill_n(decided.logits, tokens.size() * width, 0.0f);
    std::vector<float> logits;
    while (!step.decided()) {
        if (decided.logits) logits.resize(at(step.count()) * width);
        const int depth = step.next_stage().depth;
        step.add(std::make_unique<KnownChoices>(
            ask(step.going(), depth, step.choosing(), decided.logits ? logits.data() : nullptr)));
        for (const auto& [row, place] : step.judge())
            if (decided.logits)
                std::copy_n(logits.data() + place * width, width, decided.logits + row * width);
    }
    for (std::size_t row = 0; row < tokens.size(); ++row) {
        if (decided.likeliest) decided.likeliest[row] = step.choices()[row].likeliest;
        if (decided.blocks_run) decided.blocks_run[row] = step.blocks_run()[row];
    }
    if (decided.confidence) std::copy(step.confidence().begin(), step.confidence().end(), decided.confidence);
    failed.done = true;
    tell(step);
}

// Counts a step, and tells of it.
void Session::tell(const Step& step) {
    step.count(stats, spec().blocks);
    for (int row = 0; watching() && row < batch_size(); ++row)
        if (const int depth = step.blocks_run()[at(row)])
            watch(row, depth, step.choices()[at(row)].likeliest);
}

// Where every sequence stops at one head and has room, and nobody looks at what is chosen.
bool Session::can_follow(const Step& step) const {
    if (!step.asked_everyone() || spec().rotary_switch || watching()) return false;
    for (int row = 0; row < batch_size(); ++row)
        if (length(row) >= max_length()) return false;
    return true;
}

// Begins the step after one whose tokens are being chosen.
void Session::follow(const Way& way, const Drawing& how) {
    Step step(stages_of(way, spec().blocks), Wanted(at(batch_size()), 1), how);
    const int depth = step.next_stage().depth;
    const Address states = run_ahead(depth);
    ahead_ = Ahead{cache().choose(states, batch_size(), depth, step.choosing()), way, how, {}};
}

// The choices of a step that was begun ahead, if it is the one that is asked for.
std::unique_ptr<Choices> Session::take_ahead(const TokenRows& tokens, const Way& way, const Drawing& how) {
    if (!ahead_ || !same(ahead_->way, way) || !same(ahead_->how, how)) return nullptr;
    for (int row = 0; row < batch_size(); ++row)
        if (tokens[at(row)].size() != 1 || tokens[at(row)][0] != ahead_->tokens[at(row)]) return nullptr;
    std::unique_ptr<Choices> choices = std::move(ahead_->choices);
    ahead_.reset();
    Sequences::take_ahead(tokens);
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
    return rows;
}

void Session::answer(const Wanted& wanted, int depth, Answers answers) {
    const std::size_t width = at(spec().vocab_size), count = at(count_of(wanted));
    const bool all = count == wanted.size();
    std::vector<float> packed(answers.logits && !all ? count * width : 0);
    const std::vector<Choice> rows =
        ask(wanted, depth, {}, answers.logits && !all ? packed.data() : answers.logits);
    count_heads(static_cast<int>(count), depth);
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
