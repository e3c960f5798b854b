// Opening a bundle: nothing is used that the manifest does not name with that digest.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "bundle/files.hpp"
#include "bundle/graphs.hpp"

namespace ojfa::core {

class Bundle {
 public:
    // Reads the manifest. Throws Failure where a file is missing, extra, a link, or outside the bundle.
    explicit Bundle(const std::filesystem::path& directory);

    // Which files: the weights, which are nearly all bytes, or all others.
    enum class Part { weights, others };

    // Checks files. Nothing that runs may be taken from one before that.
    void check_contents(Checker& checker, Part part, const Receive& receive = {}) const;

    // Of all files.
    std::uint64_t bytes() const;

    // Reads what the graphs say of their weights, and compares it with the manifest. Their files must have
    // been checked. Throws Failure where they are of another model.
    void read_graphs();

    // The weights of a graph, by name; none before `read_graphs`. Each lies inside its file.
    const WeightPlaces& weights(const std::string& graph) const { return weights_.at(graph); }

    // The files that the manifest names, to be read again.
    const HeldFiles& files() const { return files_; }
    const std::filesystem::path& directory() const { return files_.directory(); }
    const Manifest& manifest() const { return manifest_; }

    // The engines of a backend. Throws Failure where the bundle has none.
    const EngineSet& engines(const std::string& backend) const;

    // A float32 tensor. Throws Failure where it reaches beyond its file.
    std::vector<float> tensor(const TensorSlice& slice) const;

 private:
    void hold_files();
    void check_references() const;

    Manifest manifest_;
    HeldFiles files_;
    std::set<std::string> weight_files_;
    std::map<std::string, WeightPlaces> weights_;  // by graph
};

}  // namespace ojfa::core
