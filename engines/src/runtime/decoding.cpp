#include "runtime/decoding.hpp"

#include <algorithm>
#include <utility>

namespace ojfa::core {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

TokenRows rows_of(const Pending& pending) {
    return {pending.begin(), pending.end()};
}

std::vector<Random> generators_of(const Session& session, const Sampling& sampling) {
    std::vector<Random> result;
    result.reserve(at(session.batch_size()));
    for (int row = 0; row < session.batch_size(); ++row) result.push_back(sampling.generator(row));
    return result;
}

}  // namespace

StepByStep::StepByStep(Session& session, Way way, const Sampling& sampling)
    : session_(session),
      way_(std::move(way)),
      sampling_(sampling),
      generators_(generators_of(session, sampling)),
      drawn_(generators_.size()) {}

std::vector<std::vector<Chosen>> StepByStep::step(const Pending& pending, const std::vector<int>& wanted) {
    const Drawing how = drawing(pending, 0);
    std::vector<std::int32_t> tokens(pending.size()), blocks(pending.size());
    const bool goes_on = *std::min_element(wanted.begin(), wanted.end()) > 1;
    const Drawing next = goes_on ? drawing(pending, 1) : Drawing();
    session_.choose(rows_of(pending), way_, how, goes_on ? &next : nullptr, tokens.data(), blocks.data());
    std::vector<std::vector<Chosen>> result(pending.size());
    for (std::size_t row = 0; row < pending.size(); ++row) {
        if (pending[row].empty()) continue;
        result[row].push_back({tokens[row], blocks[row]});
        if (!drawn_[row].empty()) drawn_[row].pop_front();
    }
    return result;
}

// How tokens are chosen in this step, or so many steps later.
Drawing StepByStep::drawing(const Pending& pending, std::size_t ahead) {
    Drawing result = {sampling_, {}};
    if (sampling_.greedy()) return result;
    for (std::size_t row = 0; row < pending.size(); ++row) {
        while (!pending[row].empty() && drawn_[row].size() <= ahead)
            drawn_[row].push_back(generators_[row].uniform());
        result.draws.push_back(pending[row].empty() ? 0.0 : drawn_[row][ahead]);
    }
    return result;
}

Speculator::Speculator(Session& session, const Speculation& speculation, const Sampling& sampling,
                       std::set<std::int32_t> end_tokens)
    : session_(session),
      sampling_(sampling),
      generators_(generators_of(session, sampling)),
      exit_(speculation.resolve_exit(session.spec().blocks)),
      fixed_(speculation.draft),
      end_tokens_(std::move(end_tokens)) {
    const double draft_cost =
        speculation.draft_cost.value_or(static_cast<double>(exit_) / session.spec().blocks);
    const DraftLength length(draft_cost + speculation.check_cost, speculation.round_cost,
                             speculation.acceptance, speculation.check_cost);
    lengths_.assign(at(session.batch_size()), length);
}

std::vector<std::vector<Chosen>> Speculator::step(const Pending& pending, const std::vector<int>& wanted) {
    const int rows = session_.batch_size(), blocks = session_.spec().blocks;
    // Where this throws, drafts are taken back and everything that was drawn or learnt: it can be called
    // again.
    const std::vector<Random> generators = generators_;
    const std::vector<DraftLength> lengths = lengths_;
    std::vector<int> before, limits;
    // Sampled tokens are those of their seed, whatever runs beside them.
    const auto running =
        std::count_if(pending.begin(), pending.end(), [](const auto& ids) { return !ids.empty(); });
    const int together = sampling_.greedy() ? static_cast<int>(running) : 1;
    for (int row = 0; row < rows; ++row) {
        const int count = static_cast<int>(pending[at(row)].size());
        before.push_back(session_.length(row));
        limits.push_back(count ? draft_length(row, before.back() + count, wanted[at(row)], together) : 0);
    }
    std::vector<Draft> drafts;
    std::vector<int> counts;
    std::vector<std::int32_t> best;
    try {
        drafts = draft(pending, limits);
        Pending missing;
        int total = 0;
        for (int row = 0; row < rows; ++row) {
            const auto& tokens = drafts[at(row)].tokens;
            missing.push_back(tokens.empty() ? pending[at(row)] : std::vector<std::int32_t>{tokens.back()});
            counts.push_back(pending[at(row)].empty() ? 0 : static_cast<int>(tokens.size()) + 1);
            total += counts.back();
        }
        best.resize(at(total));
        if (!sampling_.greedy()) logits_.resize(at(total) * at(session_.spec().vocab_size));
        session_.complete(rows_of(missing), counts, sampling_.greedy() ? nullptr : logits_.data(),
                          best.data());
    } catch (...) {
        for (int row = 0; row < rows; ++row) session_.rewind(before[at(row)], row);
        generators_ = generators;
        lengths_ = lengths;
        throw;
    }
    std::vector<std::vector<Chosen>> result(pending.size());
    std::size_t place = 0;
    for (int row = 0; row < rows; ++row) {
        if (pending[at(row)].empty()) continue;
        const float* const logits =
            sampling_.greedy() ? nullptr : logits_.data() + place * at(session_.spec().vocab_size);
        const std::vector<std::int32_t> tokens = check(drafts[at(row)], logits, best.data() + place, row);
        const int accepted = static_cast<int>(tokens.size()) - 1;
        session_.rewind(before[at(row)] + static_cast<int>(pending[at(row)].size()) + accepted, row);
        record(row, static_cast<int>(drafts[at(row)].tokens.size()), accepted);
        for (int i = 0; i <= accepted; ++i) result[at(row)].push_back({tokens[at(i)], blocks, i < accepted});
        place += at(counts[at(row)]);
    }
    return result;
}

