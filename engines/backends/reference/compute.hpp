// The arithmetic of a block and of heads, row by row: sums in double, results in fp32.
#pragma once

#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "weights.hpp"

namespace ojfa::core {

using Row = std::vector<double>;

// x W (+ b) for W [inputs, outputs].
Row linear(const Row& x, const Tensor& weight, const Tensor* bias);

// x W^T (+ b) for W [outputs, inputs].
Row linear_transposed(const Row& x, const Tensor& weight, const Tensor* bias);

// x / sqrt(mean(x^2) + epsilon).
Row root_mean_square(const Row& x, double epsilon);

// RMSNorm or LayerNorm with the weights `name`.weight and `name`.bias.
Row norm(const ModelSpec& spec, const Row& x, const Weights& weights, const std::string& name);

// RMSNorm with a weight of each so many values from `first` on, in place.
void norm_parts(const ModelSpec& spec, Row& x, std::size_t first, std::size_t count, const Tensor& weight);

double activate(double x, Activation kind);

// tanh(x / cap) * cap, which stays within the cap; x where there is none.
double softcapped(double x, const std::optional<double>& cap);

// Rotates a head's leading features in place by a position's cosines and sines [rotary_dim / 2], each with
// its partner half of rotary_dim away.
void rotate(double* head, int rotary_dim, const float* cosines, const float* sines);

}  // namespace ojfa::core
