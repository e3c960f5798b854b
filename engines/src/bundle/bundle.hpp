// Opening a bundle: nothing is used that the manifest does not name with that digest.
#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "bundle/files.hpp"

namespace ojfa::core {

class Bundle {
 public:
    // Reads the manifest. Throws Failure where a file is missing, extra, a link, or outside the bundle.
    explicit Bundle(std::filesystem::path directory);

    // Which files: the weights, which are nearly all bytes, or all others.
    enum class Part { weights, others };

    // Checks files. Nothing that runs may be taken from one before that.
    void check_contents(Checker& checker, Part part, const Receive& receive = {}) const;

    // Of all files.
    std::uint64_t bytes() const;

    const std::filesystem::path& directory() const { return directory_; }
    const Manifest& manifest() const { return manifest_; }

    // The engines of a backend. Throws Failure where the bundle has none.
    const EngineSet& engines(const std::string& backend) const;

    // A float32 tensor. Throws Failure where it reaches beyond its file.
    std::vector<float> tensor(const TensorSlice& slice) const;

 private:
    void check_names() const;
    void check_references() const;

    std::filesystem::path directory_;
    Manifest manifest_;
    std::set<std::string> weight_files_;
};

}  // namespace ojfa::core
