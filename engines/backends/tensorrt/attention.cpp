#include "attention.hpp"

#include <algorithm>
#include <numeric>

#include "narrow.hpp"

namespace ojfa::tensorrt {
namespace {

// As in the kernels: threads of a warp; queries of a prompt's warp; of a step's thread block, its queries,
// the warps at most, the keys that one takes at a time, and the stages of them in shared memory.
constexpr unsigned LANES = 32, TILE_ROWS = 16;
constexpr unsigned STEP_QUERIES = 8, MOST_WARPS = 4, STEP_KEYS = 16, STEP_STAGES = 3;
constexpr unsigned APPEND_THREADS = 256, MOST_SPLITS = 64, RESIDENT = 2;
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
                    scratch.parts.address(), scratch.finished.address());
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
    const unsigned wanted = RESIDENT * multiprocessors_ / (rows * static_cast<unsigned>(sequences));
    const unsigned splits = std::max(1u, std::min(MOST_SPLITS, wanted));
    const unsigned warps = std::max(1u, std::min(MOST_WARPS, 1024 / row_bytes));
    // The queries, new keys and values, and each warp's stages of keys and values.
    const unsigned held =
        STEP_QUERIES + 2 * static_cast<unsigned>(most_new_) + warps * STEP_STAGES * 2 * STEP_KEYS;
    return {"attention",
            {splits, rows, static_cast<unsigned>(sequences)},
            {warps * LANES, 1},
            held * (row_bytes + 16)};
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
