#include "bundle/manifest.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "bundle/canonical.hpp"
#include "bundle/fields.hpp"
#include "bundle/held.hpp"
#include "bundle/parts.hpp"
#include "bundle/sha256.hpp"
#include "failure.hpp"

namespace ojfa::core {
namespace {

constexpr std::int64_t FORMAT_VERSION = 1;
constexpr std::uint64_t MOST_BYTES = 64 << 20;  // hundreds of times what a model of 100 blocks has
constexpr std::size_t MOST_BLANKS = 4096;       // before the manifest begins
const char* const MAKE_ONE = "make one with 'ojfa-export build CHECKPOINT -o BUNDLE'";
const char* const COPY_AGAIN = "copy the bundle again whole, or build it again";

Failure damaged(const std::filesystem::path& path, const std::string& detail) {
    return bundle_failure(path.string() + " is damaged: " + detail,
                          "build the bundle again, or copy it again whole");
}

void check_version(const Json& raw, const std::filesystem::path& path) {
    if (!raw.is_object() || !raw.contains("format") || raw["format"] != "ojfa-bundle")
        throw std::runtime_error("it does not say format 'ojfa-bundle'");
    const auto version = raw.find("format_version");
    if (version != raw.end() && version->is_number_integer() && *version > FORMAT_VERSION)
        throw bundle_failure(
            path.string() + " has format version " + version->dump() + "; this library reads " +
                std::to_string(FORMAT_VERSION),
            "upgrade the library, or build the bundle again with its version of ojfa-export");
}

void check_digest(const std::string& text, const Json& raw, const std::filesystem::path& path) {
    const auto digest = raw.find("digest");
    if (digest == raw.end() || *digest != sha256_text(canonical_json(text, "digest")))
        throw bundle_failure(path.string() + " was altered: its own digest differs", COPY_AGAIN);
}

// Quantised weights, which none of the library's backends runs.
[[noreturn]] void refuse_quantised(Fields weights) {
    throw bundle_failure(
        "the bundle's weights are " + weights.one_of("storage", {"int4", "int8", "fp8"}) +
            ", which this library doesn't run",
        "run it in Python, or build it from a checkpoint that isn't quantised, without --weights");
}

// Thresholds of a check head are none of the exit head's: policies asked otherwise would not keep what was
// promised.
[[noreturn]] void refuse_check_head() {
    throw bundle_failure(
        "the bundle's exits are checked by a head of their own, which this library doesn't run",
        "run it in Python, or build it again with --check-vocabulary 0");
}

// That of a bundle which some backend of the library runs.
std::string read_precision(Fields& fields) {
    std::string precision = fields.one_of("precision", {"fp32", "fp16", "bf16"});
    if (precision == "bf16")
        throw bundle_failure("the bundle is in bf16, which this library doesn't run",
                             "run it in Python, or build it again with --precision fp16");
    return precision;
}

Manifest read_fields(const Json& raw) {
    Manifest manifest;
    Fields fields(raw, "");
    fields.at("digest");
    fields.one_of("format", {"ojfa-bundle"});
    fields.integer("format_version", FORMAT_VERSION, FORMAT_VERSION);
    manifest.spec = read_model(fields.object("model"));
    manifest.precision = read_precision(fields);
    if (const Json* weights = fields.maybe("weights")) refuse_quantised(Fields(*weights, "weights"));
    if (fields.maybe("check")) refuse_check_head();
    fields.integer("opset", 1);
    Fields cache = fields.object("cache");
    cache.maybe("axes");
    manifest.max_length = static_cast<int>(cache.integer("max_length", 1));
    manifest.max_batch_size = static_cast<int>(cache.integer("max_batch_size", 1));
    cache.done();
    fields.at("rotary");
    if (const Json* rotary = fields.maybe("rotary")) manifest.rotary = read_rotary(Fields(*rotary, "rotary"));
    for (const Fields& each : fields.objects("graphs")) manifest.graphs.push_back(read_graph(each));
    for (const Fields& each : fields.objects("engines")) manifest.engines.push_back(read_engines(each));
    manifest.shortcut = read_shortcut(fields.object("shortcut"));
    check_calibration(fields.object("calibration"));
    for (const Fields& each : fields.objects("golden")) manifest.golden.push_back(read_golden(each));
    if (const Json* policy = fields.maybe("auto")) manifest.automatic = read_policy(Fields(*policy, "auto"));
    if (const Json* promise = fields.maybe("promise")) check_promise(Fields(*promise, "promise"));
    if (const Json* planned = fields.maybe("default"))
        manifest.planned = read_default(Fields(*planned, "default"));
    if (fields.json().contains("generation"))
        check_generation(fields.object("generation"), manifest.spec.vocab_size);
    // A layer that Python alone runs; its files are held like all others. Where it was planned to draft with
    // it, nothing is planned here.
    const bool drafts = fields.maybe("draft") != nullptr;
    if (drafts && manifest.planned && manifest.planned->speculation &&
        manifest.planned->speculation->exit == 0)
        manifest.planned.reset();
    Fields files = fields.object("files");
    for (const auto& member : files.json().items())
        manifest.files[member.key()] = read_file_entry(files.object(member.key()));
    check_built(fields.object("built"));
    fields.done();
    return manifest;
}

void check_exits(const Manifest& manifest) {
    const int blocks = manifest.spec.blocks;
    const Shortcut& shortcut = manifest.shortcut;
    if (shortcut.gates && (!shortcut.residual || *shortcut.gates != static_cast<std::size_t>(blocks - 1)))
        throw std::runtime_error("the shortcut's gates must be one for each exit");
    if (manifest.automatic) manifest.automatic->check_fits(blocks);
    if (manifest.planned) {
        if (manifest.planned->automatic && !manifest.automatic)
            throw std::runtime_error("the default is auto, which the bundle doesn't have");
        if (manifest.planned->speculation) manifest.planned->speculation->resolve_exit(blocks);
    }
    if (manifest.golden.empty())
        throw std::runtime_error("it has no golden tokens to show that the bundle works");
    for (const Golden& golden : manifest.golden) {
        const auto known = [&](std::int32_t id) { return id >= 0 && id < manifest.spec.vocab_size; };
        if (golden.exit > blocks || golden.prompt.empty() ||
            !std::all_of(golden.prompt.begin(), golden.prompt.end(), known) ||
            golden.prompt.size() + golden.tokens.size() > static_cast<std::size_t>(manifest.max_length) + 1)
            throw std::runtime_error("golden tokens are outside the model");
    }
}

void check_rotary(const Manifest& manifest) {
    const ModelSpec& spec = manifest.spec;
    if (manifest.rotary.has_value() != (spec.rotary_dim != 0))
        throw std::runtime_error("rotary tables must be there exactly where the model rotates");
    if (!manifest.rotary) return;
    const std::int64_t rows = std::int64_t{manifest.max_length} * spec.rotary_sets();
    for (const TensorSlice* table : {&manifest.rotary->cosines, &manifest.rotary->sines})
        if (table->shape.size() != 2 || table->shape[0] < rows || table->shape[1] != spec.rotary_dim / 2)
            throw std::runtime_error("rotary tables must be [" + std::to_string(rows) + " or more, " +
                                     std::to_string(spec.rotary_dim / 2) + "]");
}

}  // namespace

Manifest parse_manifest(const std::string& text, const std::filesystem::path& path) {
    try {
        // Megabytes of blanks or brackets are told from a manifest before they are parsed.
        const std::size_t begin = text.find_first_not_of(" \t\r\n");
        const bool ends = text.find('\0') != std::string::npos;  // what the parser takes for the text's end
        if (ends || begin >= MOST_BLANKS || text[begin] != '{')
            throw std::runtime_error("it is no JSON object");
        const Json raw = Json::parse(text);
        check_version(raw, path);
        check_digest(text, raw, path);
        Manifest manifest = read_fields(raw);
        check_exits(manifest);
        check_rotary(manifest);
        return manifest;
    } catch (const Failure& failure) {
        if (failure.status() == OJFA_ERROR_BUNDLE) throw;
        throw damaged(path, failure.what());  // a policy or an exit that can't be
    } catch (const std::exception& error) {
        throw damaged(path, error.what());
    }
}

Manifest read_manifest(const std::filesystem::path& bundle) {
    std::error_code ignored;
    if (!std::filesystem::is_directory(bundle, ignored))
        throw bundle_failure(bundle.string() + " is not a bundle: no such directory", MAKE_ONE);
    const std::filesystem::path path = bundle / "manifest.json";
    if (std::filesystem::symlink_status(path, ignored).type() == std::filesystem::file_type::not_found)
        throw bundle_failure(bundle.string() + " is not a bundle: it has no manifest.json", MAKE_ONE);
    return parse_manifest(read_plain(path, MOST_BYTES), path);
}

std::string block_name(int block) {
    char name[24];
    std::snprintf(name, sizeof name, "block_%02d", block);
    return name;
}

std::vector<std::string> graph_names(int blocks) {
    std::vector<std::string> names = {"embed"};
    for (int block = 0; block < blocks; ++block) names.push_back(block_name(block));
    names.insert(names.end(), {"exit_head", "final_head"});
    return names;
}

}  // namespace ojfa::core
