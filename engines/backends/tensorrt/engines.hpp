// An opened model on the GPU: weights, engines and kernels, loaded when first used and shared by all
// sessions.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.hpp"
#include "backend/backend.hpp"
#include "engine.hpp"
#include "linear.hpp"
#include "narrow.hpp"
#include "plan.hpp"
#include "weights.hpp"

namespace ojfa::tensorrt {

// A head's matrices, and in which kernels they are multiplied.
struct FinalHead {
    Norm norm;
    Array matrix;
};

// The folded shortcut: z = h P + b, logits = z / rms(z) V^T.
struct FoldedHead {
    Array project, project_bias, vocabulary, vocabulary_bias;
    std::string project_precision, vocabulary_precision;
    int rank;
};

// One exit's residual shortcut, before the model's own head: y = h + (h P + b) (gate U).
struct ResidualHead {
    Array project, bias, up;
};

// Any thread.
class TensorRtEngines : public core::Engines {
 public:
    // The bundle must outlive this. Throws Failure where the engines were built for something else than what
    // is here.
    TensorRtEngines(const core::Bundle& bundle, const core::OpenOptions& options);

    void load_blocks(int depth) override;
    std::unique_ptr<core::Loading> begin_loading(int depth) override;
    std::unique_ptr<core::Cache> new_cache(int batch_size, int capacity,
                                           core::Interruption interruption) override;
    std::uint64_t memory() const override { return device.account.held(); }
    std::string describe() const override;

    const Plan& plan(const std::string& graph) const { return plans_.at(graph); }

    // A graph's weights, uploaded on first use.
    const Arrays& weights(const std::string& graph);

    // Kernels of the model's precision, and opened engines, for a session alone; see Lent.
    std::unique_ptr<Kernels> lend_kernels();
    std::unique_ptr<EngineSet> lend_engines(CUstream stream);
    void take_back(std::unique_ptr<Kernels> kernels, std::unique_ptr<EngineSet> engine_set);

    // Launches what was added to a stream, a check in one kernel among it, which will write an answer's
    // number into a word. The thread blocks of such a check wait for each other, so all must be running: two
    // checks at once might both have only some. The device begins with one when the last of another session
    // has ended.
    void launch_check(Stream& stream, const std::uint64_t* word, std::uint32_t answer);
    // Before a session clears the words of its answers, or gives back their memory.
    void forget_check();
    bool has_several_sessions() const { return sessions_ > 1; }

    const FinalHead& final_head();
    const FoldedHead& folded_head();
    const ResidualHead& residual_head(int blocks_run);
    bool has_gates() const { return plan("exit_head").weights.count("gates") > 0; }

    // Whether our kernels run a step of so many tokens, rather than TensorRT's engines.
    bool in_kernels(int tokens) const { return tokens <= MOST_TOKENS || tokens <= most_tiled_; }

    // Those for matrices of a precision; `own` are a session's.
    LinearKernels linear(const std::string& kind, Kernels& own) {
        return LinearKernels(device, kind == precision ? own : *kernels.at(kind), kind == "fp16" ? 2 : 4);
    }

    // Calls use(kernels) with those that run so many tokens; `normed` is as of TiledKernels.
    template <class Use>
    void with_products(int tokens, Kernels& own, CUdeviceptr normed, Use use) {
        if (spec.hidden_size <= SMALL_WIDTH && tokens <= most_tiled_)
            use(NarrowKernels(device, own, normed));
        else if (tokens <= MOST_TOKENS)
            use(linear(precision, own));
        else
            use(TiledKernels(device, own, normed));
    }

    // Addresses of the cosines and sines [rows, rotary_dim / 2], of LongRoPE's second set where
    // `long_context`.
    std::pair<CUdeviceptr, CUdeviceptr> rotations(bool long_context) const;

    const core::ModelSpec& spec;
    Device device;
    std::string precision;  // of matrix products and of the cache
    std::size_t element_bytes;
    std::map<std::string, std::unique_ptr<Kernels>> kernels;  // by precision

 private:
    void check_built_for(const core::EngineSet& engines) const;
    void join_sessions();

    // A file beside the plans, as the manifest names it.
    std::string beside_plans(const std::string& file) const { return folder_ + "/" + file; }

    const core::Bundle& bundle_;
    std::string folder_;  // of the plans
    int most_tiled_ = 0;  // tokens of a step on tensor cores
    std::map<std::string, Plan> plans_;
    std::unique_ptr<WeightStore> store_;
    std::vector<Array> rotary_;   // cosines, sines
    std::recursive_mutex mutex_;  // of all that follows
    std::map<std::string, Arrays> weights_;
    std::vector<std::unique_ptr<EngineSet>> unused_engines_;
    std::vector<std::unique_ptr<Kernels>> unused_kernels_;
    std::unique_ptr<FinalHead> final_head_;
    std::unique_ptr<FoldedHead> folded_head_;
    std::map<int, std::unique_ptr<ResidualHead>> residual_heads_;
    std::atomic<int> sessions_{0};  // that have kernels
    std::mutex check_mutex_;        // of changes to that, and of the following
    Event checked_;                 // the end of the last launch with a check while there were several
    std::uint64_t checked_by_ = 0;  // which stream's it was
    // The last check of a session that was alone, which no event marks: that would be a pause.
    const std::uint64_t* unmarked_ = nullptr;
    std::uint32_t unmarked_answer_ = 0;
};

}  // namespace ojfa::tensorrt
