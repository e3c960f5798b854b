#include "attention.hpp"

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "narrow.hpp"

namespace ojfa::tensorrt {
namespace {

// As in the kernels: threads of a warp; queries of a prompt's warp; of a step's thread block, its queries,
// and the keys that a warp takes at a time.
constexpr unsigned LANES = 32, TILE_ROWS = 16, STEP_QUERIES = 8, STEP_KEYS = 16, APPEND_THREADS = 256;

// How a step's thread blocks go through the keys; see the kernels.
struct Way {
    const char* kernel;
    unsigned row_bytes, most_warps;  // of a thread block; warps are as many as rows of so many bytes
    unsigned stages;                 // of a warp's keys in shared memory
    unsigned resident, most_splits;  // thread blocks on a multiprocessor that keys are split over
};
constexpr Way NARROW{"attention", 1024, 4, 3, 2, 64}, WIDE{"wide_attention", 1024, 8, 2, 1, 8};

// What the kernels may be given beside: a table of pages, and a list of chunks of different lengths.
constexpr CUdeviceptr NO_TABLE = 0, ALL_ALIKE = 0;

unsigned ceiling(unsigned value, unsigned by) {
    return (value + by - 1) / by;
}

}  // namespace

Attention::Attention(const core::ModelSpec& spec, Kernels& kernels, std::size_t element_bytes,
                     int multiprocessors)
    : kernels_(kernels),
      heads_(static_cast<unsigned>(spec.heads)),
      kv_heads_(static_cast<unsigned>(spec.kv_heads)),
      head_dim_(static_cast<unsigned>(spec.head_dim)),
      vector_(std::gcd(std::gcd(head_dim_, static_cast<unsigned>(spec.rotary_dim / 2)), 4u)),
      element_bytes_(static_cast<unsigned>(element_bytes)),
      multiprocessors_(static_cast<unsigned>(multiprocessors)),
      most_new_(spec.hidden_size <= SMALL_WIDTH ? static_cast<int>(STEP_QUERIES) : 1) {}

std::size_t Attention::parts_bytes(int tokens) const {
    const unsigned splits = std::max(step_launch(tokens, 1).grid[0], step_launch(1, tokens).grid[0]);
    return splits > 1 ? std::size_t{4} * static_cast<std::size_t>(tokens) * heads_ * splits * (head_dim_ + 2)
                      : 4;
}

std::size_t Attention::finished_bytes(int tokens) const {
    return std::size_t{4} * static_cast<std::size_t>(tokens) * kv_heads_ *
           ceiling(heads_ / kv_heads_, STEP_QUERIES);
}

std::size_t Attention::rows_that_tell() const {
    return most_new_ > 1 ? std::max(1u, WIDE.resident * multiprocessors_ / 2) : 1;
}

std::size_t Attention::words_bytes() const {
    return sizeof(std::uint64_t) * rows_that_tell() * WIDE.most_splits * STEP_QUERIES * (head_dim_ + 2);
}

void Attention::run(CUstream stream, const Operands& operands, const Scratch& scratch, int tokens,
                    bool together) const {
    if (together) {
        step(stream, operands, scratch, tokens, 1);
        return;
    }
    const Launch prompt = prompt_launch(tokens);
    // With fewer thread blocks than half of the multiprocessors, splitting keys is worth more; of few tokens
    // it also is a kernel less.
    if (tokens <= most_new_ || 2 * prompt.grid[0] * prompt.grid[1] < multiprocessors_) {
        step(stream, operands, scratch, 1, tokens);
        return;
    }
    append(stream, operands, tokens);
    kernels_.launch(stream, prompt, operands.out, operands.qkv, operands.keys, operands.values,
                    operands.cosines, operands.sines, operands.positions, operands.sequences, NO_TABLE,
                    operands.most_pages, operands.scale, tokens, ALL_ALIKE);
}

void Attention::step(CUstream stream, const Operands& operands, const Scratch& scratch, int sequences,
                     int tokens) const {
    if (tokens > most_new_) append(stream, operands, sequences * tokens);
    Launch launch = step_launch(sequences, tokens);
    launch.overlapping = tokens <= most_new_;
    kernels_.launch(stream, launch, operands.out, operands.qkv, operands.keys, operands.values,
                    operands.cosines, operands.sines, operands.positions, operands.sequences, NO_TABLE,
                    operands.most_pages, operands.scale, tokens, most_new_, ALL_ALIKE,
                    (launch.kernel == WIDE.kernel ? scratch.words : scratch.parts).address(),
                    (launch.kernel == WIDE.kernel ? scratch.turns : scratch.finished).address());
}

void Attention::append(CUstream stream, const Operands& operands, int tokens) const {
    const unsigned each = ceiling(kv_heads_ * head_dim_ / vector_, APPEND_THREADS);
    kernels_.launch(stream, {"append", {static_cast<unsigned>(tokens), each, 1}, {APPEND_THREADS, 1}},
                    operands.qkv, operands.keys, operands.values, operands.cosines, operands.sines,
                    operands.positions, operands.sequences, NO_TABLE, operands.most_pages);
}

// Attention with the keys split over thread blocks, for `tokens` of each sequence.
Launch Attention::step_launch(int sequences, int tokens) const {
    const unsigned tiles = ceiling(static_cast<unsigned>(tokens) * (heads_ / kv_heads_), STEP_QUERIES);
    const unsigned rows = kv_heads_ * tiles, row_bytes = ceiling(head_dim_, 16) * 16 * element_bytes_;
    // By what doesn't depend on how many tokens a sequence has, so that each gets the same alone.
    const auto count = static_cast<unsigned>(sequences);
    const Way& way = most_new_ > 1 && 2 * kv_heads_ * count <= multiprocessors_ ? WIDE : NARROW;
    const unsigned wanted = way.resident * multiprocessors_ / (rows * count);
    const unsigned splits = std::max(1u, std::min(way.most_splits, wanted));
    const unsigned warps = std::max(1u, std::min(way.most_warps, way.row_bytes / row_bytes));
    // The queries, new keys and values, and each warp's stages of keys and values.
    const unsigned held =
        STEP_QUERIES + 2 * static_cast<unsigned>(most_new_) + warps * way.stages * 2 * STEP_KEYS;
    return {way.kernel, {splits, rows, count}, {warps * LANES, 1}, held * (row_bytes + 16)};
}

// Attention of a sequence's many tokens, whose queries share the keys that are read.
Launch Attention::prompt_launch(int tokens) const {
    const unsigned row_bytes = ceiling(head_dim_, 16) * 16 * element_bytes_;
    const unsigned warps = row_bytes > 512 ? 2 : 4;
    const unsigned keys = row_bytes > 512 ? 16 : row_bytes > 256 ? 32 : 64;
    const unsigned rows = warps * TILE_ROWS;
    // Two stages of keys and values; fp32 queries stay in shared memory beside them.
    const unsigned held = 2 * 2 * keys + (element_bytes_ == 2 ? 0 : rows);
    const unsigned blocks = ceiling(static_cast<unsigned>(tokens) * (heads_ / kv_heads_), rows);
    return {"prompt_attention", {blocks, kv_heads_, 1}, {warps * LANES, 1}, held * (row_bytes + 16)};
}

}  // namespace ojfa::tensorrt
