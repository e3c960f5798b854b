#include "compute.hpp"

#include <algorithm>
#include <cmath>

namespace ojfa::core {

Row linear(const Row& x, const Tensor& weight, const Tensor* bias) {
    Row out(weight.columns(), 0.0);
    for (std::size_t i = 0; i < x.size(); ++i) {
        const float* const row = weight.row(i);
        for (std::size_t j = 0; j < out.size(); ++j) out[j] += x[i] * row[j];
    }
    for (std::size_t j = 0; bias && j < out.size(); ++j) out[j] += bias->values[j];
    return out;
}

Row linear_transposed(const Row& x, const Tensor& weight, const Tensor* bias) {
    Row out(weight.rows());
    for (std::size_t j = 0; j < out.size(); ++j) {
        const float* const row = weight.row(j);
        double sum = bias ? static_cast<double>(bias->values[j]) : 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * row[i];
        out[j] = sum;
    }
    return out;
}

Row root_mean_square(const Row& x, double epsilon) {
    double squares = 0;
    for (const double each : x) squares += each * each;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + epsilon);
    Row out(x);
    for (double& each : out) each *= scale;
    return out;
}

Row norm(const ModelSpec& spec, const Row& x, const Weights& weights, const std::string& name) {
    const std::vector<std::int64_t> shape = {spec.hidden_size};
    const Tensor& weight = weights.at(name + ".weight", shape);
    Row out = x;
    if (spec.norm == NormKind::layer) {
        double mean = 0;
        for (const double each : x) mean += each;
        mean /= static_cast<double>(x.size());
        for (double& each : out) each -= mean;
    }
    out = root_mean_square(out, spec.norm_epsilon);
    const Tensor* const bias = spec.norm == NormKind::layer ? &weights.at(name + ".bias", shape) : nullptr;
    for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = out[i] * weight.values[i] + (bias ? static_cast<double>(bias->values[i]) : 0.0);
    return out;
}

void norm_parts(const ModelSpec& spec, Row& x, std::size_t first, std::size_t count, const Tensor& weight) {
    const std::size_t width = weight.rows();
    for (std::size_t at = first; at < first + count; at += width) {
        const auto begin = x.begin() + static_cast<std::ptrdiff_t>(at);
        const Row part =
            root_mean_square({begin, begin + static_cast<std::ptrdiff_t>(width)}, spec.norm_epsilon);
        for (std::size_t i = 0; i < width; ++i) x[at + i] = part[i] * weight.values[i];
    }
}

double activate(double x, Activation kind) {
    switch (kind) {
        case Activation::silu:
            return x / (1 + std::exp(-x));
        case Activation::gelu:
            return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
        case Activation::relu:
            return std::max(x, 0.0);
    }
    return x;
}

double softcapped(double x, const std::optional<double>& cap) {
    return cap ? std::tanh(x / *cap) * *cap : x;
}

void rotate(double* head, int rotary_dim, const float* cosines, const float* sines) {
    const int half = rotary_dim / 2;
    for (int i = 0; i < half; ++i) {
        const double first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i] + first * sines[i];
    }
}

}  // namespace ojfa::core