// As many as pay, are wanted, and fit behind `length` tokens.
int Speculator::draft_length(int row, int length, int wanted, int together) {
    int limit = std::min(wanted - 1, session_.max_length() - length);
    const auto& rotary_switch = session_.spec().rotary_switch;
    // Longer, all positions would be rotated by the long factors, these ones too.
    if (rotary_switch && length <= *rotary_switch) limit = std::min(limit, *rotary_switch - length);
    return std::min(limit, fixed_ ? *fixed_ : lengths_[at(row)].next(together));
}

std::vector<Speculator::Draft> Speculator::draft(const Pending& pending, const std::vector<int>& limits) {
    std::vector<Draft> drafts(pending.size());
    Pending fresh;
    for (std::size_t row = 0; row < pending.size(); ++row)
        fresh.push_back(limits[row] > 0 ? pending[row] : std::vector<std::int32_t>{});
    const std::size_t width = at(session_.spec().vocab_size);
    std::vector<float> logits(sampling_.greedy() ? 0 : pending.size() * width);
    std::vector<std::int32_t> best(pending.size());
    const auto any = [&] {
        return std::any_of(fresh.begin(), fresh.end(), [](auto& ids) { return !ids.empty(); });
    };
    while (any()) {
        session_.advance(rows_of(fresh), exit_, {sampling_.greedy() ? nullptr : logits.data(), best.data()});
        for (std::size_t row = 0; row < pending.size(); ++row) {
            if (fresh[row].empty()) continue;
            const std::int32_t token = sampling_.greedy() ? best[row]
                                                          : propose({logits.data() + row * width, width},
                                                                    static_cast<int>(row), drafts[row]);
            drafts[row].tokens.push_back(token);
            const bool more =
                static_cast<int>(drafts[row].tokens.size()) < limits[row] && !end_tokens_.count(token);
            fresh[row] = more ? std::vector<std::int32_t>{token} : std::vector<std::int32_t>{};
        }
    }
    return drafts;
}

std::int32_t Speculator::propose(Span<const float> logits, int row, Draft& draft) {
    draft.proposals.push_back(sampling_.probabilities(logits));
    return static_cast<std::int32_t>(generators_[at(row)].choice(draft.proposals.back()));
}

// The drafts that the full model takes, and the one token that it gives itself. A draft x, drawn from q, is
// taken with probability min(1, p(x) / q(x)); the first that isn't is replaced by a draw from max(0, p - q).
// After the last comes a draw from p. Each token is then distributed as p (arXiv 2211.17192, appendix A.1).
std::vector<std::int32_t> Speculator::check(const Draft& draft, const float* logits,
                                            const std::int32_t* likeliest, int row) {
    const std::size_t width = at(session_.spec().vocab_size), count = draft.tokens.size();
    std::vector<std::int32_t> tokens;
    if (sampling_.greedy()) {
        for (std::size_t i = 0; i <= count; ++i) {
            tokens.push_back(likeliest[i]);
            if (i < count && draft.tokens[i] != likeliest[i]) break;
        }
        return tokens;
    }
    Random& random = generators_[at(row)];
    for (std::size_t i = 0; i < count; ++i) {
        const std::vector<double> p = sampling_.probabilities({logits + i * width, width});
        const std::vector<double>& q = draft.proposals[i];
        const std::size_t token = at(draft.tokens[i]);
        if (random.uniform() * q[token] >= p[token]) {
            std::vector<double> rest(width);
            double total = 0;
            for (std::size_t id = 0; id < width; ++id) total += rest[id] = std::max(p[id] - q[id], 0.0);
            // p and q may differ by less than p - q can show.
            if (total > 0)
                for (double& each : rest) each /= total;
            tokens.push_back(static_cast<std::int32_t>(random.choice(total > 0 ? rest : p)));
            return tokens;
        }
        tokens.push_back(draft.tokens[i]);
    }
    const std::vector<double> p = sampling_.probabilities({logits + count * width, width});
    tokens.push_back(static_cast<std::int32_t>(random.choice(p)));
    return tokens;
}

void Speculator::record(int row, int drafted, int accepted) {
    lengths_[at(row)].learn(accepted, drafted);
    session_.stats.drafted += static_cast<std::uint64_t>(drafted);
    session_.stats.accepted += static_cast<std::uint64_t>(accepted);
    ++session_.stats.rounds;
    if (!session_.on_event) return;
    Event event{Event::Kind::draft_checked, row};
    event.drafted = drafted;
    event.accepted = accepted;
    session_.on_event(event);
}

}  // namespace ojfa::core
