#include "runtime/generation.hpp"

#include <algorithm>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {

Generation::Generation(Session& session, std::unique_ptr<Decoder> decoder, Pending prompts,
                       int max_new_tokens, std::set<std::int32_t> end_tokens)
    : session_(session),
      decoder_(std::move(decoder)),
      pending_(std::move(prompts)),
      max_new_tokens_(max_new_tokens),
      end_tokens_(std::move(end_tokens)),
      counts_(pending_.size()) {
    if (max_new_tokens < 1)
        throw usage_failure("max-new-tokens must be 1 or more, not " + std::to_string(max_new_tokens));
    if (pending_.size() != static_cast<std::size_t>(session.batch_size()))
        throw usage_failure("got prompts for " + std::to_string(pending_.size()) +
                                " sequences, the session has " + std::to_string(session.batch_size()),
                            "give one list of token ids per sequence");
    if (std::all_of(pending_.begin(), pending_.end(), [](auto& ids) { return ids.empty(); }))
        throw usage_failure("every prompt is empty",
                            "give at least one token, such as the last one generated");
    for (int row = 0; row < session.batch_size(); ++row)
        lengths_.push_back(session.length(row) +
                           static_cast<int>(pending_[static_cast<std::size_t>(row)].size()));
}

std::optional<Token> Generation::next() {
    const auto going = [this] {
        return std::any_of(pending_.begin(), pending_.end(), [](auto& ids) { return !ids.empty(); });
    };
    while (known_.empty() && going()) step();
    if (known_.empty()) return std::nullopt;
    const Token token = known_.front();
    known_.pop_front();
    return token;
}

void Generation::step() {
    std::vector<int> wanted;
    for (const int count : counts_) wanted.push_back(max_new_tokens_ - count);
    const std::vector<std::vector<Chosen>> chosen = decoder_->step(pending_, wanted);
    for (std::size_t row = 0; row < chosen.size(); ++row) {
        pending_[row].clear();
        for (const Chosen& each : chosen[row]) {
            // The newest token isn't in the cache, and needs a row only if another follows.
            const int room = session_.max_length() - (lengths_[row] + counts_[row]);
            const Finish reason = finish(each, ++counts_[row], room);
            known_.push_back({static_cast<int>(row), each.id, each.blocks_run, each.drafted, reason});
            if (reason != Finish::none) {
                // Drafts that were accepted behind it are in the session already.
                const int used = lengths_[row] + counts_[row] - 1, sequence = static_cast<int>(row);
                if (session_.length(sequence) > used) session_.rewind(used, sequence);
                pending_[row].clear();
                break;
            }
            pending_[row] = {each.id};
        }
    }
}

Finish Generation::finish(const Chosen& chosen, int count, int room) const {
    if (end_tokens_.count(chosen.id)) return Finish::end_of_text;
    if (count >= max_new_tokens_) return Finish::max_new_tokens;
    return room < 1 ? Finish::cache_full : Finish::none;
}

}  // namespace ojfa::core
