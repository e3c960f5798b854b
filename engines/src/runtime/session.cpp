#include "runtime/session.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

// Rows whose choices a comparison takes at a time.
constexpr int ROWS_AT_ONCE = 32;

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

Wanted with_new(const TokenRows& tokens) {
    Wanted wanted;
    for (const auto& ids : tokens) wanted.push_back(!ids.empty());
    return wanted;
}

int count_of(const Wanted& wanted) {
    return static_cast<int>(std::count(wanted.begin(), wanted.end(), 1));
}

}  // namespace

int resolve_exit(int exit, int blocks) {
    if (exit == 0) return blocks;
    if (exit < 0 || exit > blocks)
        throw usage_failure(
            "exit " + std::to_string(exit) + " is outside this model's 1.." + std::to_string(blocks),
            "exits count blocks run: a number from 1 to " + std::to_string(blocks) + ", or full");
    return exit;
}

// Takes back the new tokens of an operation that fails.
class Session::Unless {
 public:
    explicit Unless(Session& session) : session_(session) {
        for (int row = 0; row < session.batch_size(); ++row) lengths_.push_back(session.length(row));
    }
    ~Unless() {
        for (int row = 0; !done && row < session_.batch_size(); ++row)
            if (session_.length(row) > lengths_[at(row)]) session_.Sequences::rewind(lengths_[at(row)], row);
    }
    Unless(const Unless&) = delete;
    Unless& operator=(const Unless&) = delete;

    bool done = false;

 private:
    Session& session_;
    std::vector<int> lengths_;
};

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
    const bool watched = watching(true);
    if (watched && !answers.likeliest) {
        choices_.resize(tokens.size());
        answers.likeliest = choices_.data();
    }
    answer_scattered(wanted, depth, answers);
    failed.done = true;
    if (const int steps = count_of(wanted)) stats.exits[depth] += static_cast<std::uint64_t>(steps);
    for (int row = 0; watched && row < batch_size(); ++row)
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
        if (watching(false)) watch(row, depth, std::nullopt);
    }
}

void Session::decide(const TokenRows& tokens, const Policy& policy, Answers answers, std::int32_t* blocks_run,
                     double* confidences) {
    policy.check_fits(spec().blocks);
    check(tokens);
    Unless failed(*this);
    append_checked(tokens);
    const std::size_t sequences = tokens.size(), width = at(spec().vocab_size);
    Wanted going = with_new(tokens);
    std::vector<std::int32_t> chosen(sequences, -1);
    std::vector<double> asked(policy.exits.size() * sequences, std::numeric_limits<double>::quiet_NaN());
    std::fill_n(blocks_run, sequences, 0);
    if (answers.logits) std::fill_n(answers.logits, sequences * width, 0.0f);
    // Of the sequences that go on, one behind the other.
    std::vector<float> packed;
    std::vector<std::int32_t> best(sequences);
    std::vector<double> sure(sequences);
    Stats counted;
    const auto ask = [&](int depth, double* confidence) {
        if (answers.logits) packed.resize(at(count_of(going)) * width);
        answer(going, depth,
               {answers.logits ? packed.data() : nullptr, best.data(), confidence, policy.measure});
    };
    const auto take = [&](std::size_t row, std::size_t place, int depth) {
        if (answers.logits) std::copy_n(packed.data() + place * width, width, answers.logits + row * width);
        chosen[row] = best[place];
        blocks_run[row] = depth;
        ++counted.exits[depth];
    };
    for (std::size_t index = 0; index < policy.exits.size() && count_of(going); ++index) {
        const int depth = policy.exits[index];
        ask(depth, sure.data());
        const Wanted before = going;
        for (std::size_t row = 0, place = 0; row < sequences; ++row) {
            if (!before[row]) continue;
            asked[index * sequences + row] = sure[place];
            ++counted.checks;
            if (sure[place] >= policy.thresholds[index]) {
                take(row, place, depth);
                going[row] = 0;
                ++counted.stopped[depth];
                counted.confidence_sums[depth] += sure[place];
            }
            ++place;
        }
    }
    if (count_of(going)) ask(spec().blocks, nullptr);
    for (std::size_t row = 0, place = 0; row < sequences; ++row)
        if (going[row]) take(row, place++, spec().blocks);
    failed.done = true;
    stats.checks += counted.checks;
    for (const auto& [depth, count] : counted.exits) stats.exits[depth] += count;
    for (const auto& [depth, count] : counted.stopped) stats.stopped[depth] += count;
    for (const auto& [depth, sum] : counted.confidence_sums) stats.confidence_sums[depth] += sum;
    if (answers.likeliest) std::copy(chosen.begin(), chosen.end(), answers.likeliest);
    if (confidences) std::copy(asked.begin(), asked.end(), confidences);
    for (int row = 0; watching(true) && row < batch_size(); ++row)
        if (blocks_run[row]) watch(row, blocks_run[row], chosen[at(row)]);
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
    answer_scattered(waiting, depth, answers);
}

