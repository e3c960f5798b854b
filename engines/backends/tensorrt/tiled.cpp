#include "tiled.hpp"

#include <algorithm>
#include <iterator>

namespace ojfa::tensorrt {
namespace {

// As in the kernels: threads and warps of a block, rows of a tile, columns of a span; bytes beyond the inputs
// of a token in shared memory, and of a token's sums of a warp.
constexpr int THREADS = 512, WARPS = 16, ROWS = 16, SPAN = 64, SHIFT = 64, SUMS_BYTES = 4 * (ROWS + 4);

struct MatrixShape {
    int outputs, columns;
};

int divided_up(int count, int each) {
    return (count + each - 1) / each;
}

// Groups of eight tokens, of a product.
int groups(int tokens) {
    return divided_up(tokens, 8);
}

// Inputs of a pass, and sums: of two tiles, or of all that a thread block has.
int shared_bytes(int tokens, MatrixShape matrix, int blocks, int pass_spans) {
    const int spans = divided_up(matrix.columns, SPAN);
    const int inputs = 2 * SPAN * std::min(pass_spans, spans) + SHIFT;
    const int buffers = pass_spans >= spans ? 2 : divided_up(divided_up(matrix.outputs, ROWS), blocks);
    return tokens * inputs + buffers * WARPS * groups(tokens) * 8 * SUMS_BYTES;
}

// Columns, in spans, of which the inputs find room at once: all, or equal parts; 0 where not even those of a
// span for each warp do.
int spans_of_a_pass(int tokens, MatrixShape matrix, const Device& device) {
    const int spans = divided_up(matrix.columns, SPAN);
    for (int passes = 1; passes <= spans / WARPS + 1; ++passes) {
        const int each = std::min(spans, divided_up(divided_up(spans, passes), WARPS) * WARPS);
        if (shared_bytes(tokens, matrix, device.multiprocessors, each) <= device.shared_bytes) return each;
    }
    return 0;
}

MatrixShape shape_of(const Array& matrix) {
    return {matrix.rows(), matrix.columns()};
}

}  // namespace

int most_tiled_tokens(const core::ModelSpec& spec, const Device& device) {
    const int width = spec.heads * spec.head_dim, hidden = spec.hidden_size;
    const MatrixShape matrices[] = {{width + 2 * spec.kv_heads * spec.head_dim, hidden},
                                    {hidden, width},
                                    {spec.intermediate_size * (spec.gated ? 2 : 1), hidden},
                                    {hidden, spec.intermediate_size},
                                    {spec.vocab_size, hidden}};
    for (int tokens = MOST_TILED_TOKENS; tokens > 0; --tokens)
        if (std::all_of(std::begin(matrices), std::end(matrices),
                        [&](MatrixShape each) { return spans_of_a_pass(tokens, each, device) > 0; }))
            return tokens;
    return 0;
}

void TiledKernels::norm_linear(CUstream stream, CUdeviceptr out, CUdeviceptr hidden, int tokens, int width,
                               const Norm& norm, const Array& matrix, CUdeviceptr bias) const {
    normalize(stream, hidden, tokens, width, norm, matrix.columns());
    linear(stream, out, 0, normed_, tokens, matrix, bias);
}

void TiledKernels::norm_up(CUstream stream, CUdeviceptr inner, CUdeviceptr hidden, int tokens,
                           int inner_width, const Norm& norm, const Array& matrix, CUdeviceptr bias) const {
    normalize(stream, hidden, tokens, matrix.columns(), norm, matrix.columns());
    const int spans = pass_spans(tokens, matrix);
    kernels_.launch(stream, launch("tiled_up_", tokens, matrix, spans), inner, normed_, matrix.address(),
                    bias, matrix.columns(), inner_width, tokens, spans);
}

void TiledKernels::linear(CUstream stream, CUdeviceptr out, CUdeviceptr residual, CUdeviceptr x, int tokens,
                          const Array& matrix, CUdeviceptr bias) const {
    const int spans = pass_spans(tokens, matrix);
    kernels_.launch(stream, launch("tiled_linear_", tokens, matrix, spans), out, residual, x,
                    matrix.address(), bias, matrix.columns(), matrix.rows(), tokens, spans);
}

void TiledKernels::normalize(CUstream stream, CUdeviceptr hidden, int tokens, int width, const Norm& norm,
                             int columns) const {
    kernels_.launch(stream, {"normalize", {static_cast<unsigned>(tokens), 1, 1}, {THREADS, 1}, 0, true},
                    normed_, hidden, norm.weight, norm.bias, norm.epsilon, width, columns);
}

int TiledKernels::pass_spans(int tokens, const Array& matrix) const {
    return spans_of_a_pass(tokens, shape_of(matrix), device_);
}

Launch TiledKernels::launch(const char* kind, int tokens, const Array& matrix, int pass_spans) const {
    const int blocks = std::min(divided_up(matrix.rows(), ROWS), device_.multiprocessors);
    const int shared = shared_bytes(tokens, shape_of(matrix), device_.multiprocessors, pass_spans);
    return {kind + std::to_string(groups(tokens) * 8),
            {static_cast<unsigned>(blocks), 1, 1},
            {THREADS, 1},
            static_cast<unsigned>(shared),
            true};
}

}  // namespace ojfa::tensorrt
