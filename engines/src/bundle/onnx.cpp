#include "bundle/onnx.hpp"

#include <stdexcept>

namespace ojfa::core {
namespace {

// Field numbers of onnx.proto, and protobuf's wire types.
enum : std::uint64_t {
    MODEL_GRAPH = 7,
    GRAPH_INITIALIZER = 5,
    GRAPH_INPUT = 11,
    TENSOR_DIMS = 1,
    TENSOR_TYPE = 2,
    TENSOR_NAME = 8,
    TENSOR_EXTERNAL = 13,
    TENSOR_LOCATION = 14,
    ENTRY_KEY = 1,
    ENTRY_VALUE = 2,
    VALUE_NAME = 1,
    VALUE_TYPE = 2,
    TYPE_TENSOR = 1,
    TENSOR_TYPE_SHAPE = 2,
    SHAPE_LENGTH = 1,
    LENGTH_VALUE = 1
};
enum : std::uint64_t { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };
constexpr std::uint64_t FLOAT = 1, FLOAT16 = 10;
constexpr std::uint64_t EXTERNAL = 1;

struct Field {
    std::uint64_t number, kind, value;  // the value of a varint
    Span<const unsigned char> bytes;    // of a message, a string, packed numbers
};

// Goes through the fields of a message.
class Message {
 public:
    explicit Message(Span<const unsigned char> bytes) : bytes_(bytes) {}

    bool next(Field& field) {
        if (at_ == bytes_.size()) return false;
        const std::uint64_t tag = varint();
        field = {tag >> 3, tag & 7, 0, {}};
        if (field.kind == VARINT) {
            field.value = varint();
        } else if (field.kind == FIXED64 || field.kind == FIXED32) {
            take(field.kind == FIXED64 ? 8 : 4);
        } else if (field.kind == BYTES) {
            field.bytes = take(varint());
        } else {
            throw std::runtime_error("it is no ONNX graph");
        }
        return true;
    }

    std::uint64_t varint() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            const unsigned char byte = take(1)[0];
            value |= std::uint64_t{byte & 127u} << shift;
            if (!(byte & 128u)) return value;
        }
        throw std::runtime_error("it is no ONNX graph");
    }

    bool ended() const { return at_ == bytes_.size(); }

 private:
    Span<const unsigned char> take(std::uint64_t count) {
        if (count > bytes_.size() - at_) throw std::runtime_error("it ends too early");
        const Span<const unsigned char> part(bytes_.data() + at_, static_cast<std::size_t>(count));
        at_ += static_cast<std::size_t>(count);
        return part;
    }

    Span<const unsigned char> bytes_;
    std::size_t at_ = 0;
};

std::string text(Span<const unsigned char> bytes) {
    return {bytes.begin(), bytes.end()};
}

std::uint64_t number(const std::string& value) {
    if (value.empty() || value.size() > 18 || value.find_first_not_of("0123456789") != std::string::npos)
        throw std::runtime_error("a tensor's place is no number");
    return std::stoull(value);
}

void read_entry(Span<const unsigned char> bytes, WeightPlace& weight) {
    Message message(bytes);
    std::string key, value;
    for (Field field; message.next(field);) {
        if (field.number == ENTRY_KEY) key = text(field.bytes);
        if (field.number == ENTRY_VALUE) value = text(field.bytes);
    }
    if (key == "location") weight.file = value;
    if (key == "offset") weight.offset = number(value);
    if (key == "length") weight.length = number(value);
}

void read_tensor(Span<const unsigned char> bytes, std::map<std::string, WeightPlace>& weights) {
    Message message(bytes);
    WeightPlace weight;
    std::string name;
    std::uint64_t type = 0, location = 0;
    for (Field field; message.next(field);) {
        if (field.number == TENSOR_DIMS && field.kind == VARINT) {
            weight.shape.push_back(static_cast<std::int64_t>(field.value));
        } else if (field.number == TENSOR_DIMS && field.kind == BYTES) {
            for (Message packed(field.bytes); !packed.ended();)
                weight.shape.push_back(static_cast<std::int64_t>(packed.varint()));
        } else if (field.number == TENSOR_TYPE) {
            type = field.value;
        } else if (field.number == TENSOR_NAME) {
            name = text(field.bytes);
        } else if (field.number == TENSOR_EXTERNAL) {
            read_entry(field.bytes, weight);
        } else if (field.number == TENSOR_LOCATION) {
            location = field.value;
        }
    }
    if (location != EXTERNAL) return;  // its data is in the graph: a constant
    if (weight.file.empty()) throw std::runtime_error("weight '" + name + "' is in no file");
    if (type != FLOAT && type != FLOAT16)
        throw std::runtime_error("weight '" + name + "' is neither fp32 nor fp16");
    weight.half = type == FLOAT16;
    if (!weights.emplace(name, weight).second)
        throw std::runtime_error("weight '" + name + "' is there twice");
}

// The part of a message that has a number, the last one where there are several; empty where there is none.
Span<const unsigned char> part_of(Span<const unsigned char> bytes, std::uint64_t number) {
    Message message(bytes);
    Span<const unsigned char> found;
    for (Field field; message.next(field);)
        if (field.number == number && field.kind == BYTES) found = field.bytes;
    return found;
}

void read_input(Span<const unsigned char> bytes, Graph& graph) {
    std::vector<std::int64_t> lengths;
    Message shape(part_of(part_of(part_of(bytes, VALUE_TYPE), TYPE_TENSOR), TENSOR_TYPE_SHAPE));
    for (Field field; shape.next(field);) {
        if (field.number != SHAPE_LENGTH || field.kind != BYTES) continue;
        lengths.push_back(-1);
        Message length(field.bytes);
        for (Field value; length.next(value);)
            if (value.number == LENGTH_VALUE && value.kind == VARINT)
                lengths.back() = static_cast<std::int64_t>(value.value);
    }
    graph.inputs[text(part_of(bytes, VALUE_NAME))] = lengths;
}

}  // namespace

std::uint64_t WeightPlace::bytes() const {
    constexpr std::uint64_t MOST = std::uint64_t{1} << 62;
    std::uint64_t total = half ? 2 : 4;
    for (const std::int64_t each : shape) {
        const auto factor = static_cast<std::uint64_t>(each);  // a negative one is more than any file has
        if (!factor) return 0;
        if (total > MOST / factor) return MOST;
        total *= factor;
    }
    return total;
}

Graph read_graph(Span<const unsigned char> model) {
    Graph result;
    Message outer(model);
    for (Field field; outer.next(field);) {
        if (field.number != MODEL_GRAPH || field.kind != BYTES) continue;
        Message graph(field.bytes);
        for (Field part; graph.next(part);) {
            if (part.kind != BYTES) continue;
            if (part.number == GRAPH_INITIALIZER) read_tensor(part.bytes, result.weights);
            if (part.number == GRAPH_INPUT) read_input(part.bytes, result);
        }
    }
    return result;
}

}  // namespace ojfa::core
