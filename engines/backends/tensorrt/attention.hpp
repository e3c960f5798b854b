// Launching the attention kernels (engines/kernels/attention.cu and prompt.cu); the shapes are those of
// ojfa_export/backends/tensorrt/attention.py.
#pragma once

#include "bundle/manifest.hpp"
#include "kernels.hpp"

namespace ojfa::tensorrt {

// Positions of a page of the cache, as in tiles.cuh.
constexpr int PAGE = 64;

// What attention reads and writes. The kernels take a table of pages; here a sequence has its own in a row.
struct Operands {
    CUdeviceptr out;                   // [tokens, heads * head_dim]
    CUdeviceptr qkv;                   // [tokens, (heads + 2 kv_heads) head_dim] fp32
    CUdeviceptr keys, values;          // [sequences, most_pages, kv_heads, PAGE, head_dim]
    CUdeviceptr cosines, sines;        // [rows, rotary_dim / 2] fp32
    CUdeviceptr positions, sequences;  // [tokens] int32
    int most_pages;                    // of a sequence
    float scale;
};

// What the thread blocks of a step share, for steps of this many tokens at most; all but the parts zero
// before the first. Those of few heads have words and turns.
struct Scratch {
    Buffer parts, finished, words, turns;
};

class Attention {
 public:
    // Of a small model a step appends several tokens of a sequence itself, as it attends; else one alone.
    Attention(const core::ModelSpec& spec, Kernels& kernels, std::size_t element_bytes, int multiprocessors);

    // Bytes of a scratch's buffers for steps of this many tokens.
    std::size_t parts_bytes(int tokens) const;
    std::size_t finished_bytes(int tokens) const;
    std::size_t words_bytes() const;
    std::size_t turns_bytes() const { return sizeof(unsigned) * rows_that_tell(); }

    // Appends the tokens' keys and values to the cache and attends. The tokens are of different sequences,
    // one each, where `together`; else consecutive ones of one sequence.
    void run(CUstream stream, const Operands& operands, const Scratch& scratch, int tokens,
             bool together) const;

 private:
    // Rows of queries whose thread blocks may tell one another.
    std::size_t rows_that_tell() const;
    Launch step_launch(int sequences, int tokens) const;
    Launch prompt_launch(int tokens) const;
    void append(CUstream stream, const Operands& operands, int tokens) const;
    void step(CUstream stream, const Operands& operands, const Scratch& scratch, int sequences,
              int tokens) const;

    Kernels& kernels_;
    unsigned heads_, kv_heads_, head_dim_, vector_, element_bytes_, multiprocessors_;
    int most_new_;  // tokens of a sequence that a step appends
};

}  // namespace ojfa::tensorrt
