// What a bundle says of itself: the same format and checks as ojfa_export/bundle/manifest.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runtime/policy.hpp"
#include "runtime/speculation.hpp"

namespace ojfa::core {

enum class Activation { silu, gelu, gelu_tanh, relu };
enum class NormKind { rms, layer };

enum class NormPlace { before, after, both };
enum class QkNorm { none, head, projection };

// The architecture of a model; see ojfa_export/models/spec.py.
struct ModelSpec {
    std::string family;
    int blocks, hidden_size, vocab_size, heads, kv_heads, head_dim, intermediate_size;
    std::vector<double> attention_scales;  // of each block
    std::optional<int> window;             // keys that a query sees at most, itself included
    int rotary_dim;                        // 0 for learned positions
    std::optional<int> rotary_switch;      // length above which LongRoPE's long factors apply
    Activation activation;
    bool gated;
    NormKind norm;
    double norm_epsilon;
    int max_positions;
    bool tied_head;
    std::vector<std::int32_t> eos_token_ids;
    NormPlace norms = NormPlace::before;  // of attention and MLP, or after them, of what they give, or both
    bool parallel = false;                // whether the MLP sees the block's input, as attention does
    QkNorm qk_norm = QkNorm::none;        // of each head's queries and keys, or of all heads' together
    std::vector<bool> rotated, windowed;  // of each block; empty where all are
    // Of each block whether it rotates by the second of two sets of rotary factors; empty where there is one
    // set.
    std::vector<bool> rotated_second;
    std::optional<double> attention_softcap, logit_softcap;  // within which scores and logits are kept

    bool norms_are(NormPlace place) const { return norms == place || norms == NormPlace::both; }
    int rotary_sets() const { return rotary_switch || !rotated_second.empty() ? 2 : 1; }
    // Whether a block rotates by the second set, where the sequence's length doesn't say.
    bool rotates_second(int block) const;
    int rotary_dim_of(int block) const;
    std::optional<int> window_of(int block) const;
    // Of a norm of so many heads of queries or keys; 0 without one.
    int qk_norm_features(int of_heads) const;
};

// A little-endian float32 tensor in a file of the bundle.
struct TensorSlice {
    std::string file;
    std::uint64_t offset;
    std::vector<std::int64_t> shape;
};

struct RotaryTables {
    TensorSlice cosines, sines;  // [positions, rotary_dim / 2]; a second set follows the first
};

struct GraphEntry {
    std::string name, file;
    std::vector<std::string> weights;  // files that it refers to
};

struct EngineSet {
    std::string backend;
    std::map<std::string, std::string> files;  // by graph
    std::map<std::string, std::string> built_with;
};

// The jump behind the exit head.
struct Shortcut {
    std::int64_t rank;
    bool residual;  // added to its input, with a gate for each exit
    std::optional<std::size_t> gates;
};

struct Golden {
    int exit;
    std::vector<std::int32_t> prompt, tokens;
};

// What is done where a user names neither an exit nor speculation: one sequence, greedily.
struct Default {
    bool automatic;  // else full depth
    std::optional<Speculation> speculation;
};

struct FileEntry {
    std::uint64_t size;
    std::string sha256;
};

struct Manifest {
    ModelSpec spec;
    std::string precision;  // "fp32" or "fp16"
    int max_length, max_batch_size;
    std::optional<RotaryTables> rotary;
    std::vector<GraphEntry> graphs;
    std::vector<EngineSet> engines;
    Shortcut shortcut;
    std::vector<Golden> golden;  // one at least
    std::optional<Policy> automatic;
    std::optional<Default> planned;
    std::map<std::string, FileEntry> files;
};

// The text of manifest.json. Throws Failure where it is damaged, altered or of another version; `path` is for
// messages.
Manifest parse_manifest(const std::string& text, const std::filesystem::path& path);

// Reads a bundle's manifest. Throws Failure, also where there is none.
Manifest read_manifest(const std::filesystem::path& bundle);

// The names of every graph of a model, in the order of the computation.
std::vector<std::string> graph_names(int blocks);
std::string block_name(int block);

}  // namespace ojfa::core
