// The weights of a bundle's graphs, widened to fp32, loaded when first used.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/account.hpp"
#include "bundle/bundle.hpp"

namespace ojfa::core {

struct Tensor {
    std::vector<float> values;
    std::vector<std::int64_t> shape;

    std::size_t rows() const { return static_cast<std::size_t>(shape.at(0)); }
    std::size_t columns() const { return shape.size() < 2 ? 1 : static_cast<std::size_t>(shape[1]); }
    const float* row(std::size_t index) const { return values.data() + index * columns(); }
};

// Those of one graph, by name.
class Weights {
 public:
    Weights(std::string graph, Account& account) : graph_(std::move(graph)), account_(account) {}

    // Throws Failure where there is none of that name and shape; a length 0 of the shape may be any.
    const Tensor& at(const std::string& name, const std::vector<std::int64_t>& shape) const;
    // The same, or null where there is none of that name.
    const Tensor* maybe(const std::string& name, const std::vector<std::int64_t>& shape) const;
    void add(const std::string& name, Tensor tensor);

 private:
    std::string graph_;
    Account& account_;
    std::map<std::string, Tensor> tensors_;
    std::vector<std::unique_ptr<Taken>> taken_;
};

// Any thread.
class WeightStore {
 public:
    WeightStore(const Bundle& bundle, Account& account);

    const Weights& graph(const std::string& name);

 private:
    std::unique_ptr<Weights> load(const std::string& name) const;

    const Bundle& bundle_;
    Account& account_;
    std::mutex mutex_;
    std::map<std::string, std::unique_ptr<Weights>> loaded_;
};

}  // namespace ojfa::core
