// What a session counts of its work; see ojfa_export/runtime/stats.py.
#pragma once

#include <cstdint>
#include <map>

namespace ojfa::core {

struct Stats {
    std::map<int, std::uint64_t> exits;      // steps of one sequence by blocks run
    std::map<int, std::uint64_t> stopped;    // tokens that a policy stopped early, by blocks run
    std::map<int, double> confidence_sums;   // their confidence
    std::uint64_t exit_heads = 0;            // rows that the exit head was applied to
    std::uint64_t final_heads = 0;           // rows that the model's own head was applied to
    std::uint64_t checks = 0;                // those of exit_heads that a threshold was compared with
    std::uint64_t drafted = 0;               // tokens that speculation proposed
    std::uint64_t accepted = 0;              // those of them that the full model took
    std::uint64_t rounds = 0;                // full passes that checked drafts
    std::uint64_t shadow_checks = 0;         // early tokens that were compared with the full model
    std::uint64_t shadow_disagreements = 0;  // those of them that differ
};

}  // namespace ojfa::core
