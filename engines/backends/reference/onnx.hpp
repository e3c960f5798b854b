// Where the weights of a portable graph lie: its external tensors, read from the ONNX file's wire format.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "span.hpp"

namespace ojfa::core {

struct TensorPlace {
    std::string file;  // beside the graph
    std::uint64_t offset = 0, length = 0;
    bool half = false;  // fp16, else fp32
    std::vector<std::int64_t> shape;
};

// The external tensors of a serialised ModelProto, by name. Throws std::runtime_error where it can't be read.
std::map<std::string, TensorPlace> external_tensors(Span<const unsigned char> model);

}  // namespace ojfa::core
