#include "onnx.hpp"

#include <stdexcept>

namespace ojfa::core {
namespace {

// Field numbers of onnx.proto, and protobuf's wire types.
enum : std::uint64_t {
    MODEL_GRAPH = 7,
    GRAPH_INITIALIZER = 5,
    TENSOR_DIMS = 1,
    TENSOR_TYPE = 2,
    TENSOR_NAME = 8,
    TENSOR_EXTERNAL = 13,
    ENTRY_KEY = 1,
    ENTRY_VALUE = 2
};
enum : std::uint64_t { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };
constexpr std::uint64_t FLOAT = 1, FLOAT16 = 10;

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

void read_entry(Span<const unsigned char> bytes, TensorPlace& tensor) {
    Message message(bytes);
    std::string key, value;
    for (Field field; message.next(field);) {
        if (field.number == ENTRY_KEY) key = text(field.bytes);
        if (field.number == ENTRY_VALUE) value = text(field.bytes);
    }
    if (key == "location") tensor.file = value;
    if (key == "offset") tensor.offset = number(value);
    if (key == "length") tensor.length = number(value);
}

void read_tensor(Span<const unsigned char> bytes, std::map<std::string, TensorPlace>& tensors) {
    Message message(bytes);
    TensorPlace tensor;
    std::string name;
    std::uint64_t type = 0;
    for (Field field; message.next(field);) {
        if (field.number == TENSOR_DIMS && field.kind == VARINT) {
            tensor.shape.push_back(static_cast<std::int64_t>(field.value));
        } else if (field.number == TENSOR_DIMS && field.kind == BYTES) {
            for (Message packed(field.bytes); !packed.ended();)
                tensor.shape.push_back(static_cast<std::int64_t>(packed.varint()));
        } else if (field.number == TENSOR_TYPE) {
            type = field.value;
        } else if (field.number == TENSOR_NAME) {
            name = text(field.bytes);
        } else if (field.number == TENSOR_EXTERNAL) {
            read_entry(field.bytes, tensor);
        }
    }
    if (tensor.file.empty()) return;  // its data is in the graph: a constant
    if (type != FLOAT && type != FLOAT16)
        throw std::runtime_error("weight '" + name + "' is neither fp32 nor fp16");
    tensor.half = type == FLOAT16;
    tensors[name] = tensor;
}

}  // namespace

std::map<std::string, TensorPlace> external_tensors(Span<const unsigned char> model) {
    std::map<std::string, TensorPlace> tensors;
    Message outer(model);
    for (Field field; outer.next(field);) {
        if (field.number != MODEL_GRAPH || field.kind != BYTES) continue;
        Message graph(field.bytes);
        for (Field part; graph.next(part);)
            if (part.number == GRAPH_INITIALIZER && part.kind == BYTES) read_tensor(part.bytes, tensors);
    }
    return tensors;
}

}  // namespace ojfa::core
