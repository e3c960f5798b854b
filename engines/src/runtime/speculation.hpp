// Lossless self-speculation: an exit drafts, the remaining blocks check all drafts in one pass; see
// ojfa_export/decoding/speculation.py (Leviathan et al., arXiv 2211.17192).
#pragma once

#include <optional>

namespace ojfa::core {

constexpr int MOST_DRAFT = 8;
constexpr double PRIOR_ACCEPTANCE = 0.7;

// How to draft.
struct Speculation {
    std::optional<int> exit;           // blocks that draft; half of them
    std::optional<int> draft;          // tokens per draft; adapted to the acceptance
    std::optional<double> draft_cost;  // of a token, a full step being 1; the share of blocks
    double check_cost = 0.1;           // what another token adds to the pass that checks
    double round_cost = 0.0;           // what a pass that checks any takes beside that
    double acceptance = PRIOR_ACCEPTANCE;

    // Throws Failure where a setting is out of range.
    void check() const;
    // Blocks that draft. Throws Failure where that isn't before a model's last block.
    int resolve_exit(int blocks) const;
};

// How many tokens to draft for one sequence: with acceptance a, a round of K drafts gives 1 + a + ... + a^K
// tokens and costs 1 + r + K c full steps; the K with the most tokens per cost is taken. Of c, s is the
// check's: of n sequences together that part is n s / (1 + (n - 1) s). Among n drafts must gain a tenth, and
// each sequence tries them again an n-th as often as alone.
class DraftLength {
 public:
    DraftLength(double cost, double round_cost, double acceptance, double check_cost);

    // The next round's draft length, 0 to MOST_DRAFT, where so many sequences run together.
    int next(int together);

    // Takes a round's result; what follows the first rejected token says nothing.
    void learn(int accepted, int drafted);

 private:
    double cost_, round_cost_, check_cost_, accepted_, checked_;
    double rounds_without_ = 0;  // an n-th of a round where n run together
    int probe_after_;
};

}  // namespace ojfa::core
