// Running a model on the GPU for one session: hidden states, keys and values never leave it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "blocks.hpp"
#include "heads.hpp"

namespace ojfa::tensorrt {

// One-token steps are recorded once for each range of blocks and number of sequences: positions are read from
// device memory, so that a recording serves every position.
class TensorRtCache : public core::Cache {
 public:
    TensorRtCache(TensorRtEngines& engines, int batch_size, int capacity, core::Interruption interruption);
    ~TensorRtCache() override;

    std::unique_ptr<core::Memory> allocate(std::size_t rows) override;
    void copy(core::Address from, core::Address to, std::size_t rows) override;
    core::Address embed(core::Span<const std::int32_t> token_ids, const core::Rows& rows) override;
    core::Address embed_chosen(const core::Rows& rows) override;
    core::Address run_blocks(int first, int stop, core::Address hidden, const core::Rows& rows) override;
    void keep(core::Address kept, std::size_t capacity, core::Address hidden,
              const core::Rows& rows) override;
    void logits(core::Address hidden, int count, int blocks_run, float* logits) override;
    std::unique_ptr<core::Choices> choose(core::Address hidden, int count, int blocks_run,
                                          const core::Choosing& how) override;

 private:
    class OnTheirWay;  // choices

    // The kinds of work in recordings' keys.
    enum : std::uint64_t { EMBED, FOLLOW, BLOCKS, GO_ON, LOGITS, CHOOSE };

    // A one-token pass, as long as its result lies where it was computed.
    struct Pass {
        int stop;  // the block after it
        int first, count;
        std::vector<std::int32_t> starts;
        bool long_context;
        CUdeviceptr hidden;

        bool holds(CUdeviceptr states, int rows) const { return states == hidden && rows == count; }
    };

    // What is launched, and its key.
    struct Work {
        Key key;
        std::function<void()> run;
    };

    // An operation after whose failure the next one works.
    template <class Operation>
    auto guarded(Operation operation) {
        try {
            return operation();
        } catch (...) {
            forget();
            throw;
        }
    }

    core::Address embed_named(core::Span<const std::int32_t> token_ids, const core::Rows& rows);
    core::Address run_opened(int first, int stop, CUdeviceptr hidden, const core::Rows& rows);
    Workspace& step_workspace(int count);
    Workspace& prompt_workspace(int tokens);
    std::unique_ptr<Workspace> new_workspace(int tokens);
    CUdeviceptr gathered(std::size_t rows);
    core::Address decode(int first, int stop, CUdeviceptr hidden, const core::Rows& rows);
    core::Address prefill(int first, int stop, CUdeviceptr hidden, const core::Rows& rows);
    Work blocks_of_step(int first, int stop, int count, bool long_context);
    bool was_begun(int first, int stop, CUdeviceptr hidden, const core::Rows& rows) const;
    void call_off();
    void go_on();
    void forget() noexcept;
    CUdeviceptr in_place(CUdeviceptr hidden, int count);
    Asked asked(const core::Choosing& how, int count) const;
    std::unique_ptr<core::Choices> choose_rows(CUdeviceptr hidden, int count, int blocks_run,
                                               const core::Choosing& how);
    std::unique_ptr<core::Choices> choose_in_parts(CUdeviceptr hidden, int count, int blocks_run,
                                                   const core::Choosing& how);

    TensorRtEngines& engines_;
    const std::size_t row_bytes_;
    core::Interruption interruption_;
    Lent lent_;
    Stream stream_;
    Mailbox mailbox_;
    Blocks blocks_;
    Heads heads_;
    std::uint64_t ended_ = 0;  // of the stream's launches, so many are known to have ended
    std::optional<Pass> last_;
    std::optional<int> ahead_;          // the block that was begun after it, ahead of an exit's check
    std::uint64_t failures_ = 0;        // of the stream's launches that were taken note of
    Keeping keeping_;                   // what was asked to be kept last, if a head may do it along the way
    std::vector<std::int32_t> chosen_;  // by the newest choice, where the device doesn't have all of them
    std::map<int, std::unique_ptr<Workspace>> steps_;  // by number of sequences, as recordings refer to them
    std::unique_ptr<Workspace> prompt_;
    std::unique_ptr<Buffer> gathered_;  // hidden states of a prompt of several pieces
    Buffer states_;                     // [MOST_ROWS, H], for a head
    Pinned logits_;                     // [MOST_ROWS, V] fp32 on the host
};

}  // namespace ojfa::tensorrt
