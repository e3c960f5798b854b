// The blocks of one session: their keys and values, and how they are put on its stream.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "lent.hpp"
#include "workspace.hpp"

namespace ojfa::tensorrt {

// Keys and values [sequences, pages, kv_heads, PAGE, head_dim] of each block, written in place.
class Blocks {
 public:
    Blocks(TensorRtEngines& engines, Lent& lent, Stream& stream, int batch_size, int capacity);

    // Makes a block's part of the cache, and its weights be there.
    void open(int index);
    bool is_open(int index) const { return blocks_.count(index) > 0; }

    // Puts a block that is open on the stream. The tokens are of different sequences, one each, where
    // `together`; else consecutive ones of one sequence.
    void run(int index, const Workspace& workspace, int tokens, bool long_context, bool together);

 private:
    struct Block {
        const Arrays& weights;
        Buffer keys, values;
    };

    void before_attention(int index, const Workspace& workspace, int tokens);
    void norm_queries_and_keys(int index, const Workspace& workspace, int tokens);
    void attend(int index, const Workspace& workspace, int tokens, bool long_context, bool together);
    void after_attention(int index, const Workspace& workspace, int tokens);
    Norm norm(const Arrays& weights, const std::string& name) const;
    // Calls use(kernels) with those for so many tokens.
    template <class Use>
    void with_products(const Workspace& workspace, int tokens, Use use) const {
        engines_.with_products(tokens, *lent_.kernels, workspace.normed.address(), use);
    }

    TensorRtEngines& engines_;
    Lent& lent_;
    Stream& stream_;
    const int batch_size_, most_pages_;
    Attention attention_;
    std::map<int, std::unique_ptr<Block>> blocks_;
};

}  // namespace ojfa::tensorrt
