// What a portable graph says of itself: its inputs and where its weights lie, read from the ONNX file's wire
// format.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "span.hpp"

namespace ojfa::core {

struct WeightPlace {
    std::string file;  // beside the graph, as the graph has it
    std::uint64_t offset = 0;
    std::optional<std::uint64_t> length;  // bytes; none: what the shape needs
    bool half = false;                    // fp16, else fp32
    std::vector<std::int64_t> shape;

    // What the shape needs; at most 2^62, more than any file has.
    std::uint64_t bytes() const;
};

struct Graph {
    std::map<std::string, WeightPlace> weights;               // by name: the external tensors
    std::map<std::string, std::vector<std::int64_t>> inputs;  // shapes by name; -1 for lengths that vary
};

// Of a serialised ModelProto. Throws std::runtime_error where it can't be read.
Graph read_graph(Span<const unsigned char> model);

}  // namespace ojfa::core
