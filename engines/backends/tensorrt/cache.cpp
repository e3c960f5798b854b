#include "cache.hpp"

#include <algorithm>
#include <utility>

namespace ojfa::tensorrt {
namespace {

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
      row_bytes_(at(engines.spec.hidden_size) * sizeof(float)),
      interruption_(std::move(interruption)),
      lent_(engines),
      stream_(engines.device),
      mailbox_(engines.device, stream_),
      blocks_(engines, lent_, stream_, batch_size, capacity),
      heads_(engines, lent_, stream_, mailbox_),
      states_(engines.device, at(Mailbox::MOST_ROWS) * row_bytes_),
      logits_(engines.device, at(Mailbox::MOST_ROWS) * at(engines.spec.vocab_size) * sizeof(float)) {}

TensorRtCache::~TensorRtCache() {
    try {
        engines_.device.make_current();
        stream_.settle();  // the memory that it is about may be gone
        go_on();           // who takes up the kernels must find them going
        stream_.synchronize();
    } catch (...) {
        lent_.discard();
    }
    engines_.forget_check();  // its word goes before this session counts as ended
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
    const auto found = steps_.find(count);
    if (found != steps_.end()) return *found->second;
    return *(steps_[count] = new_workspace(count));
}

Workspace& TensorRtCache::prompt_workspace(int tokens) {
    if (!prompt_ || prompt_->most_ < tokens) {
        stream_.synchronize();
        prompt_.reset();
        // In few sizes, so that growing prompts don't take memory anew each time.
        int size = MOST_DECODE_TOKENS;
        while (size < tokens) size *= 2;
        prompt_ = new_workspace(size);
    }
    return *prompt_;
}

std::unique_ptr<Workspace> TensorRtCache::new_workspace(int tokens) {
    auto workspace = std::make_unique<Workspace>(engines_, tokens);
    const Scratch& scratch = workspace->scratch;
    for (const Buffer* buffer : {&scratch.finished, &scratch.words, &scratch.turns})
        stream_.clear(buffer->address(), buffer->bytes());
    return workspace;
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
    return guarded([&] { return embed_named(token_ids, rows); });
}

core::Address TensorRtCache::embed_named(core::Span<const std::int32_t> token_ids, const core::Rows& rows) {
    engines_.device.make_current();
    engines_.weights("embed");
    call_off();
    const std::vector<std::int32_t> positions = positions_of(rows);
    if (rows.tokens == 1) {
        Workspace& workspace = step_workspace(rows.count);
        workspace.name(stream_, token_ids, positions, ended_);
        const int count = rows.count;
        stream_.add({EMBED, number(count)},
                    [this, &workspace, count] { workspace.embed(*lent_.kernels, stream_.handle(), count); });
        return workspace.states(0);
    }
    const int total = static_cast<int>(token_ids.size());
    const CUdeviceptr all = total > MOST_PREFILL_TOKENS ? gathered(token_ids.size()) : 0;
    for (int start = 0; start < total; start += MOST_PREFILL_TOKENS) {
        const int count = std::min(MOST_PREFILL_TOKENS, total - start);
        stream_.flush();
        Workspace& workspace = prompt_workspace(count);
        workspace.name(stream_, {token_ids.data() + start, at(count)},
                       {positions.begin() + start, positions.begin() + start + count}, ended_);
        workspace.embed(*lent_.kernels, stream_.handle(), count);
        if (all) stream_.copy(workspace.states(0), all + at(start) * row_bytes_, at(count) * row_bytes_);
    }
    return all ? all : prompt_->states(0);
}

core::Address TensorRtCache::embed_chosen(const core::Rows& rows) {
    if (!chosen_.empty()) return embed(chosen_, rows);
    engines_.device.make_current();
    call_off();
    const int count = rows.count;
    Workspace& workspace = step_workspace(count);
    std::vector<std::int32_t> before = positions_of(rows);
    for (std::int32_t& position : before) --position;
    workspace.follow(stream_, before);
    stream_.add({FOLLOW, number(count)}, [this, &workspace, count] {
        workspace.embed(*lent_.kernels, stream_.handle(), count, mailbox_.desk());
    });
    return workspace.states(0);
}

core::Address TensorRtCache::run_blocks(int first, int stop, core::Address hidden, const core::Rows& rows) {
    return guarded([&] { return run_opened(first, stop, hidden, rows); });
}

core::Address TensorRtCache::run_opened(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) {
    engines_.device.make_current();
    // What takes memory or time comes before anything is recorded.
    for (int index = first; index < stop; ++index) {
        if (blocks_.is_open(index)) continue;
        interruption_();
        blocks_.open(index);
    }
    interruption_();
    const int together = rows.tokens == 1 ? rows.count : rows.tokens;
    if (!engines_.in_kernels(together)) lent_.open_engines(stream_.handle());
    return rows.tokens == 1 ? decode(first, stop, hidden, rows) : prefill(first, stop, hidden, rows);
}

core::Address TensorRtCache::decode(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) {
    Workspace& workspace = step_workspace(rows.count);
    const bool begun = was_begun(first, stop, hidden, rows);
    if (!begun) {
        call_off();
        workspace.place(stream_, positions_of(rows), sequences_of(rows));
        workspace.take(stream_, hidden, first, rows.count);
    }
    const int rest = first + (begun ? 1 : 0);
    if (rest < stop) {
        const Work work = blocks_of_step(rest, stop, rows.count, rows.long_context);
        stream_.add(work.key, work.run);
    }
    ahead_.reset();
    last_ = Pass{stop,
                 rows.first,
                 rows.count,
                 {rows.starts.begin(), rows.starts.end()},
                 rows.long_context,
                 workspace.states(stop)};
    return last_->hidden;
}

// Whether the first of these blocks was begun after the last pass.
bool TensorRtCache::was_begun(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) const {
    return ahead_ && last_ && *ahead_ == first && first < stop && last_->holds(hidden, rows.count) &&
           last_->first == rows.first && last_->long_context == rows.long_context &&
           std::equal(rows.starts.begin(), rows.starts.end(), last_->starts.begin(), last_->starts.end());
}

// Before anything but the block that was begun ahead: it is not wanted. What a launch that failed was to do
// about that is done again.
void TensorRtCache::call_off() {
    last_.reset();
    keeping_ = {};
    if (!ahead_ && failures_ == stream_.failures()) return;
    ahead_.reset();
    failures_ = stream_.failures();
    stream_.add({GO_ON}, [this] { go_on(); });
}

void TensorRtCache::go_on() {
    lent_.kernels->launch(stream_.handle(), {"go_on", {1, 1, 1}, {1, 1}, 0, true});
}

TensorRtCache::Work TensorRtCache::blocks_of_step(int first, int stop, int count, bool long_context) {
    const Workspace& workspace = step_workspace(count);
    return {{BLOCKS, number(first), number(stop), number(count), number(long_context)},
            [this, &workspace, first, stop, count, long_context] {
                for (int index = first; index < stop; ++index)
                    blocks_.run(index, workspace, count, long_context, true);
            }};
}

core::Address TensorRtCache::prefill(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) {
    call_off();
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
            blocks_.run(index, workspace, piece.tokens, rows.long_context, false);
        }
        if (all)
            stream_.copy(workspace.states(stop), all + at(start) * row_bytes_, at(piece.tokens) * row_bytes_);
    }
    return all ? all : prompt_->states(stop);
}

void TensorRtCache::keep(core::Address kept, std::size_t capacity, core::Address hidden,
                         const core::Rows& rows) {
    engines_.device.make_current();
    if (!last_ || !last_->holds(hidden, rows.count) || rows.tokens > 1) {
        core::keep_by_copies(*this, kept, capacity, hidden, rows, row_bytes_);
        return;
    }
    const Workspace& workspace = step_workspace(rows.count);
    keeping_ = {kept,      hidden, workspace.positions(), workspace.sequences(), static_cast<int>(capacity),
                rows.count};
    stream_.add(keeping_.key(), [this, keeping = keeping_] { heads_.keep(keeping); });
}

}  // namespace ojfa::tensorrt
