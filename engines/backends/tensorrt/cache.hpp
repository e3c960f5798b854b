// Running blocks on the GPU for one session: hidden states, keys and values never leave it.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "answers.hpp"
#include "workspace.hpp"

namespace ojfa::tensorrt {

// Keys and values [sequences, kv_heads, capacity, head_dim] of each block, written in place. One-token steps
// are recorded once for each range of blocks and number of sequences: positions are read from device memory,
// so that a recording serves every position.
class TensorRtCache : public core::Cache {
 public:
    TensorRtCache(TensorRtEngines& engines, int batch_size, int capacity, core::Interruption interruption);
    ~TensorRtCache() override;

    std::unique_ptr<core::Memory> allocate(std::size_t rows) override;
    void copy(core::Address from, core::Address to, std::size_t rows) override;
    core::Address embed(core::Span<const std::int32_t> token_ids, const core::Rows& rows) override;
    core::Address run_blocks(int first, int stop, core::Address hidden, const core::Rows& rows) override;
    void keep(core::Address kept, std::size_t capacity, core::Address hidden,
              const core::Rows& rows) override;
    void head(core::Address hidden, int count, int blocks_run, const core::HeadOutputs& outputs) override;

 private:
    struct Block {
        Buffer keys, values;
    };

    Workspace& step_workspace(int count);
    Workspace& prompt_workspace(int tokens);
    Block& block(int index);
    core::Address decode(int first, int stop, CUdeviceptr hidden, const core::Rows& rows);
    core::Address prefill(int first, int stop, CUdeviceptr hidden, const core::Rows& rows);
    void run_block(int index, const Workspace& workspace, int tokens, bool long_context, bool together);
    void before_attention(int index, const Workspace& workspace, int tokens);
    void attend(int index, const Workspace& workspace, int tokens, bool long_context, bool together);
    void after_attention(int index, const Workspace& workspace, int tokens);
    Norm norm(const Arrays& weights, const std::string& name) const;
    CUdeviceptr gathered(std::size_t rows);

    TensorRtEngines& engines_;
    const int batch_size_, capacity_;
    const std::size_t row_bytes_;
    core::Interruption interruption_;
    Stream stream_;
    Attention attention_;
    Answers answers_;
    std::unique_ptr<EngineSet> engine_set_;  // when first needed
    std::map<int, std::unique_ptr<Block>> blocks_;
    std::map<int, std::unique_ptr<Workspace>> steps_;  // by number of sequences, as recordings refer to them
    std::unique_ptr<Workspace> prompt_;
    std::unique_ptr<Buffer> gathered_;  // hidden states of a prompt of several pieces
};

}  // namespace ojfa::tensorrt
