#include "bundle/graphs.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace ojfa::core {
namespace {

using Shape = std::vector<std::int64_t>;

constexpr std::int64_t ANY = -1;

// A weight that a model of the manifest's kind has; lengths may be ANY. Matrices are in the model's precision
// unless they are the shortcut's; vectors always are in fp32.
struct Expected {
    std::string name;
    Shape shape;
    bool needed = true;
    bool always_fp32 = false;
};

std::string shown(const Shape& shape) {
    std::string text;
    for (const std::int64_t length : shape)
        text += (text.empty() ? "" : ", ") + (length == ANY ? std::string("any") : std::to_string(length));
    return "[" + text + "]";
}

bool fits(const Shape& shape, const Shape& expected) {
    if (shape.size() != expected.size()) return false;
    for (std::size_t i = 0; i < shape.size(); ++i)
        if (expected[i] != ANY && expected[i] != shape[i]) return false;
    return true;
}

void add_norm(std::vector<Expected>& result, const ModelSpec& spec, const std::string& name) {
    result.push_back({name + ".weight", {spec.hidden_size}});
    if (spec.norm == NormKind::layer) result.push_back({name + ".bias", {spec.hidden_size}});
}

std::vector<Expected> of_embed(const Manifest& manifest) {
    const ModelSpec& spec = manifest.spec;
    std::vector<Expected> result = {{"token_embedding", {spec.vocab_size, spec.hidden_size}}};
    if (!spec.rotary_dim) {
        result.push_back({"position_embedding", {ANY, spec.hidden_size}});
    } else {
        result.push_back({"rotary_cos_table", {ANY, spec.rotary_dim / 2}, true, true});
        result.push_back({"rotary_sin_table", {ANY, spec.rotary_dim / 2}, true, true});
    }
    return result;
}

std::vector<Expected> of_block(const ModelSpec& spec) {
    const std::int64_t width = spec.hidden_size, attended = std::int64_t{spec.heads} * spec.head_dim;
    const std::int64_t qkv = attended + 2 * std::int64_t{spec.kv_heads} * spec.head_dim;
    const std::int64_t inner = spec.intermediate_size, up = spec.gated ? 2 * inner : inner;
    std::vector<Expected> result;
    const auto product = [&](const std::string& name, std::int64_t inputs, std::int64_t outputs) {
        result.push_back({name + ".weight", {inputs, outputs}});
        result.push_back({name + ".bias", {outputs}, false});
    };
    add_norm(result, spec, "attention.norm");
    product("attention.qkv", width, qkv);
    if (spec.qk_norm != QkNorm::none) {
        result.push_back({"attention.q_norm.weight", {spec.qk_norm_features(spec.heads)}});
        result.push_back({"attention.k_norm.weight", {spec.qk_norm_features(spec.kv_heads)}});
    }
    product("attention.out", attended, width);
    add_norm(result, spec, "mlp.norm");
    product("mlp.up", width, up);
    product("mlp.down", inner, width);
    if (spec.norms == NormPlace::both)
        for (const char* const name : {"attention.after_norm", "mlp.after_norm"})
            add_norm(result, spec, name);
    return result;
}

std::vector<Expected> of_final_head(const ModelSpec& spec) {
    std::vector<Expected> result = {{"head", {spec.vocab_size, spec.hidden_size}}};
    add_norm(result, spec, "final_norm");
    return result;
}

std::vector<Expected> of_exit_head(const Manifest& manifest) {
    const ModelSpec& spec = manifest.spec;
    const std::int64_t rank = manifest.shortcut.rank;
    std::vector<Expected> result = {{"project", {spec.hidden_size, rank}, true, true},
                                    {"project.bias", {rank}}};
    if (!manifest.shortcut.residual) {
        result.push_back({"vocabulary", {spec.vocab_size, rank}});
        result.push_back({"vocabulary.bias", {spec.vocab_size}, false});
        return result;
    }
    result.push_back({"up", {rank, spec.hidden_size}, true, true});
    result.push_back({"gates", {spec.blocks - 1}});
    for (Expected& each : of_final_head(spec)) result.push_back(std::move(each));
    return result;
}

std::vector<Expected> expected_of(const Manifest& manifest, const std::string& graph) {
    if (graph == "embed") return of_embed(manifest);
    if (graph == "exit_head") return of_exit_head(manifest);
    if (graph == "final_head") return of_final_head(manifest.spec);
    return of_block(manifest.spec);
}

void check_weight(const std::string& name, const WeightPlace& place, const Expected& expected,
                  const Manifest& manifest) {
    if (!fits(place.shape, expected.shape))
        throw std::runtime_error("weight '" + name + "' is " + shown(place.shape) +
                                 ", the manifest's model needs " + shown(expected.shape));
    const bool half = expected.shape.size() > 1 && !expected.always_fp32 && manifest.precision == "fp16";
    if (place.half != half)
        throw std::runtime_error("weight '" + name + "' is " + (place.half ? "fp16" : "fp32") +
                                 ", the manifest's model needs " + (half ? "fp16" : "fp32"));
}

// That a weight lies inside one of the graph's files.
void check_place(const std::string& name, const WeightPlace& place, const GraphEntry& entry,
                 const Manifest& manifest) {
    const auto file = manifest.files.find(place.file);
    if (file == manifest.files.end() ||
        std::find(entry.weights.begin(), entry.weights.end(), place.file) == entry.weights.end())
        throw std::runtime_error("weight '" + name + "' lies in '" + place.file +
                                 "', which the manifest does not name for this graph");
    const std::uint64_t size = file->second.size, bytes = place.bytes();
    if (bytes > size || place.offset > size - bytes)
        throw std::runtime_error("weight '" + name + "' is beyond the end of '" + place.file + "'");
    if (place.length && *place.length != bytes)
        throw std::runtime_error("weight '" + name + "' has " + std::to_string(*place.length) +
                                 " bytes, its shape needs " + std::to_string(bytes));
}

// What a block's inputs say of its cache: [batch, kv_heads, past, head_dim].
void check_cache(const ModelSpec& spec, const Graph& graph) {
    const Shape expected = {ANY, spec.kv_heads, ANY, spec.head_dim};
    for (const char* const name : {"past_key", "past_value"}) {
        const auto input = graph.inputs.find(name);
        if (input == graph.inputs.end() || !fits(input->second, expected))
            throw std::runtime_error(std::string("its input '") + name + "' is not the manifest's " +
                                     shown(expected));
    }
}

void check_positions(const Manifest& manifest, const Graph& graph, const WeightPlaces& weights) {
    const bool switches = graph.inputs.count("long_context") > 0;
    if (switches != manifest.spec.rotary_switch.has_value())
        throw std::runtime_error(switches ? "it has two sets of rotary factors, the manifest's model has one"
                                          : "it lacks the second set of rotary factors");
    if (manifest.spec.rotary_dim) return;
    const std::int64_t positions = weights.at("position_embedding").shape[0];
    if (positions != manifest.spec.max_positions)
        throw std::runtime_error("it has " + std::to_string(positions) + " positions, the manifest's model " +
                                 std::to_string(manifest.spec.max_positions));
    if (positions < manifest.max_length)
        throw std::runtime_error("it has " + std::to_string(positions) +
                                 " positions, fewer than the cache's max_length of " +
                                 std::to_string(manifest.max_length));
}

}  // namespace

