#include "workspace.hpp"

#include <algorithm>

namespace ojfa::tensorrt {
namespace {

constexpr unsigned EMBED_THREADS = 256;

std::size_t bytes(int tokens, int width, std::size_t element) {
    return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(width) * element;
}

Attention attention_of(TensorRtEngines& engines) {
    return {engines.spec, *engines.kernels.at(engines.precision), engines.element_bytes,
            engines.device.multiprocessors};
}

// The most that any number of tokens up to this one needs.
std::size_t most_parts(TensorRtEngines& engines, int most_tokens) {
    const Attention attention = attention_of(engines);
    std::size_t most = 0;
    for (int tokens = 1; tokens <= most_tokens; ++tokens)
        most = std::max(most, attention.parts_bytes(tokens));
    return most;
}

}  // namespace

Workspace::Workspace(TensorRtEngines& engines, int most_tokens)
    : most_(most_tokens),
      qkv(engines.device,
          bytes(most_tokens, (engines.spec.heads + 2 * engines.spec.kv_heads) * engines.spec.head_dim, 4)),
      normed(engines.device, bytes(MOST_TILED_TOKENS, engines.spec.hidden_size, engines.element_bytes)),
      mixed(engines.device,
            bytes(most_tokens, engines.spec.heads * engines.spec.head_dim, engines.element_bytes)),
      inner(engines.device, bytes(most_tokens, engines.spec.intermediate_size, engines.element_bytes)),
      scratch{{engines.device, most_parts(engines, most_tokens)},
              {engines.device, attention_of(engines).finished_bytes(most_tokens)},
              {engines.device, attention_of(engines).words_bytes()},
              {engines.device, attention_of(engines).turns_bytes()}},
      engines_(engines),
      hidden_{{engines.device, bytes(most_tokens, engines.spec.hidden_size, 4)},
              {engines.device, bytes(most_tokens, engines.spec.hidden_size, 4)}},
      places_(engines.device, bytes(most_tokens, 2, 4)),
      named_(engines.device, bytes(most_tokens, 2, 4)) {}

void Workspace::name(Stream& stream, core::Span<const std::int32_t> ids,
                     const std::vector<std::int32_t>& positions, std::uint64_t ended) {
    if (named_with_ > ended) stream.synchronize();  // the tokens before may not have been read yet
    std::copy(ids.begin(), ids.end(), named_.as<std::int32_t>());
    std::copy(positions.begin(), positions.end(), named_.as<std::int32_t>() + most_);
    named_with_ = stream.launches() + 1;
    known_positions_ = positions;
}

void Workspace::follow(Stream& stream, const std::vector<std::int32_t>& positions) {
    if (positions != known_positions_)
        stream.upload(positions.data(), this->positions(), positions.size() * 4);
    known_positions_ = positions;
    for (std::int32_t& position : known_positions_) ++position;
}

void Workspace::place(Stream& stream, const std::vector<std::int32_t>& positions,
                      const std::vector<std::int32_t>& sequences) {
    if (positions != known_positions_) {
        stream.upload(positions.data(), this->positions(), positions.size() * 4);
        known_positions_ = positions;
    }
    if (sequences != known_sequences_) {
        stream.upload(sequences.data(), this->sequences(), sequences.size() * 4);
        known_sequences_ = sequences;
    }
}

void Workspace::take(Stream& stream, CUdeviceptr from, int block, int tokens) {
    if (from != states(block)) stream.copy(from, states(block), bytes(tokens, engines_.spec.hidden_size, 4));
}

void Workspace::embed(Kernels& kernels, CUstream stream, int tokens, CUdeviceptr following) const {
    const Arrays& weights = engines_.weights("embed");
    const auto learned = weights.find("position_embedding");
    const CUdeviceptr named = reinterpret_cast<CUdeviceptr>(named_.as<std::int32_t>());
    kernels.launch(stream, {"embed", {static_cast<unsigned>(tokens), 1, 1}, {EMBED_THREADS, 1}, 0, true},
                   states(0), weights.at("token_embedding").address(),
                   learned == weights.end() ? CUdeviceptr{0} : learned->second.address(),
                   following ? following : named,
                   following ? positions() : named + 4 * static_cast<CUdeviceptr>(most_), positions(),
                   following ? 1 : 0, engines_.spec.hidden_size, CUdeviceptr{0});
}

}  // namespace ojfa::tensorrt
