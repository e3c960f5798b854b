// Engines' plans that lie, and files that change under a model, on the TensorRT backend.
#include "bundle/canonical.hpp"
#include "bundle/sha256.hpp"
#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

namespace {

namespace fs = std::filesystem;
using fixtures::Json;

// A bundle with engines that may be damaged.
struct CopyWithEngines : fixtures::TemporaryDirectory {
    CopyWithEngines() : bundle(path / "llama.ojfa") {
        fs::copy(fixtures::bundle("llama.ojfa"), bundle, fs::copy_options::recursive);
    }
    fs::path bundle;
};

void sign(const fs::path& bundle, Json manifest) {
    for (const auto& file : manifest["files"].items()) {
        const std::string content = fixtures::read(bundle / file.key());
        file.value() = {{"size", content.size()}, {"sha256", ojfa::core::sha256_text(content)}};
    }
    manifest["digest"] = ojfa::core::sha256_text(ojfa::core::canonical_json(manifest.dump(), "digest"));
    fixtures::write(bundle / "manifest.json", manifest.dump());
}

template <class Call>
std::string refusal(Call call, ojfa_status status = OJFA_ERROR_BUNDLE) {
    try {
        call();
    } catch (const ojfa::Error& error) {
        EXPECT_EQ(error.status(), status);
        EXPECT_FALSE(error.hint().empty());
        return error.what();
    }
    return "nothing was refused";
}

void expect_says(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
}

}  // namespace

TEST(PlansOfEngines, AreComparedWithTheGraphs) {
    const CopyWithEngines exchanged;
    Json manifest = fixtures::read_json(exchanged.bundle / "manifest.json");
    for (Json& engines : manifest["engines"])
        if (engines["backend"] == "tensorrt")
            std::swap(engines["files"]["block_01"], engines["files"]["block_03"]);
    sign(exchanged.bundle, manifest);
    expect_says(refusal([&] { ojfa::Model::load(exchanged.bundle); }), "the graph has another weight");

    const std::pair<const char*, Json> lies[] = {{"/weights/mlp.up.weight/offset", 0},
                                                 {"/weights/mlp.up.weight/file", "embed.onnx"},
                                                 {"/weights/mlp.up.weight/shape/0", 16},
                                                 {"/weights/mlp.up.weight/precision", "fp16"},
                                                 {"/engines/qkv", "none.engine"}};
    for (const auto& [place, value] : lies) {
        const CopyWithEngines copy;
        const fs::path plan = copy.bundle / "engines/tensorrt/block_02.json";
        Json changed = fixtures::read_json(plan);
        changed[Json::json_pointer(place)] = value;
        fixtures::write(plan, changed.dump());
        sign(copy.bundle, fixtures::read_json(copy.bundle / "manifest.json"));
        expect_says(refusal([&] { ojfa::Model::load(copy.bundle); }), "block_02.json can't be read: ");
    }
}

TEST(PartsOfModels, WithoutKernelsAreRefusedByName) {
    const std::pair<const char*, Json> models[] = {
        {"/model/spec/norms", "after"},
        {"/model/spec/windowed", {true, false, true, false}},
        {"/model/spec/logit_softcap", 30.0},
    };
    const char* const parts[] = {"norms after attention and MLP", "sliding windows in some blocks only",
                                 "softcaps"};
    for (int model = 0; model < 3; ++model) {
        const CopyWithEngines copy;
        Json manifest = fixtures::read_json(copy.bundle / "manifest.json");
        manifest[Json::json_pointer(models[model].first)] = models[model].second;
        sign(copy.bundle, manifest);
        const std::string said = refusal([&] { ojfa::Model::load(copy.bundle); }, OJFA_ERROR_BACKEND);
        expect_says(said, std::string("this model has ") + parts[model]);
    }
}

TEST(Engines, WithAnotherCacheAreRefusedByName) {
    const CopyWithEngines copy;
    Json manifest = fixtures::read_json(copy.bundle / "manifest.json");
    for (Json& engines : manifest["engines"])
        if (engines["backend"] == "tensorrt") engines["built_with"]["cache"] = "fp8";
    sign(copy.bundle, manifest);
    expect_says(refusal([&] { ojfa::Model::load(copy.bundle); }, OJFA_ERROR_BACKEND),
                "keep keys and values in fp8");
}

TEST(FilesUnderAModel, ThatChangeAreNoticedWhereTheyAreRead) {
    const CopyWithEngines copy;
    ojfa::LoadOptions options;
    options.check_golden = false;
    const auto model = ojfa::Model::load(copy.bundle, options);
    auto session = model.session();
    session.advance({{5, 17}}, 1);
    fs::resize_file(copy.bundle / "graphs/block_03.bin", 1000);
    expect_says(refusal([&] { session.advance({{8}}, 4); }), "was replaced or changed");
    EXPECT_EQ(session.advance({{8}}, 1).likeliest.size(), 1u);  // what is loaded goes on
    fs::remove_all(copy.bundle);
    expect_says(refusal([&] { session.advance({{8}}, 4); }), "is gone since");
}
