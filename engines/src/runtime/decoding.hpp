// From what a session computes to the next tokens; see ojfa_export/runtime/decoding.py and speculation.py.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <variant>
#include <vector>

#include "runtime/policy.hpp"
#include "runtime/sampling.hpp"
#include "runtime/session.hpp"
#include "runtime/speculation.hpp"

namespace ojfa::core {

// A token that was chosen, the blocks that computed it, and whether speculation proposed it.
struct Chosen {
    std::int32_t id;
    int blocks_run;
    bool drafted = false;
};

using Pending =
    std::vector<std::vector<std::int32_t>>;  // tokens of each sequence that the session doesn't have

class Decoder {
 public:
    virtual ~Decoder() = default;
    Decoder() = default;
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    // Each sequence's next tokens, one or more, none for one without pending tokens; `wanted` is how many
    // each may use at most. The last of them isn't in the session. Where it throws, it can be called again.
    virtual std::vector<std::vector<Chosen>> step(const Pending& pending, const std::vector<int>& wanted) = 0;
};

// One token per step, at a fixed exit (blocks run) or where a policy stops.
class StepByStep : public Decoder {
 public:
    StepByStep(Session& session, Way way, const Sampling& sampling);
    std::vector<std::vector<Chosen>> step(const Pending& pending, const std::vector<int>& wanted) override;

 private:
    Drawing drawing(const Pending& pending, std::size_t ahead);

    Session& session_;
    Way way_;
    Sampling sampling_;
    std::vector<Random> generators_;
    // Numbers that were drawn of each, for this step and the one after it. They are used up when a step is
    // done, so that one that failed is the same when it is called again.
    std::vector<std::deque<double>> drawn_;
};

// Several tokens per full pass.
class Speculator : public Decoder {
 public:
    Speculator(Session& session, const Speculation& speculation, const Sampling& sampling,
               std::set<std::int32_t> end_tokens);
    std::vector<std::vector<Chosen>> step(const Pending& pending, const std::vector<int>& wanted) override;

 private:
    struct Draft {
        std::vector<std::int32_t> tokens;
        std::vector<std::vector<double>> proposals;  // the distributions they were drawn from
    };

    int draft_length(int row, int length, int wanted, int together);
    std::vector<Draft> draft(const Pending& pending, const std::vector<int>& limits);
    std::int32_t propose(Span<const float> logits, int row, Draft& draft);
    std::vector<std::int32_t> check(const Draft& draft, const float* logits, const std::int32_t* likeliest,
                                    int row);
    void record(int row, int drafted, int accepted);

    Session& session_;
    Sampling sampling_;
    std::vector<Random> generators_;
    int exit_;
    std::optional<int> fixed_;
    std::vector<DraftLength> lengths_;
    std::set<std::int32_t> end_tokens_;
    std::vector<float> logits_;
};

}  // namespace ojfa::core
