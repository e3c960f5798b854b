#include "runtime/session.hpp"

#include <algorithm>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

// Rows whose choices a comparison takes at a time.
constexpr int ROWS_AT_ONCE = 32;

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

}  // namespace

Wanted with_new(const TokenRows& tokens) {
    Wanted wanted;
    for (const auto& ids : tokens) wanted.push_back(!ids.empty());
    return wanted;
}

int resolve_exit(int exit, int blocks) {
    if (exit == 0) return blocks;
    if (exit < 0 || exit > blocks)
        throw usage_failure(
            "exit " + std::to_string(exit) + " is outside this model's 1.." + std::to_string(blocks),
            "exits count blocks run: a number from 1 to " + std::to_string(blocks) + ", or full");
    return exit;
}

Session::Unless::Unless(Session& session) : session_(session) {
    for (int row = 0; row < session.batch_size(); ++row) lengths_.push_back(session.length(row));
}

Session::Unless::~Unless() {
    if (done) return;
    session_.ahead_.reset();
    for (int row = 0; row < session_.batch_size(); ++row)
        if (session_.length(row) > lengths_[at(row)]) session_.Sequences::rewind(lengths_[at(row)], row);
}

Session::Session(const ModelSpec& spec, Engines& engines, int batch_size, int max_length,
                 std::optional<Shadow> shadow)
    : Sequences(spec, engines, batch_size, max_length, shadow.has_value(),
                [this] {
                    if (cancelled_.exchange(false))
                        throw Failure(OJFA_ERROR_CANCELLED, "the session was cancelled");
                }),
      shadow_(std::move(shadow)) {}

void Session::advance(const TokenRows& tokens, int depth, Answers answers) {
    check(tokens);
    Unless failed(*this);
    append_checked(tokens);
    const Wanted wanted = with_new(tokens);
    std::vector<std::int32_t> choices(tokens.size());
    if (!answers.likeliest) answers.likeliest = choices.data();
    answer(wanted, depth, answers);
    failed.done = true;
    if (const int steps = count_of(wanted)) stats.exits[depth] += static_cast<std::uint64_t>(steps);
    for (int row = 0; watching() && row < batch_size(); ++row)
        if (wanted[at(row)]) watch(row, depth, answers.likeliest[row]);
}

void Session::advance_every(const TokenRows& tokens, int depth, float* logits) {
    check(tokens);
    Unless failed(*this);
    append_checked(tokens);
    std::vector<int> counts;
    for (const auto& ids : tokens) counts.push_back(static_cast<int>(ids.size()));
    run_every(counts, depth, logits, nullptr);
    failed.done = true;
    for (int row = 0; row < batch_size(); ++row) {
        if (!counts[at(row)]) continue;
        ++stats.exits[depth];
        if (on_event) watch(row, depth, std::nullopt);
    }
}

void Session::complete(const TokenRows& tokens, const std::vector<int>& counts, float* logits,
                       std::int32_t* likeliest) {
    check(tokens);
    for (int row = 0; row < batch_size(); ++row) {
        const int added = static_cast<int>(tokens[at(row)].size());
        const int waiting = length(row) - watermark(spec().blocks - 1, row) + added;
        const int count = counts[at(row)];
        if (count < std::min(added, 1) || count > waiting)
            throw usage_failure("asked for the logits of " + std::to_string(count) + " tokens of sequence " +
                                std::to_string(row) + ", of which " + std::to_string(waiting) +
                                " wait for the last block");
    }
    Unless failed(*this);
    append_checked(tokens);
    run_every(counts, spec().blocks, logits, likeliest);
    failed.done = true;
}

void Session::deepen(int depth, Answers answers) {
    Wanted waiting;
    for (int row = 0; row < batch_size(); ++row) waiting.push_back(length(row) > watermark(depth - 1, row));
    ahead_.reset();
    answer(waiting, depth, answers);
}

void Session::rewind(int length, int row) {
    const bool known = row >= 0 && row < batch_size(), was_long = known && long_context(row);
    if (known && length < this->length(row)) ahead_.reset();
    Sequences::rewind(length, row);
    // What was said with the long factors can't be compared once they no longer apply.
    if (shadow_) shadow_->forget(row, was_long != long_context(row) ? 0 : length);
}

int Session::run_shadow_checks(std::optional<int> budget) {
    if (!shadow_)
        throw usage_failure("this session chooses no tokens for shadow checks",
                            "open it with a shadow share");
    ahead_.reset();
    std::vector<Due> due = shadow_->due();
    if (budget) due.resize(std::min(due.size(), at(*budget)));
    return compare(due);
}

