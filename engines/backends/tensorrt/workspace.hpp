// Buffers of a step, and where its tokens are.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.hpp"
#include "engines.hpp"

namespace ojfa::tensorrt {

// For steps of at most so many tokens, whatever sequences they belong to. One thread at a time.
class Workspace {
 public:
    Workspace(TensorRtEngines& engines, int most_tokens);

    // Says which tokens come next, and where they are: `embed` reads that from the host's memory, and writes
    // the positions to the device's. Of the stream's launches so many are known to have ended.
    void name(Stream& stream, core::Span<const std::int32_t> ids, const std::vector<std::int32_t>& positions,
              std::uint64_t ended);

    // The same for tokens that are only on the device, one behind each of these positions.
    void follow(Stream& stream, const std::vector<std::int32_t>& positions);

    // Says where the tokens are, and of which sequences; what the device knows is not copied again.
    void place(Stream& stream, const std::vector<std::int32_t>& positions,
               const std::vector<std::int32_t>& sequences);

    // Nothing is known any more of what is on the device.
    void forget() {
        known_positions_.clear();
        known_sequences_.clear();
    }

    // Puts hidden states [tokens, H] where a block reads them.
    void take(Stream& stream, CUdeviceptr states, int block, int tokens);

    // Puts the embedding of the named tokens on the stream, into the first buffer; of those at an address
    // on the device for tokens that follow.
    void embed(Kernels& kernels, CUstream stream, int tokens, CUdeviceptr following = 0) const;

    CUdeviceptr states(int block) const { return hidden_[block % 2].address(); }
    bool holds(CUdeviceptr address) const { return address == states(0) || address == states(1); }
    CUdeviceptr positions() const { return places_.address(); }
    CUdeviceptr sequences() const { return places_.address() + 4 * static_cast<CUdeviceptr>(most_); }

    const int most_;
    Buffer qkv;     // [tokens, (heads + 2 kv_heads) head_dim] fp32
    Buffer normed;  // [MOST_TILED_TOKENS, H], for products of a few tokens
    Buffer mixed;   // [tokens, heads * head_dim], what attention gives
    Buffer inner;   // [tokens, intermediate size], of the MLP
    Scratch scratch;

 private:
    TensorRtEngines& engines_;
    Buffer hidden_[2];  // [tokens, H] fp32; block i reads the (i % 2)th and writes the other
    Buffer places_;
    Pinned named_;                  // ids, then positions
    std::uint64_t named_with_ = 0;  // the launch that reads it
    std::vector<std::int32_t> known_positions_, known_sequences_;
};

}  // namespace ojfa::tensorrt
