#include "blocks.hpp"

#include <utility>

namespace ojfa::tensorrt {
namespace {

constexpr unsigned LANES = 32, QK_NORM_WARPS = 8;  // as in the kernel

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

}  // namespace

Blocks::Blocks(TensorRtEngines& engines, Lent& lent, Stream& stream, int batch_size, int capacity)
    : engines_(engines),
      lent_(lent),
      stream_(stream),
      batch_size_(batch_size),
      most_pages_((capacity + PAGE - 1) / PAGE),
      attention_(engines.spec, *lent.kernels, engines.element_bytes, engines.device.multiprocessors) {}

void Blocks::open(int index) {
    if (is_open(index)) return;
    const Arrays& weights = engines_.weights(core::block_name(index));
    const std::size_t size = at(batch_size_) * at(engines_.spec.kv_heads) * at(most_pages_ * PAGE) *
                             at(engines_.spec.head_dim) * engines_.element_bytes;
    std::unique_ptr<Block> block(new Block{weights, {engines_.device, size}, {engines_.device, size}});
    blocks_[index] = std::move(block);
}

void Blocks::run(int index, const Workspace& workspace, int tokens, bool long_context, bool together) {
    before_attention(index, workspace, tokens);
    if (engines_.spec.qk_norm != core::QkNorm::none) norm_queries_and_keys(index, workspace, tokens);
    attend(index, workspace, tokens, long_context, together);
    after_attention(index, workspace, tokens);
}

Norm Blocks::norm(const Arrays& weights, const std::string& name) const {
    const auto bias = weights.find(name + ".bias");
    return {weights.at(name + ".weight").address(), bias == weights.end() ? 0 : bias->second.address(),
            static_cast<float>(engines_.spec.norm_epsilon)};
}

namespace {

CUdeviceptr bias_of(const Arrays& weights, const std::string& name) {
    const auto found = weights.find(name + ".bias");
    return found == weights.end() ? 0 : found->second.address();
}

// The weights of an engine's part of a block.
std::vector<std::pair<std::string, CUdeviceptr>> fixed(const Arrays& weights, const std::string& first,
                                                       const std::string& second) {
    std::vector<std::pair<std::string, CUdeviceptr>> result;
    for (const auto& [name, array] : weights)
        if (name.rfind(first, 0) == 0 || name.rfind(second, 0) == 0)
            result.emplace_back(name, array.address());
    return result;
}

}  // namespace

void Blocks::before_attention(int index, const Workspace& workspace, int tokens) {
    const Arrays& weights = blocks_.at(index)->weights;
    const core::ModelSpec& spec = engines_.spec;
    if (engines_.in_kernels(tokens)) {
        with_products(workspace, tokens, [&](const auto& kernels) {
            kernels.norm_linear(stream_.handle(), workspace.qkv.address(), workspace.states(index), tokens,
                                spec.hidden_size, norm(weights, "attention.norm"),
                                weights.at("attention.qkv.weight"), bias_of(weights, "attention.qkv"));
        });
        return;
    }
    lent_.engine_set->run(
        stream_.handle(), engines_.plan(core::block_name(index)).engines.at("qkv"), tokens,
        {{"hidden", workspace.states(index), spec.hidden_size}, {"qkv", workspace.qkv.address(), 0}},
        fixed(weights, "attention.norm", "attention.qkv"));
}

// See kernels/qk_norm.cu.
void Blocks::norm_queries_and_keys(int index, const Workspace& workspace, int tokens) {
    const Arrays& weights = blocks_.at(index)->weights;
    const auto heads = static_cast<unsigned>(engines_.spec.heads + engines_.spec.kv_heads);
    const unsigned groups = (heads + QK_NORM_WARPS - 1) / QK_NORM_WARPS;
    const Launch launch = {"norm_queries_and_keys",
                           {static_cast<unsigned>(tokens), groups, 1},
                           {QK_NORM_WARPS * LANES, 1},
                           0,
                           true};
    lent_.kernels->launch(
        stream_.handle(), launch, workspace.qkv.address(), weights.at("attention.q_norm.weight").address(),
        weights.at("attention.k_norm.weight").address(), static_cast<float>(engines_.spec.norm_epsilon));
}

void Blocks::attend(int index, const Workspace& workspace, int tokens, bool long_context, bool together) {
    const bool rotates = engines_.spec.rotary_dim_of(index) > 0;
    const auto [cosines, sines] =
        rotates ? engines_.rotations(long_context) : std::pair<CUdeviceptr, CUdeviceptr>();
    const Block& cached = *blocks_.at(index);
    const Operands operands = {workspace.mixed.address(),
                               workspace.qkv.address(),
                               cached.keys.address(),
                               cached.values.address(),
                               cosines,
                               sines,
                               workspace.positions(),
                               workspace.sequences(),
                               most_pages_,
                               static_cast<float>(engines_.spec.attention_scales[at(index)])};
    attention_.run(stream_.handle(), operands, workspace.scratch, tokens, together);
}

void Blocks::after_attention(int index, const Workspace& workspace, int tokens) {
    const Arrays& weights = blocks_.at(index)->weights;
    const core::ModelSpec& spec = engines_.spec;
    const CUdeviceptr source = workspace.states(index), target = workspace.states(index + 1);
    if (engines_.in_kernels(tokens)) {
        with_products(workspace, tokens, [&](const auto& kernels) {
            const CUstream stream = stream_.handle();
            kernels.linear(stream, target, source, workspace.mixed.address(), tokens,
                           weights.at("attention.out.weight"), bias_of(weights, "attention.out"));
            kernels.norm_up(stream, workspace.inner.address(), target, tokens, spec.intermediate_size,
                            norm(weights, "mlp.norm"), weights.at("mlp.up.weight"),
                            bias_of(weights, "mlp.up"));
            kernels.linear(stream, target, target, workspace.inner.address(), tokens,
                           weights.at("mlp.down.weight"), bias_of(weights, "mlp.down"));
        });
        return;
    }
    lent_.engine_set->run(stream_.handle(), engines_.plan(core::block_name(index)).engines.at("mlp"), tokens,
                          {{"hidden", source, spec.hidden_size},
                           {"mixed", workspace.mixed.address(), spec.heads * spec.head_dim},
                           {"hidden_out", target, 0}},
                          fixed(weights, "attention.out", "mlp."));
}

}  // namespace ojfa::tensorrt
