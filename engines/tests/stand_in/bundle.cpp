// Adds engines of the stand-in to a stored bundle: what `ojfa-export build --backend tensorrt` writes, with
// programs of the stand-in in place of compiled ones.
#include "bundle/bundle.hpp"

#include <cmath>

#include "bundle/canonical.hpp"
#include "bundle/onnx.hpp"
#include "bundle/sha256.hpp"
#include "fixtures.hpp"

namespace fixtures {
namespace {

using namespace ojfa::core;

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// As transposed() of ojfa_export/backends/tensorrt/graphs.py.
bool is_transposed(const std::string& name) {
    if (name.rfind("attention.", 0) && name.rfind("mlp.", 0)) return false;
    return ends_with(name, "qkv.weight") || ends_with(name, "out.weight") || ends_with(name, "up.weight") ||
           ends_with(name, "down.weight");
}

std::string program(const ModelSpec& spec, bool half, int rank, int part) {
    std::ostringstream text;
    text << "HALF " << half << "\nHEAD_DIM " << spec.head_dim << "\nHEADS " << spec.heads << "\nKV_HEADS "
         << spec.kv_heads << "\nROTARY_DIM " << spec.rotary_dim << "\nWINDOW " << spec.window.value_or(0)
         << "\nNORM_LAYER " << (spec.norm == NormKind::layer) << "\nACTIVATION "
         << static_cast<int>(spec.activation) << "\nGATED " << spec.gated << "\nWIDTH " << spec.hidden_size
         << "\nINNER " << spec.intermediate_size << "\nVOCABULARY " << spec.vocab_size << "\nRANK " << rank
         << "\nEPSILON_DIGITS " << std::lround(-std::log10(spec.norm_epsilon)) << "\nPART " << part
         << "\nend 0\n";
    return text.str() + '\0';
}

Json plan(const fs::path& bundle, const std::string& graph, const std::string& precision, int& rank) {
    const std::string model = read(bundle / "graphs" / (graph + ".onnx"));
    Json weights = Json::object();
    for (const auto& [name, place] :
         read_graph({reinterpret_cast<const unsigned char*>(model.data()), model.size()}).weights) {
        if (name.rfind("rotary", 0) == 0) continue;
        weights[name] = {{"file", place.file},
                         {"offset", place.offset},
                         {"shape", place.shape},
                         {"precision", place.half ? "fp16" : "fp32"},
                         {"transposed", is_transposed(name)}};
        if (name == "project") rank = static_cast<int>(place.shape.at(1));
    }
    Json engines = Json::object();
    if (graph.rfind("block", 0) == 0) engines = {{"qkv", "qkv.engine"}, {"mlp", "mlp.engine"}};
    if (ends_with(graph, "_head") && !weights.contains("gates")) engines[graph] = graph + ".engine";
    return {{"precision", precision},
            {"engines", engines},
            {"kernels", {{"fp32", "fp32.cubin"}, {"fp16", "fp16.cubin"}}},
            {"weights", weights},
            {"activation_bytes", 512}};
}

void add_engines(const fs::path& bundle) {
    Json manifest = read_json(bundle / "manifest.json");
    const Manifest parsed = read_manifest(bundle);
    const ModelSpec& spec = parsed.spec;
    const fs::path folder = bundle / "engines" / "tensorrt";
    fs::create_directories(folder);
    Json files = Json::object();
    int rank = 1;
    for (const std::string& graph : graph_names(spec.blocks)) {
        write(folder / (graph + ".json"), plan(bundle, graph, parsed.precision, rank).dump());
        files[graph] = "engines/tensorrt/" + graph + ".json";
    }
    const bool half = parsed.precision == "fp16";
    const char* const parts[] = {"qkv", "mlp", "exit_head", "final_head"};
    for (int part = 0; part < 4; ++part)
        write(folder / (std::string(parts[part]) + ".engine"), program(spec, half, rank, part));
    write(folder / "fp32.cubin", program(spec, false, rank, 0));
    write(folder / "fp16.cubin", program(spec, true, rank, 0));
    manifest["engines"].push_back(
        {{"backend", "tensorrt"},
         {"files", files},
         {"built_with", {{"tensorrt", "8.6.0"}, {"gpu", "stand-in"}, {"compute capability", "9.0"}}}});
    for (const auto& file : fs::directory_iterator(folder)) {
        const std::string content = read(file.path());
        manifest["files"]["engines/tensorrt/" + file.path().filename().string()] = {
            {"size", content.size()}, {"sha256", sha256_text(content)}};
    }
    manifest["digest"] = sha256_text(canonical_json(manifest.dump(), "digest"));
    write(bundle / "manifest.json", manifest.dump());
}

}  // namespace

fs::path bundle(const std::string& name) {
    static std::map<std::string, std::unique_ptr<Copy>> made;
    std::unique_ptr<Copy>& copy = made[name];
    if (!copy) {
        copy = std::make_unique<Copy>(name);
        add_engines(copy->bundle);
    }
    return copy->bundle;
}

}  // namespace fixtures
