// An opened bundle, shared by its sessions.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "backend/backend.hpp"
#include "bundle/bundle.hpp"
#include "runtime/session.hpp"

namespace ojfa::core {

struct LoadOptions {
    std::string backend = "tensorrt";
    std::string library;  // of the backend; empty: where it is looked for
    OpenOptions open;
    bool check_golden = true;
    std::optional<int> blocks;  // that are loaded while the files are checked; 0: all; none: when needed
    Progress progress;
};

// What a session begins with; see Python's Model.session.
struct SessionOptions {
    int batch_size = 1;
    std::optional<int> max_length;
    double shadow_share = 0;  // 0: no shadow checks
    std::uint64_t shadow_seed = 0;
    std::uint32_t shadow_index = 0;
};

// Used by any number of threads.
class Model {
 public:
    // Throws Failure.
    Model(const std::filesystem::path& bundle, const LoadOptions& options);

    const Manifest& manifest() const { return bundle_.manifest(); }
    const ModelSpec& spec() const { return manifest().spec; }
    Engines& engines() { return *engines_; }

    // The session must not outlive the model. Throws Failure for more than the bundle was built for.
    std::unique_ptr<Session> session(const SessionOptions& options);

    // The policy behind automatic exits. Throws Failure where the bundle has none.
    const Policy& automatic() const;

 private:
    void open(const LoadOptions& options);
    void check_golden();

    Bundle bundle_;
    std::unique_ptr<Engines> engines_;
};

}  // namespace ojfa::core
