// Hidden states to logits, likeliest tokens and confidence.
#pragma once

#include <memory>

#include "engines.hpp"

namespace ojfa::tensorrt {

// Of one session. One thread at a time.
class Answers {
 public:
    // Rows that a head takes at once: of what the kernels' mailbox holds.
    static constexpr int MOST_ROWS = 16;

    Answers(TensorRtEngines& engines, Stream& stream);

    // Applies the head after so many blocks to hidden states [count, H], at most MOST_ROWS, and waits for
    // what is asked. `place` is where they always lie, as a recording may refer to them; else they are
    // copied.
    void ask(CUdeviceptr hidden, bool in_place, int count, int blocks_run, const core::HeadOutputs& outputs,
             std::unique_ptr<EngineSet>& engine_set);

 private:
    void run(CUdeviceptr hidden, int count, int blocks_run, EngineSet* engine_set);
    void run_final(CUdeviceptr hidden, int count, EngineSet* engine_set);
    void run_folded(CUdeviceptr hidden, int count, EngineSet* engine_set);
    void run_residual(CUdeviceptr hidden, int count, int blocks_run, EngineSet* engine_set);
    void run_engine(const std::string& head, CUdeviceptr hidden, int count, EngineSet& engine_set);
    void choose(int count);
    void read(int row, const core::HeadOutputs& outputs);

    TensorRtEngines& engines_;
    Stream& stream_;
    Buffer states_, logits_;  // [MOST_ROWS, H] and [MOST_ROWS, V] fp32
    Buffer z_, jumped_;       // what shortcuts work in
    Buffer desk_;             // engines/kernels/choose.cuh
    Pinned mail_, logits_host_;
    std::uint32_t given_ = 0;  // answers so far
};

}  // namespace ojfa::tensorrt
