// What the library says of itself; see backend/backend.hpp.
#include "engines.hpp"

namespace {

std::unique_ptr<ojfa::core::Engines> open_tensorrt(const ojfa::core::Bundle& bundle,
                                                   const ojfa::core::OpenOptions& options) {
    return std::make_unique<ojfa::tensorrt::TensorRtEngines>(bundle, options);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const ojfa::core::BackendEntry* ojfa_backend_entry() {
    static const ojfa::core::BackendEntry entry = {ojfa::core::BACKEND_INTERFACE, "tensorrt", OJFA_VERSION,
                                                   open_tensorrt};
    return &entry;
}
