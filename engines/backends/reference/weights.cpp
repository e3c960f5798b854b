#include "weights.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#include "failure.hpp"

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

// A weight, whose place is inside its file. Throws Failure where it holds something else than numbers.
Tensor read_weight(const HeldFiles& files, const std::string& name, const WeightPlace& place) {
    const std::vector<char> bytes = files.read(place.file, place.offset, place.bytes());
    Tensor tensor{std::vector<float>(bytes.size() / (place.half ? 2 : 4)), place.shape};
    for (std::size_t i = 0; i < tensor.values.size(); ++i) {
        std::uint16_t half = 0;
        if (place.half) {
            std::memcpy(&half, bytes.data() + 2 * i, sizeof half);
            tensor.values[i] = widened(half);
        } else {
            std::memcpy(&tensor.values[i], bytes.data() + 4 * i, sizeof(float));
        }
        if (!std::isfinite(tensor.values[i]))
            throw bundle_failure((files.directory() / place.file).string() + ": weight '" + name +
                                     "' holds something else than finite numbers",
                                 REBUILD);
    }
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
    for (const auto& [weight, place] : bundle_.weights(name))
        weights->add(weight, read_weight(bundle_.files(), weight, place));
    return weights;
}

}  // namespace ojfa::core
