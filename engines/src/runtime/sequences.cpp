#include "runtime/sequences.hpp"

#include <algorithm>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

}  // namespace

Sequences::Sequences(const ModelSpec& spec, Engines& engines, int batch_size, int max_length, bool keep_final,
                     Interruption interruption)
    : spec_(spec),
      max_length_(max_length),
      row_bytes_(at(spec.hidden_size) * sizeof(float)),
      keep_final_(keep_final),
      interruption_(std::move(interruption)),
      cache_(engines.new_cache(batch_size, max_length, interruption_)),
      tokens_(at(batch_size)),
      marks_(at(batch_size), Watermarks(spec.blocks)) {}

void Sequences::rewind(int length, int row) {
    if (row < 0 || row >= batch_size())
        throw usage_failure("row " + std::to_string(row) + " is outside 0.." +
                            std::to_string(batch_size() - 1));
    if (length < 0 || length > this->length(row))
        throw usage_failure("can't rewind to " + std::to_string(length) + " tokens: the sequence has " +
                                std::to_string(this->length(row)),
                            "rewind only shortens a sequence");
    resize(row, length);
    tokens_[at(row)].resize(at(length));
}

void Sequences::check(const TokenRows& tokens) const {
    if (tokens.size() != tokens_.size())
        throw usage_failure("got tokens for " + std::to_string(tokens.size()) +
                                " sequences, the session has " + std::to_string(tokens_.size()),
                            "give one list of token ids per sequence");
    for (int row = 0; row < batch_size(); ++row) {
        const Span<const std::int32_t> ids = tokens[at(row)];
        if (ids.size() > at(max_length_ - length(row)))
            throw usage_failure("sequence " + std::to_string(row) + " would have " +
                                    std::to_string(at(length(row)) + ids.size()) +
                                    " tokens, the cache holds " + std::to_string(max_length_),
                                "shorten it, or build the bundle with a larger --max-cache-length");
        const auto known = [this](std::int32_t id) { return id >= 0 && id < spec_.vocab_size; };
        if (!std::all_of(ids.begin(), ids.end(), known))
            throw usage_failure("sequence " + std::to_string(row) + " has token ids outside 0.." +
                                    std::to_string(spec_.vocab_size - 1),
                                "was the text encoded with another model's tokenizer?");
    }
}

void Sequences::append(const TokenRows& tokens) {
    for (int row = 0; row < batch_size(); ++row) {
        const Span<const std::int32_t> ids = tokens[at(row)];
        if (ids.empty()) continue;
        resize(row, length(row) + static_cast<int>(ids.size()));
        tokens_[at(row)].insert(tokens_[at(row)].end(), ids.begin(), ids.end());
    }
}

// Makes the marks fit a sequence's new length. LongRoPE rotates every position by the sequence's length
// class: a change starts over.
void Sequences::resize(int row, int length) {
    newest_.depth = 0;
    if (spec_.rotary_switch && (length > *spec_.rotary_switch) != long_context(row)) {
        marks_[at(row)].lower_to(0);
    } else if (length < this->length(row)) {
        marks_[at(row)].lower_to(length);
    }
}

bool Sequences::long_context(int row) const {
    return spec_.rotary_switch && length(row) > *spec_.rotary_switch;
}

// Rows must be neighbours in the cache. One between them that stopped earlier runs along, as that costs less
// than another pass: it computes something at a position that no block from there on has processed, and what
// it writes is overwritten before it is read.
std::vector<Sequences::Group> Sequences::groups(const Wanted& wanted, int depth) const {
    std::vector<Group> result;
    for (int first = 0; first < batch_size();) {
        int stop = first + 1;
        const std::optional<int> block = wanted[at(first)] ? entry(first, depth) : std::nullopt;
        for (int row = first + 1; block && row < batch_size(); ++row) {
            const bool none_waits = watermark(*block, row) == length(row);
            if (none_waits || long_context(row) != long_context(first)) break;
            if (!wanted[at(row)]) continue;
            if (entry(row, depth) != block) break;
            stop = row + 1;
        }
        if (wanted[at(first)]) result.push_back({first, stop});
        first = stop;
    }
    return result;
}

// The block before which a sequence's one token waits; none where it has more to run.
std::optional<int> Sequences::entry(int row, int depth) const {
    const Watermarks& marks = marks_[at(row)];
    if (marks.all_at(length(row) - 1, depth)) return 0;
    const std::vector<Watermarks::Span> spans = marks.spans(depth);
    if (spans.size() == 2 && spans[0].mark == length(row) && spans[1].mark == length(row) - 1)
        return spans[1].first;
    return std::nullopt;
}

