#include "weights.hpp"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>

#include "failure.hpp"
#include "onnx.hpp"

namespace ojfa::core {
namespace {

const char* const REBUILD = "build the bundle again, or copy it again whole";

float widened(std::uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    float value = std::numeric_limits<float>::infinity();
    if (exponent == 0) {
        value = std::ldexp(static_cast<float>(mantissa), -24);
    } else if (exponent < 31) {
        value = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    } else if (mantissa) {
        value = std::numeric_limits<float>::quiet_NaN();
    }
    return half & 0x8000 ? -value : value;
}

std::vector<unsigned char> read_whole(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (!file) throw bundle_failure(path.string() + " can't be read", REBUILD);
    return bytes;
}

// A tensor of a file that has `size` bytes.
Tensor read_tensor(const std::filesystem::path& path, const TensorPlace& place, std::uint64_t size) {
    const std::uint64_t width = place.half ? 2 : 4;
    std::uint64_t count = 1;
    for (const std::int64_t length : place.shape) {
        if (length < 1 || static_cast<std::uint64_t>(length) > size)
            throw bundle_failure(path.string() + " has no room for a weight of that shape", REBUILD);
        count = std::min(count * static_cast<std::uint64_t>(length), size + 1);
    }
    if (count > size / width || place.offset > size - count * width)
        throw bundle_failure(path.string() + " ends before a weight that a graph refers to", REBUILD);
    Tensor tensor{std::vector<float>(count), place.shape};
    std::ifstream file(path, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(place.offset));
    const auto read = [&](void* to, std::uint64_t bytes) {
        file.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes));
    };
    if (place.half) {
        std::vector<std::uint16_t> halves(count);
        read(halves.data(), 2 * count);
        for (std::size_t i = 0; i < halves.size(); ++i) tensor.values[i] = widened(halves[i]);
    } else {
        read(tensor.values.data(), 4 * count);
    }
    if (!file) throw bundle_failure(path.string() + " can't be read", REBUILD);
    return tensor;
}

}  // namespace

const Tensor* Weights::maybe(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return nullptr;
    bool fits = found->second.shape.size() == shape.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i)
        fits = !shape[i] || shape[i] == found->second.shape[i];
    if (!fits)
        throw bundle_failure("weight '" + name + "' of graph '" + graph_ + "' has another shape", REBUILD);
    return &found->second;
}

const Tensor& Weights::at(const std::string& name, const std::vector<std::int64_t>& shape) const {
    if (const Tensor* tensor = maybe(name, shape)) return *tensor;
    throw bundle_failure("graph '" + graph_ + "' has no weight '" + name + "'", REBUILD);
}

void Weights::add(const std::string& name, Tensor tensor) {
    taken_.push_back(std::make_unique<Taken>(account_, tensor.values.size() * sizeof(float)));
    tensors_[name] = std::move(tensor);
}

WeightStore::WeightStore(const Bundle& bundle, Account& account) : bundle_(bundle), account_(account) {}

const Weights& WeightStore::graph(const std::string& name) {
    const std::lock_guard lock(mutex_);
    auto& weights = loaded_[name];
    if (!weights) weights = load(name);
    return *weights;
}

std::unique_ptr<Weights> WeightStore::load(const std::string& name) const {
    auto weights = std::make_unique<Weights>(name, account_);
    for (const GraphEntry& graph : bundle_.manifest().graphs) {
        if (graph.name != name) continue;
        const std::vector<unsigned char> model = read_whole(bundle_.directory() / graph.file);
        std::map<std::string, TensorPlace> places;
        try {
            places = external_tensors(model);
        } catch (const std::runtime_error& error) {
            throw bundle_failure(
                (bundle_.directory() / graph.file).string() + " can't be read: " + error.what(), REBUILD);
        }
        for (const auto& [weight, place] : places) {
            const std::string file = "graphs/" + place.file;
            const auto entry = bundle_.manifest().files.find(file);
            if (entry == bundle_.manifest().files.end())
                throw bundle_failure(
                    "graph '" + name + "' refers to '" + file + "', which the manifest does not name",
                    "don't use this bundle: it was altered");
            weights->add(weight, read_tensor(bundle_.directory() / file, place, entry->second.size));
        }
    }
    return weights;
}

}  // namespace ojfa::core
