// What a session has for itself while it lasts, and a later one takes up.
#pragma once

#include <memory>

#include "engines.hpp"

namespace ojfa::tensorrt {

// Given back at its end, when all work with it must be done. One thread at a time.
class Lent {
 public:
    explicit Lent(TensorRtEngines& engines) : kernels(engines.lend_kernels()), engines_(engines) {}
    ~Lent() {
        if (discarded_) {
            kernels.reset();
            engine_set.reset();
        }
        engines_.take_back(std::move(kernels), std::move(engine_set));
    }
    Lent(const Lent&) = delete;
    Lent& operator=(const Lent&) = delete;

    // Makes the engines be there.
    void open_engines(CUstream stream) {
        if (!engine_set) engine_set = engines_.lend_engines(stream);
    }

    // They are not to be given back, as nobody knows what they have come to.
    void discard() { discarded_ = true; }

    // Those of the model's precision: a pass that is called off is a word in the program's own memory.
    std::unique_ptr<Kernels> kernels;
    std::unique_ptr<EngineSet> engine_set;  // when first needed

 private:
    TensorRtEngines& engines_;
    bool discarded_ = false;
};

}  // namespace ojfa::tensorrt