States Sequences::deepen(Group group, int depth, const Wanted& wanted) {
    const int end = length(group.first), count = group.stop - group.first;
    std::vector<std::int32_t> starts;
    const auto starts_before = [&](int block) {
        starts.clear();
        for (int row = group.first; row < group.stop; ++row) starts.push_back(watermark(block, row));
    };
    starts_before(0);
    States states = embed(group, starts);
    if (states.tokens) newest_.depth = 0;
    for (const Watermarks::Span& span : marks_[at(group.first)].spans(depth)) {
        const int covered = end - states.tokens;
        if (span.mark < covered) {
            starts_before(span.first);
            states = waiting(span.first, group, starts, covered - span.mark, states);
        }
        if (!states.tokens) continue;
        newest_.depth = 0;
        interruption_();
        const Rows rows = {group.first, count, states.tokens, starts, long_context(group.first)};
        states.address = cache_->run_blocks(span.first, span.stop, states.address, rows);
    }
    if (states.tokens) {
        const Rows rows = {group.first, count, states.tokens, starts, long_context(group.first)};
        keep(depth, rows, states.address);
        if (states.tokens == 1) newest_ = {depth, group, starts, states.address};
    }
    // Raised together, when all is done: a pass that is interrupted can be run again.
    for (int row = group.first; row < group.stop; ++row)
        if (wanted[at(row)]) marks_[at(row)].raise_to(length(row), depth);
    return states;
}

Address Sequences::run_ahead(int depth) {
    newest_.depth = 0;
    ran_ahead_ = {depth, {0, batch_size()}, {}, 0};
    for (int row = 0; row < batch_size(); ++row) ran_ahead_.starts.push_back(length(row));
    const Rows rows = {0, batch_size(), 1, ran_ahead_.starts, long_context(0)};
    ran_ahead_.address = cache_->run_blocks(0, depth, cache_->embed_chosen(rows), rows);
    keep(depth, rows, ran_ahead_.address);
    return ran_ahead_.address;
}

void Sequences::take_ahead(const TokenRows& tokens) {
    append(tokens);
    for (int row = 0; row < batch_size(); ++row) marks_[at(row)].raise_to(length(row), ran_ahead_.depth);
    newest_ = ran_ahead_;
}

// Embeds what waits before the first block: nothing, where tokens wait only later.
States Sequences::embed(Group group, const std::vector<std::int32_t>& starts) {
    const int count = length(group.first) - starts[0];
    if (!count) return {};
    std::vector<std::int32_t> ids;
    for (int row = group.first; row < group.stop; ++row) {
        const auto first = tokens_[at(row)].begin() + starts[at(row - group.first)];
        ids.insert(ids.end(), first, first + count);
    }
    const Rows rows = {group.first, group.stop - group.first, count, starts, long_context(group.first)};
    return {cache_->embed(ids, rows), count};
}

// Hidden states that wait before a block, `count` of each sequence (1 of several), and the newer ones behind
// them.
States Sequences::waiting(int depth, Group group, const std::vector<std::int32_t>& starts, int count,
                          States newer) {
    if (depth == newest_.depth && group.first == newest_.group.first && group.stop == newest_.group.stop &&
        starts == newest_.starts && count == 1 && !newer.tokens)
        return {newest_.address, 1};  // still where it was computed
    const Memory& kept = *kept_.at(depth);
    if (group.stop - group.first == 1 && !newer.tokens)
        return {kept_row(kept, group.first, starts[0]), count};
    const Address target = joined(at(count + newer.tokens) * starts.size());
    for (std::size_t i = 0; i < starts.size(); ++i)
        cache_->copy(kept_row(kept, group.first + static_cast<int>(i), starts[i]),
                     row_of(target, i * at(count)), at(count));
    if (newer.tokens) cache_->copy(newer.address, row_of(target, at(count)), at(newer.tokens));
    return {target, count + newer.tokens};
}

// Keeps hidden states for later.
void Sequences::keep(int depth, const Rows& rows, Address states) {
    if (depth == spec_.blocks && !keep_final_) return;
    std::unique_ptr<Memory>& kept = kept_[depth];
    if (!kept) kept = cache_->allocate(at(batch_size()) * at(max_length_));
    cache_->keep(kept->address(), at(max_length_), states, rows);
}

Address Sequences::final_state(int row, int position) const {
    return kept_row(*kept_.at(spec_.blocks), row, position);
}

Address Sequences::kept_row(const Memory& kept, int row, int position) const {
    return row_of(kept.address(), at(row) * at(max_length_) + at(position));
}

// Room for this many hidden states one behind the other, until the next call.
Address Sequences::joined(std::size_t rows) {
    if (rows > joined_rows_) {
        joined_.reset();
        joined_ = cache_->allocate(rows);
        joined_rows_ = rows;
    }
    return joined_->address();
}

}  // namespace ojfa::core
