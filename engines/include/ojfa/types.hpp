// What goes into ojfa.hpp's calls and what comes out of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ojfa/ojfa.h"

namespace ojfa {

using TokenIds = std::vector<std::int32_t>;

// What any call may throw: what() says what is wrong, hint() what to do about it, perhaps nothing.
class Error : public std::runtime_error {
 public:
    Error(ojfa_status status, const std::string& message, std::string hint)
        : std::runtime_error(message), status_(status), hint_(std::move(hint)) {}

    ojfa_status status() const { return status_; }
    const std::string& hint() const { return hint_; }

 private:
    ojfa_status status_;
    std::string hint_;
};

namespace detail {

inline void check(ojfa_status status) {
    if (status != OJFA_OK) throw Error(status, ojfa_last_error(), ojfa_last_hint());
}

inline std::vector<ojfa_tokens> tokens_of(const std::vector<TokenIds>& rows) {
    std::vector<ojfa_tokens> result;
    for (const TokenIds& ids : rows) result.push_back({ids.data(), ids.size()});
    return result;
}

// A handle that is closed at its end; it can be moved, not copied.
template <class Handle, ojfa_status (*Close)(Handle)>
class Owned {
 public:
    Owned() = default;
    ~Owned() {
        if (handle.id) Close(handle);
    }
    Owned(Owned&& other) noexcept : handle(other.handle) { other.handle = {0}; }
    Owned& operator=(Owned&& other) noexcept {
        std::swap(handle, other.handle);
        return *this;
    }

    Handle handle = {0};
};

}  // namespace detail

enum class Measure { top = OJFA_MEASURE_TOP, margin = OJFA_MEASURE_MARGIN, entropy = OJFA_MEASURE_ENTROPY };
enum class Finish {
    none = OJFA_FINISH_NONE,
    end_of_text = OJFA_FINISH_END_OF_TEXT,
    max_new_tokens = OJFA_FINISH_MAX_NEW_TOKENS,
    cache_full = OJFA_FINISH_CACHE_FULL
};

// When a token may leave early: after exits[i] blocks, where its confidence reaches thresholds[i].
struct Policy {
    std::vector<std::int32_t> exits;  // increasing, below the number of blocks
    Measure measure = Measure::top;
    std::vector<double> thresholds;

    // For the C interface, which takes one count for both.
    ojfa_policy view() const {
        if (thresholds.size() != exits.size())
            throw Error(OJFA_ERROR_USAGE,
                        "an exit policy has " + std::to_string(exits.size()) + " exits and " +
                            std::to_string(thresholds.size()) + " thresholds",
                        "give one threshold for each exit");
        return {exits.data(), thresholds.data(), exits.size(), static_cast<std::int32_t>(measure)};
    }
};

// Where tokens stop: after so many blocks, at full depth, as the bundle's policy or another one decides, or
// as the bundle's build planned.
class Exit {
 public:
    Exit(std::int32_t blocks) : exit_(blocks) {}
    Exit(Policy policy) : policy_(std::move(policy)) {}
    static Exit full() { return OJFA_EXIT_FULL; }
    static Exit automatic() { return OJFA_EXIT_AUTO; }
    static Exit planned() { return OJFA_EXIT_DEFAULT; }

    std::int32_t number() const { return exit_; }
    const std::optional<Policy>& policy() const { return policy_; }

 private:
    std::int32_t exit_ = OJFA_EXIT_DEFAULT;
    std::optional<Policy> policy_;
};

// How to draft; see ojfa_speculation.
struct Speculation : ojfa_speculation {
    Speculation() : ojfa_speculation() { ojfa_speculation_init(this); }
};

struct GenerateOptions {
    Exit exit = Exit::planned();
    int max_new_tokens = 64;
    std::optional<Speculation> speculation = std::nullopt;  // in place of an exit
    double temperature = 0;                                 // 0: the likeliest token
    int top_k = 0;                                          // 0: all
    double top_p = 1;
    std::uint64_t seed = 0;
    TokenIds stop_tokens = {};  // besides the model's own end of text
    bool ignore_eos = false;
};

// One generated token.
struct Step {
    int row;
    std::int32_t token;
    int blocks_run;
    bool drafted;
    Finish finish;  // why it is its sequence's last, or none
};

// What a session has done; see ojfa_stats. Vectors are indexed by blocks run.
struct Stats : ojfa_stats {
    std::vector<std::uint64_t> exits, stopped;
    std::vector<double> confidence_sums;
};

struct SessionOptions {
    int batch_size = 1;
    int max_length = 0;       // 0: what the bundle was built for
    double shadow_share = 0;  // of tokens, for shadow checks
    std::uint64_t shadow_seed = 0;
    std::uint32_t shadow_index = 0;
};

// Logits [sequences, V] and likeliest tokens [sequences] of `Session::advance`.
struct Answer {
    std::vector<float> logits;
    TokenIds likeliest;
};

// The same of `Session::decide`, with blocks run [sequences] and confidence [exits, sequences], NaN where not
// asked.
struct Decision : Answer {
    std::vector<std::int32_t> blocks_run;
    std::vector<double> confidence;
};

struct LoadOptions {
    int device = 0;
    std::string backend = "tensorrt";  // or "reference", on the CPU
    std::string backend_library = {};  // file of the backend; empty: beside this library
    std::uint64_t memory_limit = 0;    // bytes on the device; 0: none
    bool check_golden = true;
    std::function<void(std::uint64_t done, std::uint64_t total)> progress =
        {};                          // bytes checked; must not throw
    std::optional<int> blocks = {};  // uploaded while the files are read, OJFA_EXIT_FULL for all
};

}  // namespace ojfa
