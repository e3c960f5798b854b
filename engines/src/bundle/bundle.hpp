// Opening a bundle: nothing is used that the manifest does not name with that digest.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"

namespace ojfa::core {

// Told bytes that were checked, and all that are to be.
using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

class Bundle {
 public:
    // Checks every file, on all cores. Throws Failure where one is missing, extra, altered, a link, or
    // outside the bundle.
    Bundle(std::filesystem::path directory, const Progress& progress);

    const std::filesystem::path& directory() const { return directory_; }
    const Manifest& manifest() const { return manifest_; }

    // The engines of a backend. Throws Failure where the bundle has none.
    const EngineSet& engines(const std::string& backend) const;

    // A float32 tensor. Throws Failure where it reaches beyond its file.
    std::vector<float> tensor(const TensorSlice& slice) const;

 private:
    void check_names() const;
    void check_contents(const Progress& progress) const;
    void check_references() const;

    std::filesystem::path directory_;
    Manifest manifest_;
};

}  // namespace ojfa::core
