#include "cache.hpp"

#include <algorithm>
#include <utility>

namespace ojfa::tensorrt {
namespace {

constexpr unsigned KEEP_THREADS = 256;

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

class DeviceMemory : public core::Memory {
 public:
    DeviceMemory(Device& device, std::size_t bytes) : buffer_(device, bytes) { address_ = buffer_.address(); }

 private:
    Buffer buffer_;
};

std::vector<std::int32_t> positions_of(const core::Rows& rows) {
    std::vector<std::int32_t> positions;
    for (int row = 0; row < rows.count; ++row)
        for (int token = 0; token < rows.tokens; ++token) positions.push_back(rows.starts[at(row)] + token);
    return positions;
}

std::vector<std::int32_t> sequences_of(const core::Rows& rows) {
    std::vector<std::int32_t> sequences;
    for (int row = 0; row < rows.count; ++row)
        sequences.insert(sequences.end(), at(rows.tokens), rows.first + row);
    return sequences;
}

std::uint64_t number(int value) {
    return static_cast<std::uint64_t>(value);
}

}  // namespace

TensorRtCache::TensorRtCache(TensorRtEngines& engines, int batch_size, int capacity,
                             core::Interruption interruption)
    : engines_(engines),
      batch_size_(batch_size),
      capacity_(capacity),
      row_bytes_(at(engines.spec.hidden_size) * sizeof(float)),
      interruption_(std::move(interruption)),
      stream_(engines.device),
      attention_(engines.spec, engines.main_kernels(), engines.element_bytes, engines.device.multiprocessors),
      answers_(engines, stream_) {}

TensorRtCache::~TensorRtCache() {
    try {
        engines_.device.make_current();
        stream_.synchronize();
        if (engine_set_) engines_.give_back(std::move(engine_set_));
    } catch (...) {  // the device is lost
    }
}

std::unique_ptr<core::Memory> TensorRtCache::allocate(std::size_t rows) {
    engines_.device.make_current();
    return std::make_unique<DeviceMemory>(engines_.device, rows * row_bytes_);
}

void TensorRtCache::copy(core::Address from, core::Address to, std::size_t rows) {
    engines_.device.make_current();
    stream_.copy(from, to, rows * row_bytes_);
}

Workspace& TensorRtCache::step_workspace(int count) {
    auto& found = steps_[count];
    if (!found) {
        found = std::make_unique<Workspace>(engines_, count);
        stream_.clear(found->scratch.finished.address(), found->scratch.finished.bytes());
    }
    return *found;
}

Workspace& TensorRtCache::prompt_workspace(int tokens) {
    if (!prompt_ || prompt_->most_ < tokens) {
        stream_.synchronize();
        prompt_.reset();
        // In few sizes, so that growing prompts don't take memory anew each time.
        int size = MOST_DECODE_TOKENS;
        while (size < tokens) size *= 2;
        prompt_ = std::make_unique<Workspace>(engines_, size);
        stream_.clear(prompt_->scratch.finished.address(), prompt_->scratch.finished.bytes());
    }
    return *prompt_;
}

TensorRtCache::Block& TensorRtCache::block(int index) {
    auto& found = blocks_[index];
    if (!found) {
        const std::size_t size = at(batch_size_) * at(engines_.spec.kv_heads) * at(capacity_) *
                                 at(engines_.spec.head_dim) * engines_.element_bytes;
        found.reset(new Block{{engines_.device, size}, {engines_.device, size}});
    }
    return *found;
}

CUdeviceptr TensorRtCache::gathered(std::size_t rows) {
    if (!gathered_ || gathered_->bytes() < rows * row_bytes_) {
        stream_.synchronize();
        gathered_.reset();
        gathered_ = std::make_unique<Buffer>(engines_.device, rows * row_bytes_);
    }
    return gathered_->address();
}

core::Address TensorRtCache::embed(core::Span<const std::int32_t> token_ids, const core::Rows& rows) {
    engines_.device.make_current();
    engines_.weights("embed");
    const std::vector<std::int32_t> positions = positions_of(rows);
    if (rows.tokens == 1) {
        Workspace& workspace = step_workspace(rows.count);
        workspace.name(stream_, token_ids, positions);
        const int count = rows.count;
        stream_.add({1, number(count)},
                    [this, &workspace, count] { workspace.embed(stream_.handle(), count); });
        return workspace.states(0);
    }
    const int total = static_cast<int>(token_ids.size());
    const CUdeviceptr all = total > MOST_PREFILL_TOKENS ? gathered(token_ids.size()) : 0;
    for (int start = 0; start < total; start += MOST_PREFILL_TOKENS) {
        const int count = std::min(MOST_PREFILL_TOKENS, total - start);
        Workspace& workspace = prompt_workspace(count);
        workspace.name(stream_, {token_ids.data() + start, at(count)},
                       {positions.begin() + start, positions.begin() + start + count});
        stream_.flush();
        workspace.embed(stream_.handle(), count);
        if (all) stream_.copy(workspace.states(0), all + at(start) * row_bytes_, at(count) * row_bytes_);
    }
    return all ? all : prompt_->states(0);
}

core::Address TensorRtCache::run_blocks(int first, int stop, core::Address hidden, const core::Rows& rows) {
    engines_.device.make_current();
    // What takes memory or time comes before anything is recorded.
    for (int index = first; index < stop; ++index) {
        interruption_();
        engines_.weights(core::block_name(index));
        block(index);
    }
    const int together = rows.tokens == 1 ? rows.count : rows.tokens;
    if (together > MOST_TOKENS && !engine_set_) engine_set_ = engines_.engine_set(stream_.handle());
    return rows.tokens == 1 ? decode(first, stop, hidden, rows) : prefill(first, stop, hidden, rows);
}

core::Address TensorRtCache::decode(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) {
    Workspace& workspace = step_workspace(rows.count);
    workspace.place(stream_, positions_of(rows), sequences_of(rows));
    workspace.take(stream_, hidden, first, rows.count);
    const int count = rows.count;
    const bool long_context = rows.long_context;
    stream_.add({2, number(first), number(stop), number(count), number(long_context)},
                [this, &workspace, first, stop, count, long_context] {
                    for (int index = first; index < stop; ++index)
                        run_block(index, workspace, count, long_context, true);
                });
    return workspace.states(stop);
}

core::Address TensorRtCache::prefill(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) {
    stream_.flush();
    const int total = rows.tokens;
    const CUdeviceptr all = total > MOST_PREFILL_TOKENS ? gathered(at(total)) : 0;
    for (int start = 0; start < total; start += MOST_PREFILL_TOKENS) {
        const std::int32_t from = rows.starts[0] + start;
        const core::Rows piece = {
            rows.first, 1, std::min(MOST_PREFILL_TOKENS, total - start), {&from, 1}, rows.long_context};
        Workspace& workspace = prompt_workspace(piece.tokens);
        workspace.place(stream_, positions_of(piece), sequences_of(piece));
        workspace.take(stream_, hidden + at(start) * row_bytes_, first, piece.tokens);
        for (int index = first; index < stop; ++index) {
            interruption_();
            run_block(index, workspace, piece.tokens, rows.long_context, false);
        }
        if (all)
            stream_.copy(workspace.states(stop), all + at(start) * row_bytes_, at(piece.tokens) * row_bytes_);
    }
    return all ? all : prompt_->states(stop);
}

void TensorRtCache::keep(core::Address kept, std::size_t capacity, core::Address hidden,
                         const core::Rows& rows) {
    engines_.device.make_current();
    const auto step = steps_.find(rows.count);
    if (rows.tokens > 1 || step == steps_.end() || !step->second->holds(hidden)) {
        core::keep_by_copies(*this, kept, capacity, hidden, rows, row_bytes_);
        return;
    }
    Workspace& workspace = *step->second;
    const int count = rows.count;
    stream_.add(
        {4, kept, capacity, hidden, number(count)}, [this, &workspace, kept, capacity, hidden, count] {
            engines_.main_kernels().launch(
                stream_.handle(), {"keep", {static_cast<unsigned>(count), 1, 1}, {KEEP_THREADS, 1}, 0, true},
                static_cast<CUdeviceptr>(kept), static_cast<CUdeviceptr>(hidden), workspace.positions(),
                workspace.sequences(), static_cast<int>(capacity), engines_.spec.hidden_size);
        });
}

void TensorRtCache::head(core::Address hidden, int count, int blocks_run, const core::HeadOutputs& outputs) {
    engines_.device.make_current();
    for (int start = 0; start < count; start += Answers::MOST_ROWS) {
        const int rows = std::min(Answers::MOST_ROWS, count - start);
        const core::HeadOutputs part = {
            outputs.logits ? outputs.logits + at(start) * at(engines_.spec.vocab_size) : nullptr,
            outputs.likeliest ? outputs.likeliest + start : nullptr,
            outputs.confidence ? outputs.confidence + start : nullptr, outputs.measure};
        const auto step = steps_.find(count);
        const bool in_place = step != steps_.end() && step->second->holds(hidden) && rows == count;
        answers_.ask(hidden + at(start) * row_bytes_, in_place, rows, blocks_run, part, engine_set_);
    }
    for (auto& step : steps_) step.second->was_read();
    if (prompt_) prompt_->was_read();
}

void TensorRtCache::run_block(int index, const Workspace& workspace, int tokens, bool long_context,
                              bool together) {
    before_attention(index, workspace, tokens);
    attend(index, workspace, tokens, long_context, together);
    after_attention(index, workspace, tokens);
}

Norm TensorRtCache::norm(const Arrays& weights, const std::string& name) const {
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

void TensorRtCache::before_attention(int index, const Workspace& workspace, int tokens) {
    const Arrays& weights = engines_.weights(core::block_name(index));
    const core::ModelSpec& spec = engines_.spec;
    if (tokens <= MOST_TOKENS) {
        engines_.linear(engines_.precision)
            .norm_linear(stream_.handle(), workspace.qkv.address(), workspace.states(index), tokens,
                         spec.hidden_size, norm(weights, "attention.norm"),
                         weights.at("attention.qkv.weight"), bias_of(weights, "attention.qkv"));
        return;
    }
    engine_set_->run(
        stream_.handle(), engines_.plan(core::block_name(index)).engines.at("qkv"), tokens,
        {{"hidden", workspace.states(index), spec.hidden_size}, {"qkv", workspace.qkv.address(), 0}},
        fixed(weights, "attention.norm", "attention.qkv"));
}

void TensorRtCache::attend(int index, const Workspace& workspace, int tokens, bool long_context,
                           bool together) {
    const auto [cosines, sines] = engines_.rotations(long_context);
    Block& cached = block(index);
    const Operands operands = {workspace.mixed.address(),
                               workspace.qkv.address(),
                               cached.keys.address(),
                               cached.values.address(),
                               cosines,
                               sines,
                               workspace.positions(),
                               workspace.sequences(),
                               capacity_,
                               static_cast<float>(engines_.spec.attention_scales[at(index)])};
    attention_.run(stream_.handle(), operands, workspace.scratch, tokens, together);
}

void TensorRtCache::after_attention(int index, const Workspace& workspace, int tokens) {
    const Arrays& weights = engines_.weights(core::block_name(index));
    const core::ModelSpec& spec = engines_.spec;
    const CUdeviceptr source = workspace.states(index), target = workspace.states(index + 1);
    if (tokens <= MOST_TOKENS) {
        const LinearKernels linear = engines_.linear(engines_.precision);
        const CUstream stream = stream_.handle();
        linear.linear(stream, target, source, workspace.mixed.address(), tokens,
                      weights.at("attention.out.weight"), bias_of(weights, "attention.out"));
        linear.norm_up(stream, workspace.inner.address(), target, tokens, spec.intermediate_size,
                       norm(weights, "mlp.norm"), weights.at("mlp.up.weight"), bias_of(weights, "mlp.up"));
        linear.linear(stream, target, target, workspace.inner.address(), tokens,
                      weights.at("mlp.down.weight"), bias_of(weights, "mlp.down"));
        return;
    }
    engine_set_->run(stream_.handle(), engines_.plan(core::block_name(index)).engines.at("mlp"), tokens,
                     {{"hidden", source, spec.hidden_size},
                      {"mixed", workspace.mixed.address(), spec.heads * spec.head_dim},
                      {"hidden_out", target, 0}},
                     fixed(weights, "attention.out", "mlp."));
}

}  // namespace ojfa::tensorrt
