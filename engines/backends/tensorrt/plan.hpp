// What the bundle keeps for each graph; see ojfa_export/backends/tensorrt/plan.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"

namespace ojfa::tensorrt {

// Tokens of one call of an engine: few, and many, as of a prompt; a longer one runs in pieces.
constexpr int MOST_DECODE_TOKENS = 16, MOST_PREFILL_TOKENS = 1024;

// A weight in a file of the bundle's graphs; whether it goes to the device as [columns, rows].
struct Weight {
    std::string file;  // as the manifest names it
    std::uint64_t offset;
    std::vector<std::int64_t> shape;
    std::string precision;
    bool transposed;

    std::size_t element_bytes() const { return precision == "fp16" ? 2 : 4; }
    std::uint64_t count() const;
    std::uint64_t bytes() const { return count() * element_bytes(); }
};

struct Plan {
    std::string precision;                       // of matrix products and of the cache
    std::map<std::string, std::string> engines;  // files by part, in the plan's own directory
    std::map<std::string, std::string> kernels;  // files by precision, there too
    std::map<std::string, Weight> weights;       // by their names in the graph
};

// Of a graph, from a file of the bundle. Throws Failure where it is damaged, names files that the bundle
// doesn't hold, or other weights than the graph has.
Plan read_plan(const core::Bundle& bundle, const std::string& graph, const std::string& file);

}  // namespace ojfa::tensorrt
