// What the kernels with a block's matrices compute, one number after the other.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "binding.hpp"

namespace stand_in {
namespace {

using std::size_t;

double activated(double x, int kind) {
    if (kind == 0) return x / (1 + std::exp(-x));
    if (kind == 1) return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    if (kind == 2)
        return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    return std::max(x, 0.0);
}

// A token's inputs after their norm.
std::vector<double> normed(const Program& program, const float* hidden, const float* weight,
                           const float* bias, float epsilon, int width) {
    std::vector<double> out(hidden, hidden + width);
    double mean = 0, square = 0;
    if (weight && program.at("NORM_LAYER")) {
        for (const double x : out) mean += x;
        mean /= width;
    }
    for (const double x : out) square += (x - mean) * (x - mean);
    const double scale = 1 / std::sqrt(square / width + static_cast<double>(epsilon));
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = (out[i] - mean) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
    return out;
}

double dot(const Program& program, const std::vector<double>& x, const void* matrix, int columns, int row) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += x[i] * program.read(matrix, at(row) * at(columns) + i);
    return sum;
}

// A token's activated products, of inputs that are normed.
void up(const Program& program, void* inner, int token, const std::vector<double>& x, const void* matrix,
        const float* add, int columns, int width) {
    for (int row = 0; row < width; ++row) {
        const auto sum = [&](int of) {
            return dot(program, x, matrix, columns, of) + (add ? add[of] : 0.0f);
        };
        const double y = activated(sum(row), program.at("ACTIVATION"));
        program.write(inner, at(token) * at(width) + at(row),
                      static_cast<float>(program.at("GATED") ? y * sum(width + row) : y));
    }
}

std::vector<double> row_of(const Program& program, const void* x, int token, int columns) {
    std::vector<double> row;
    for (int i = 0; i < columns; ++i) row.push_back(program.read(x, at(token) * at(columns) + at(i)));
    return row;
}

}  // namespace

void norm_linear(const Program& program, float* out, const float* hidden, int tokens, const float* weight,
                 const float* bias, float epsilon, int width, const void* matrix, const float* add,
                 int columns, int outputs) {
    for (int token = 0; token < tokens; ++token) {
        const auto x = normed(program, hidden + token * width, weight, bias, epsilon, width);
        for (int row = 0; row < outputs; ++row)
            out[at(token) * at(outputs) + at(row)] =
                static_cast<float>(dot(program, x, matrix, columns, row) + (add ? add[row] : 0.0f));
    }
}

void norm_up(const Program& program, void* inner, const float* hidden, int tokens, const float* weight,
             const float* bias, float epsilon, const void* matrix, const float* add, int columns, int width) {
    for (int token = 0; token < tokens; ++token) {
        const auto x = normed(program, hidden + token * columns, weight, bias, epsilon, columns);
        up(program, inner, token, x, matrix, add, columns, width);
    }
}

void linear(const Program& program, float* out, const float* residual, const void* x, int tokens,
            const void* matrix, const float* add, int columns, int outputs) {
    for (int token = 0; token < tokens; ++token) {
        const std::vector<double> inputs = row_of(program, x, token, columns);
        for (int row = 0; row < outputs; ++row) {
            const int place = token * outputs + row;
            out[place] = static_cast<float>(dot(program, inputs, matrix, columns, row) +
                                            (add ? add[row] : 0.0f) + (residual ? residual[place] : 0.0f));
        }
    }
}

std::map<std::string, Kernel> with_products(std::map<std::string, Kernel> kernels) {
    kernels.insert(
        {{"norm_linear", kernel(+[](Program& program, const Launch& launch, float* out, const float* hidden,
                                    const float* weight, const float* bias, float epsilon, int width,
                                    const void* matrix, const float* add, int columns, int outputs) {
              if (!program.called_off)
                  norm_linear(program, out, hidden, launch.tokens, weight, bias, epsilon, width, matrix, add,
                              columns, outputs);
          })},
         {"norm_up", kernel(+[](Program& program, const Launch& launch, void* inner, const float* hidden,
                                const float* weight, const float* bias, float epsilon, const void* matrix,
                                const float* add, int columns, int width) {
              if (!program.called_off)
                  norm_up(program, inner, hidden, launch.tokens, weight, bias, epsilon, matrix, add, columns,
                          width);
          })},
         {"linear",
          kernel(+[](Program& program, const Launch& launch, float* out, const float* residual, const void* x,
                     const void* matrix, const float* add, int columns, int outputs) {
              if (!program.called_off)
                  linear(program, out, residual, x, launch.tokens, matrix, add, columns, outputs);
          })},
         {"norm_narrow_linear",
          kernel(+[](Program& program, const Launch&, float* out, const float* hidden, const float* weight,
                     const float* bias, float epsilon, int width, const void* matrix, const float* add,
                     int columns, int outputs, int tokens, int) {
              if (!program.called_off)
                  norm_linear(program, out, hidden, tokens, weight, bias, epsilon, width, matrix, add,
                              columns, outputs);
          })},
         {"norm_narrow_up",
          kernel(+[](Program& program, const Launch&, void* inner, const float* hidden, const float* weight,
                     const float* bias, float epsilon, int, const void* matrix, const float* add, int columns,
                     int width_out, int tokens, int) {
              if (!program.called_off)
                  norm_up(program, inner, hidden, tokens, weight, bias, epsilon, matrix, add, columns,
                          width_out);
          })},
         {"narrow_linear",
          kernel(+[](Program& program, const Launch&, float* out, const float* residual, const void* x,
                     const void* matrix, const float* add, int columns, int outputs, int tokens, int) {
              if (!program.called_off)
                  linear(program, out, residual, x, tokens, matrix, add, columns, outputs);
          })},
         {"normalize",
          kernel(+[](Program& program, const Launch& launch, void* x, const float* hidden,
                     const float* weight, const float* bias, float epsilon, int width, int columns) {
              for (int token = 0; token < launch.x; ++token) {
                  auto row = normed(program, hidden + token * width, weight, bias, epsilon, width);
                  row.resize(at(columns));
                  for (int i = 0; i < columns; ++i)
                      program.write(x, at(token) * at(columns) + at(i), static_cast<float>(row[at(i)]));
              }
          })},
         {"tiled_up",
          kernel(+[](Program& program, const Launch&, void* inner, const void* x, const void* matrix,
                     const float* add, int columns, int width, int tokens, int) {
              for (int token = 0; token < tokens && !program.called_off; ++token)
                  up(program, inner, token, row_of(program, x, token, columns), matrix, add, columns, width);
          })},
         {"tiled_linear",
          kernel(+[](Program& program, const Launch&, float* out, const float* residual, const void* x,
                     const void* matrix, const float* add, int columns, int outputs, int tokens, int) {
              if (!program.called_off)
                  linear(program, out, residual, x, tokens, matrix, add, columns, outputs);
          })}});
    return kernels;
}

}  // namespace stand_in
