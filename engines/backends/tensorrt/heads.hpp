// Hidden states to logits and tokens on the device: by kernels for few rows, else by an engine; see
// ojfa_export/backends/tensorrt/heads.py.
#pragma once

#include <cstdint>

#include "lent.hpp"
#include "mailbox.hpp"

namespace ojfa::tensorrt {

// What is asked of an answer, as kernels take it.
struct Asked {
    int measure = -1;  // of an exit's check; -1: none
    double threshold = 0;
    bool sampled = false;  // how, is left in the mailbox

    // Numbers that are the same for the same questions.
    Key key() const;
};

// Where hidden states [tokens, H] are also to be kept: [sequences, capacity, H].
struct Keeping {
    CUdeviceptr kept = 0, hidden = 0;
    CUdeviceptr positions = 0, sequences = 0;
    int capacity = 0, tokens = 0;

    Key key() const;
};

// Of one session. One thread at a time.
class Heads {
 public:
    Heads(TensorRtEngines& engines, Lent& lent, Stream& stream, const Mailbox& mailbox);

    // Makes what the head after so many blocks needs, before it may be recorded.
    void prepare(int count, int blocks_run);

    // Whether a check of so many rows is one kernel, whose thread blocks wait for each other, and which takes
    // so little that the next block runs beside it.
    bool checks_in_one(int count, int blocks_run) const;

    // Puts the head on the stream: logits [count, V] of hidden states [count, H], in `logits`.
    void run(CUdeviceptr hidden, int count, int blocks_run);

    // Puts the head and a choice on the stream, and copies hidden states that are to be kept.
    void choose(CUdeviceptr hidden, int count, int blocks_run, const Asked& asked, const Keeping& keeping);

    // Copies hidden states.
    void keep(const Keeping& keeping);

    CUdeviceptr logits() const { return logits_.address(); }

 private:
    void run_final(CUdeviceptr hidden, int count);
    void run_folded(CUdeviceptr hidden, int count);
    void run_residual(CUdeviceptr hidden, int count, int blocks_run);
    void run_engine(const std::string& head, CUdeviceptr hidden, int count);
    void check_in_one(CUdeviceptr hidden, int count, const Asked& asked, const Keeping& keeping);
    void choose_by_logits(int count, const Asked& asked);
    void sample(int count);
    LinearKernels linear(const std::string& kind) const;

    TensorRtEngines& engines_;
    Lent& lent_;
    Stream& stream_;
    const Mailbox& mailbox_;
    Buffer logits_;      // [MOST_ROWS, V] fp32
    Buffer z_, jumped_;  // what shortcuts work in
    Buffer normed_;      // [MOST_ROWS, H], for products of a few tokens
    Buffer z_parts_;     // words [thread blocks, MOST_TOKENS, MOST_CHECK_RANK] of a check
};

}  // namespace ojfa::tensorrt