// Completes early tokens and compares them with the full model.
int Session::compare(const std::vector<Due>& due) {
    const int blocks = spec().blocks;
    Wanted waiting(at(batch_size()), 0);
    for (const Due& each : due)
        if (watermark(blocks - 1, each.row) <= each.position) waiting[at(each.row)] = 1;
    for (const Group group : groups(waiting, blocks)) Sequences::deepen(group, blocks, waiting);
    for (std::size_t start = 0; start < due.size(); start += ROWS_AT_ONCE) {
        const int count = static_cast<int>(std::min<std::size_t>(ROWS_AT_ONCE, due.size() - start));
        const Address states = gathered(at(count));
        for (int i = 0; i < count; ++i) {
            const Due& each = due[start + at(i)];
            cache().copy(final_state(each.row, each.position), row_of(states, at(i)), 1);
        }
        check_interruption();
        const std::unique_ptr<Choices> choices = cache().choose(states, count, blocks, {});
        for (int i = 0; i < count; ++i) {
            const Due& each = due[start + at(i)];
            checked(each.row, each.position, each.blocks_run,
                    each.choice == choices->wait()[at(i)].likeliest);
        }
        count_heads(count, blocks);
    }
    return static_cast<int>(due.size());
}

std::optional<double> Session::shadow_loss(int row) const {
    if (!shadow_)
        throw usage_failure("this session chooses no tokens for shadow checks",
                            "open it with a shadow share");
    if (row < 0 || row >= batch_size())
        throw usage_failure("row " + std::to_string(row) + " is outside 0.." +
                            std::to_string(batch_size() - 1));
    return shadow_->loss(row);
}

void Session::append_checked(const TokenRows& tokens) {
    ahead_.reset();
    const auto& rotary_switch = spec().rotary_switch;
    if (shadow_ && !shadow_->due().empty() && rotary_switch) {
        // Beyond the switch the full model's past is another. Of these rows alone: what the caller
        // has asked of the others still waits as it was.
        std::vector<Due> due = shadow_->due();
        due.erase(std::remove_if(due.begin(), due.end(),
                                 [&](const Due& each) {
                                     const int added = static_cast<int>(tokens[at(each.row)].size());
                                     return length(each.row) > *rotary_switch ||
                                            length(each.row) + added <= *rotary_switch;
                                 }),
                  due.end());
        compare(due);
    }
    append(tokens);
}

// Runs the first blocks and a head on each sequence's last `counts` tokens.
void Session::run_every(const std::vector<int>& counts, int depth, float* logits, std::int32_t* likeliest) {
    Wanted wanted;
    std::vector<std::size_t> places;  // of each sequence's first one
    std::size_t total = 0;
    for (const int count : counts) {
        wanted.push_back(count > 0);
        places.push_back(total);
        total += at(count);
    }
    if (!total) return;
    const Address states_of_all = gathered(total);
    for (const Group group : groups(wanted, depth)) {
        const States states = Sequences::deepen(group, depth, wanted);
        for (int row = group.first; row < group.stop; ++row) {
            const int count = counts[at(row)];
            if (!count) continue;
            const std::size_t first = at((row - group.first + 1) * states.tokens - count);
            cache().copy(row_of(states.address, first), row_of(states_of_all, places[at(row)]), at(count));
        }
    }
    const int count = static_cast<int>(total);
    check_interruption();
    if (logits) {
        cache().logits(states_of_all, count, depth, logits);
    } else {
        const std::unique_ptr<Choices> choices = cache().choose(states_of_all, count, depth, {});
        for (const Choice& each : choices->wait()) *likeliest++ = each.likeliest;
    }
    count_heads(count, depth);
}

void Session::count_heads(int count, int depth) {
    (depth == spec().blocks ? stats.final_heads : stats.exit_heads) += static_cast<std::uint64_t>(count);
}

// Tells of a sequence's newest token, and may choose it.
void Session::watch(int row, int depth, std::optional<std::int32_t> choice) {
    const int position = length(row) - 1;
    if (on_event) {
        Event event{Event::Kind::exit_taken, row};
        event.position = position;
        event.blocks_run = depth;
        on_event(event);
    }
    if (!shadow_ || !choice || !shadow_->choose()) return;
    if (depth < spec().blocks) {
        shadow_->add({row, position, depth, *choice});
    } else {
        checked(row, position, depth, true);
    }
}

void Session::checked(int row, int position, int blocks_run, bool agrees) {
    shadow_->record(row, position, agrees);
    if (blocks_run < spec().blocks) {
        ++stats.shadow_checks;
        stats.shadow_disagreements += !agrees;
    }
    if (!on_event) return;
    Event event{Event::Kind::shadow_check, row};
    event.position = position;
    event.blocks_run = blocks_run;
    event.agrees = agrees;
    on_event(event);
}

Address Session::gathered(std::size_t rows) {
    if (rows > gathered_rows_) {
        gathered_.reset();
        gathered_rows_ = 0;
        gathered_ = cache().allocate(rows);
        gathered_rows_ = rows;
    }
    return gathered_->address();
}

}  // namespace ojfa::core