void Session::rewind(int length, int row) {
    const bool known = row >= 0 && row < batch_size(), was_long = known && long_context(row);
    Sequences::rewind(length, row);
    // What was said with the long factors can't be compared once they no longer apply.
    if (shadow_) shadow_->forget(row, was_long != long_context(row) ? 0 : length);
}

int Session::run_shadow_checks(std::optional<int> budget) {
    if (!shadow_)
        throw usage_failure("this session chooses no tokens for shadow checks",
                            "open it with a shadow share");
    std::vector<Due> due = shadow_->due();
    if (budget) due.resize(std::min(due.size(), at(*budget)));
    const int blocks = spec().blocks;
    Wanted waiting(at(batch_size()), 0);
    for (const Due& each : due)
        if (watermark(blocks - 1, each.row) <= each.position) waiting[at(each.row)] = 1;
    for (const Group group : groups(waiting, blocks)) Sequences::deepen(group, blocks, waiting);
    std::vector<std::int32_t> choices(ROWS_AT_ONCE);
    for (std::size_t start = 0; start < due.size(); start += ROWS_AT_ONCE) {
        const int count = static_cast<int>(std::min<std::size_t>(ROWS_AT_ONCE, due.size() - start));
        const Address states = gathered(at(count));
        for (int i = 0; i < count; ++i) {
            const Due& each = due[start + at(i)];
            cache().copy(final_state(each.row, each.position), row_of(states, at(i)), 1);
        }
        head(states, count, blocks, {nullptr, choices.data()});
        for (int i = 0; i < count; ++i) {
            const Due& each = due[start + at(i)];
            checked(each.row, each.position, each.blocks_run, each.choice == choices[at(i)]);
        }
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
    const auto& rotary_switch = spec().rotary_switch;
    if (shadow_ && !shadow_->due().empty() && rotary_switch)
        for (int row = 0; row < batch_size(); ++row)
            if (length(row) <= *rotary_switch &&
                length(row) + static_cast<int>(tokens[at(row)].size()) > *rotary_switch) {
                run_shadow_checks();  // beyond the switch the full model's past is another
                break;
            }
    append(tokens);
}

// Runs sequences through the first blocks; [wanted, V] and [wanted] of their newest tokens.
void Session::answer(const Wanted& wanted, int depth, const HeadOutputs& outputs) {
    const int count = count_of(wanted);
    if (!count) return;
    const std::vector<Group> together = groups(wanted, depth);
    Address newest = 0;
    std::size_t place = 0;
    for (const Group group : together) {
        const States states = Sequences::deepen(group, depth, wanted);
        // One token of neighbours that are all wanted lies as a head takes it.
        if (together.size() == 1 && group.stop - group.first == count) {
            newest = row_of(states.address, at(states.tokens - 1));
            break;
        }
        if (!newest) newest = gathered(at(count));
        for (int row = group.first; row < group.stop; ++row) {
            if (!wanted[at(row)]) continue;
            const std::size_t last = at((row - group.first + 1) * states.tokens - 1);
            cache().copy(row_of(states.address, last), row_of(newest, place++), 1);
        }
    }
    head(newest, count, depth, outputs);
}

void Session::answer_scattered(const Wanted& wanted, int depth, Answers answers) {
    const std::size_t width = at(spec().vocab_size), sequences = wanted.size();
    const int count = count_of(wanted);
    if (at(count) == sequences) {
        answer(wanted, depth, {answers.logits, answers.likeliest});
        return;
    }
    std::vector<std::int32_t> choices(at(count));
    if (answers.logits) logits_.resize(at(count) * width);
    answer(wanted, depth, {answers.logits ? logits_.data() : nullptr, choices.data()});
    if (answers.logits) std::fill_n(answers.logits, sequences * width, 0.0f);
    if (answers.likeliest) std::fill_n(answers.likeliest, sequences, -1);
    for (std::size_t row = 0, place = 0; row < sequences; ++row) {
        if (!wanted[row]) continue;
        if (answers.logits) std::copy_n(logits_.data() + place * width, width, answers.logits + row * width);
        if (answers.likeliest) answers.likeliest[row] = choices[place];
        ++place;
    }
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
    head(states_of_all, static_cast<int>(total), depth, {logits, likeliest});
}

void Session::head(Address hidden, int count, int depth, const HeadOutputs& outputs) {
    check_interruption();
    cache().head(hidden, count, depth, outputs);
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
