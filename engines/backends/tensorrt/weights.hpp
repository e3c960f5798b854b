// Weights in device memory, once for all sessions, engines and kernels.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.hpp"
#include "kernels.hpp"
#include "plan.hpp"
#include "upload.hpp"

namespace ojfa::tensorrt {

// A contiguous array on the device.
struct Array {
    std::shared_ptr<Buffer> memory;
    std::vector<std::int64_t> shape;

    CUdeviceptr address() const { return memory ? memory->address() : 0; }
    int rows() const { return static_cast<int>(shape.at(0)); }
    int columns() const { return static_cast<int>(shape.at(1)); }
};

using Arrays = std::map<std::string, Array>;

// Uploads weights; a tensor that several graphs refer to is on the device once. The owner sees to it that one
// thread at a time uses it.
class WeightStore {
 public:
    WeightStore(Device& device, const core::HeldFiles& files,
                const std::map<std::string, std::unique_ptr<Kernels>>& kernels);

    // The weights of a graph, by name.
    Arrays load(const Plan& plan);

    // Begins to take weights from their files as these are read.
    std::unique_ptr<core::Loading> begin_loading(const std::vector<const Plan*>& plans);

    // A matrix [rows, columns] in fp32, or as its file has it, changed on the host and uploaded: transposed
    // first where `turned`, then multiplied by `factor` (fp32 alone), then with rows filled up to whole
    // 16-byte loads, and as many rows as those are filled up to where `square`.
    Array padded(const Weight& weight, bool turned, float factor = 1, bool pad_rows = false);

    // fp32 values of a vector.
    std::vector<float> values(const Weight& weight) const;
    Array upload(const std::vector<float>& values);

 private:
    class WhileRead;  // Loading

    using Place = std::pair<std::string, std::uint64_t>;  // file and offset

    Array get(const Weight& weight);
    Array read(const Weight& weight);
    Array arranged(const Weight& weight, Array stored);

    Device& device_;
    const core::HeldFiles& files_;
    const std::map<std::string, std::unique_ptr<Kernels>>& kernels_;
    Stream stream_;
    Lanes lanes_;
    std::map<Place, Array> held_;
};

}  // namespace ojfa::tensorrt