WeightPlaces checked_weights(const Manifest& manifest, const GraphEntry& entry, const Graph& graph) {
    std::map<std::string, Expected> expected;
    for (Expected& each : expected_of(manifest, entry.name)) expected.emplace(each.name, each);
    WeightPlaces weights;
    for (const auto& [name, stored] : graph.weights) {
        const auto found = expected.find(name);
        if (found == expected.end())
            throw std::runtime_error("weight '" + name + "' is none of the manifest's model");
        WeightPlace place = stored;
        place.file = "graphs/" + place.file;
        check_weight(name, place, found->second, manifest);
        check_place(name, place, entry, manifest);
        weights.emplace(name, std::move(place));
    }
    for (const auto& [name, each] : expected)
        if (each.needed && !weights.count(name)) throw std::runtime_error("it has no weight '" + name + "'");
    if (entry.name == "embed") check_positions(manifest, graph, weights);
    if (entry.name.rfind("block_", 0) == 0) check_cache(manifest.spec, graph);
    return weights;
}

void check_rotary_places(const Manifest& manifest, const WeightPlaces& embed) {
    if (!manifest.rotary) return;
    const auto check = [&](const TensorSlice& table, const std::string& name) {
        const WeightPlace& place = embed.at(name);
        if (place.file != table.file || place.offset != table.offset || place.shape != table.shape)
            throw std::runtime_error("its rotary tables are others than '" + name + "' of the embed graph");
    };
    check(manifest.rotary->cosines, "rotary_cos_table");
    check(manifest.rotary->sines, "rotary_sin_table");
}

}  // namespace ojfa::core
