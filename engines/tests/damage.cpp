// Bundles that were damaged or lie: each is refused with one sentence and a hint, or gives the tokens of the
// whole one. Nothing crashes or waits.
#include <sys/stat.h>

#include <algorithm>

#include "bundle/canonical.hpp"
#include "bundle/sha256.hpp"
#include "tried.hpp"

using namespace tried;
using fixtures::Copy;
using fixtures::Json;

namespace {

// How many random damages of a kind; OJFA_TEST_DAMAGES asks for more.
int damages(int usual) {
    const char* const given = std::getenv("OJFA_TEST_DAMAGES");
    return given ? std::stoi(given) : usual;
}

// Makes all digests fit what there is.
void sign(const std::filesystem::path& bundle, Json manifest) {
    for (const auto& file : manifest["files"].items()) {
        if (!std::filesystem::is_regular_file(std::filesystem::symlink_status(bundle / file.key()))) continue;
        const std::string content = fixtures::read(bundle / file.key());
        file.value() = {{"size", content.size()}, {"sha256", sha256_text(content)}};
    }
    manifest["digest"] = sha256_text(canonical_json(manifest.dump(), "digest"));
    fixtures::write(bundle / "manifest.json", manifest.dump());
}

Json manifest_of(const std::filesystem::path& bundle) {
    return fixtures::read_json(bundle / "manifest.json");
}

template <class Change>
void rewrite(const std::filesystem::path& bundle, Change change) {
    Json manifest = manifest_of(bundle);
    change(manifest);
    sign(bundle, manifest);
}

std::vector<std::string> files_of(const std::filesystem::path& bundle) {
    std::vector<std::string> names = {"manifest.json"};
    const Json manifest = manifest_of(bundle);
    for (const auto& file : manifest["files"].items()) names.push_back(file.key());
    return names;
}

// Damages one file at random, and says how.
std::string damage(const std::filesystem::path& bundle, std::mt19937& random) {
    const std::vector<std::string> names = files_of(bundle);
    const std::string name = names[random() % names.size()], other = names[random() % names.size()];
    const auto path = bundle / name;
    std::string content = fixtures::read(path);
    switch (random() % 8) {
        case 0:
        case 1:
            for (unsigned i = 1 + random() % 4; i--;)
                content[random() % content.size()] ^= static_cast<char>(1 << random() % 8);
            fixtures::write(path, content);
            return name + ": bits";
        case 2:
            fixtures::write(path, content.substr(0, random() % content.size()));
            return name + ": cut off";
        case 3:
            fixtures::write(path, content + std::string(1 + random() % 100, '\0'));
            return name + ": longer";
        case 4:
            fixtures::write(path, fixtures::read(bundle / other));
            return name + ": is " + other;
        case 5:
            std::filesystem::remove(path);
            return name + ": removed";
        case 6:
            std::filesystem::remove(path);
            mkfifo(path.c_str(), 0600);
            return name + ": a pipe";
        default:
            std::filesystem::remove(path);
            std::filesystem::create_symlink(random() % 2 ? "/dev/zero" : name, path);
            return name + ": a link";
    }
}

}  // namespace

TEST(Damages, AreRefusedOrChangeNothing) {
    std::mt19937 random = fixtures::random_numbers();
    for (int i = 0; i < damages(60); ++i) {
        const std::string name = NAMES[i % 3];
        const Copy copy(name);
        const std::string how = damage(copy.bundle, random);
        now = how;
        const auto tokens = used(copy.bundle);
        if (tokens) {
            EXPECT_EQ(*tokens, right_tokens(name)) << how;
        }
    }
}

TEST(Damages, WithDigestsThatFitAreRefusedOrRunInBounds) {
    std::mt19937 random = fixtures::random_numbers();
    for (int i = 0; i < damages(60); ++i) {
        const Copy copy(NAMES[i % 3]);
        const Json manifest = manifest_of(copy.bundle);
        const std::string how = damage(copy.bundle, random);
        now = how;
        SCOPED_TRACE(how);
        // Of what a weight is changed to nobody can say whether it was meant so.
        if (how.rfind("manifest.json", 0)) sign(copy.bundle, manifest);
        used(copy.bundle);
    }
}

namespace {

// Values of the manifest that say how the model is computed: what golden tokens alone can tell, or can't.
bool is_computation(const std::string& place) {
    for (const char* const name : {"norm_epsilon", "attention_scales", "window", "rotary_switch"})
        if (place.find(name) != std::string::npos) return true;
    return false;
}

}  // namespace

TEST(Damages, HostileValuesAreRefusedOrChangeNothing) {
    std::mt19937 random = fixtures::random_numbers();
    const Json hostile[] = {
        0,   1,    2,  3,    -1,  7,       64,   65536, 2147483647,    2147483648u,   std::uint64_t{1} << 63,
        0.5, 1e30, "", "..", "x", nullptr, true, false, Json::array(), Json::object()};
    for (int i = 0; i < damages(90); ++i) {
        const std::string name = NAMES[i % 3];
        const Copy copy(name);
        Json manifest = manifest_of(copy.bundle);
        std::vector<std::string> places;
        const Json flat = manifest.flatten();
        for (const auto& leaf : flat.items()) {
            const std::string& place = leaf.key();
            // Half of them of the model, the cache and the rotation: others are mostly names and digests.
            const bool core = place.rfind("/model/spec", 0) == 0 || place.rfind("/cache", 0) == 0 ||
                              place.rfind("/rotary", 0) == 0 || place.rfind("/golden", 0) == 0;
            if (core == (i % 2 == 0)) places.push_back(place);
        }
        const std::string place = places[random() % places.size()];
        const Json value = hostile[random() % std::size(hostile)];
        now = name + place + " = " + value.dump();
        SCOPED_TRACE(now);
        manifest[Json::json_pointer(place)] = value;
        manifest["digest"] = sha256_text(canonical_json(manifest.dump(), "digest"));
        fixtures::write(copy.bundle / "manifest.json", manifest.dump());
        const auto tokens = used(copy.bundle);
        if (tokens && !is_computation(place)) {
            EXPECT_EQ(*tokens, right_tokens(name));
        }
    }
}

TEST(Lies, OfTheManifestAreSeenInTheGraphs) {
    struct Lie {
        const char* name;
        std::vector<std::pair<const char*, Json>> values;
        const char* said;
    };
    const Lie lies[] = {
        {"llama.ojfa", {{"/model/spec/hidden_size", 64}}, "weight 'token_embedding' is [320, 32]"},
        {"llama.ojfa", {{"/model/spec/vocab_size", 319}}, "weight 'token_embedding'"},
        {"llama.ojfa", {{"/model/spec/intermediate_size", 24}}, "weight 'mlp.down.weight'"},
        // The same widths of all matrices.
        {"llama.ojfa",
         {{"/model/spec/heads", 8},
          {"/model/spec/kv_heads", 4},
          {"/model/spec/head_dim", 8},
          {"/model/spec/rotary_dim", 8},
          {"/rotary/cos/shape/1", 4},
          {"/rotary/sin/shape/1", 4}},
         "rotary"},
        {"gpt2.ojfa",
         {{"/model/spec/heads", 8}, {"/model/spec/kv_heads", 8}, {"/model/spec/head_dim", 4}},
         "its input 'past_key' is not the manifest's [any, 8, any, 4]"},
        {"llama.ojfa", {{"/model/spec/gated", false}}, "weight 'mlp.up.weight'"},
        {"llama.ojfa", {{"/model/spec/norm", "layer"}}, "it has no weight"},
        {"gpt2.ojfa", {{"/model/spec/norm", "rms"}}, "is none of the manifest's model"},
        {"llama.ojfa", {{"/model/spec/family", "gpt2"}}, "it isn't the config's model_type"},
        {"gpt2.ojfa", {{"/precision", "fp32"}}, "is fp16, the manifest's model needs fp32"},
        {"llama.ojfa", {{"/precision", "bf16"}}, "is in bf16, which this library doesn't run"},
        {"llama.ojfa", {{"/precision", "fp8"}}, "precision: 'fp8' is not known"},
        {"gpt2.ojfa", {{"/cache/max_length", 129}}, "it has 128 positions"},
        {"gpt2.ojfa", {{"/shortcut/residual", false}}, "gates must be one for each exit"},
        {"gpt2.ojfa",
         {{"/shortcut/residual", false}, {"/shortcut/gates", nullptr}},
         "is none of the manifest's model"},
        {"llama.ojfa", {{"/shortcut/rank", 9}}, "weight 'project'"},
        {"llama.ojfa", {{"/shortcut/kind", "mlp"}}, "is an MLP, which this library doesn't run"},
        {"llama.ojfa", {{"/shortcut/kind", "block"}}, "is a block jump, which this library doesn't run"},
        {"llama.ojfa",
         {{"/weights", {{"storage", "int4"}, {"group_size", 32}, {"zero_points", true}}}},
         "weights are int4, which this library doesn't run"},
        {"llama.ojfa", {{"/weights", {{"storage", "fp8"}, {"group_size", 128}}}}, "weights are fp8, which"},
        {"llama.ojfa",
         {{"/check", Json::object()}},
         "exits are checked by a head of their own, which this library doesn't run"},
        {"llama.ojfa", {{"/weights", {{"storage", "int2"}}}}, "weights.storage: 'int2' is not known"},
        {"phi3.ojfa", {{"/model/spec/rotary_switch", nullptr}}, "two sets of rotary factors"},
        {"llama.ojfa", {{"/rotary/cos/file", "graphs/embed.bin"}}, "its rotary tables are others"},
        {"llama.ojfa", {{"/rotary/cos/offset", 2048}}, "its rotary tables are others"},
        {"llama.ojfa", {{"/graphs/0/weights", Json::array()}}, "does not name for this graph"},
        {"llama.ojfa", {{"/golden", Json::array()}}, "no golden tokens"},
        {"llama.ojfa", {{"/golden/0/token_ids", Json::array()}}, "golden.0.token_ids: there is none"},
        {"llama.ojfa", {{"/model/spec/heads", 2147483647}, {"/model/spec/kv_heads", 1}}, "so many features"},
        {"llama.ojfa", {{"/model/spec/activation", "relu"}}, "gives other tokens"},
        {"llama.ojfa", {{"/model/spec/norms", "after"}}, "gives other tokens"},
        {"llama.ojfa", {{"/model/spec/parallel", true}}, "gives other tokens"},
        {"llama.ojfa", {{"/model/spec/norms", "between"}}, "spec.norms: 'between' is not known"},
        {"llama.ojfa", {{"/model/spec/qk_norm", "head"}}, "it has no weight 'attention.k_norm.weight'"},
        {"llama.ojfa", {{"/model/spec/rotated", {false, false, false, false}}}, "gives other tokens"},
        {"llama.ojfa",
         {{"/model/spec/rotated", {true, false}}},
         "spec.rotated: there must be one for each block"},
        {"llama.ojfa", {{"/model/spec/windowed", {1, 0, 1, 0}}}, "spec.windowed: one of it is neither"},
        {"llama.ojfa", {{"/model/spec/norms", "both"}}, "it has no weight 'attention.after_norm.weight'"},
        {"llama.ojfa", {{"/model/spec/attention_softcap", 0.01}}, "gives other tokens"},
        {"llama.ojfa", {{"/model/spec/logit_softcap", 0}}, "spec.logit_softcap: it must be above 0"},
        {"llama.ojfa", {{"/model/spec/logit_softcap", "x"}}, "spec.logit_softcap: it is no number"},
        {"llama.ojfa", {{"/model/spec/rotated_second", {true, false, true, true}}}, "rotary tables must be"},
        {"llama.ojfa", {{"/model/spec/rotated_second", {true, false}}}, "there must be one for each block"},
        {"phi3.ojfa",
         {{"/model/spec/rotated_second", {true, true, true, true}}},
         "spec.rotated_second: there must be rotations"},
        {"llama.ojfa", {{"/model/spec/attention_scales", {4.0, 4.0, 4.0, 4.0}}}, "gives other tokens"},
    };
    for (const Lie& lie : lies) {
        const Copy copy(lie.name);
        rewrite(copy.bundle, [&](Json& manifest) {
            for (const auto& [place, value] : lie.values) manifest[Json::json_pointer(place)] = value;
        });
        expect_says(refusal(copy.bundle), lie.said);
    }
}

TEST(Lies, OfWeights) {
    // Graphs of two blocks in each other's place.
    const Copy exchanged;
    rewrite(exchanged.bundle, [](Json& manifest) {
        for (Json& graph : manifest["graphs"]) {
            const std::string name = graph["name"];
            if (name == "block_01" || name == "block_03") {
                const std::string other = name == "block_01" ? "block_03" : "block_01";
                graph["file"] = "graphs/" + other + ".onnx";
                graph["weights"] = {"graphs/" + other + ".bin"};
            }
        }
    });
    expect_says(refusal(exchanged.bundle), "gives other tokens");
    for (const char* const name : NAMES) {
        const Copy copy(name);
        std::string content = fixtures::read(copy.bundle / "graphs/embed.bin");
        for (std::size_t i = 1; i < 4096; i += 2)
            content[i] = content[i - 1] = '\x7f';  // NaN in fp16 and fp32
        for (std::size_t i = 0; i < 4096; ++i) content[i] = '\xff';
        fixtures::write(copy.bundle / "graphs/embed.bin", content);
        rewrite(copy.bundle, [](Json&) {});
        expect_says(refusal(copy.bundle), "holds something else than finite numbers");
    }
}

namespace {

// Replaces a text in a graph by another of the same length, and signs.
void replace_in_graph(const std::filesystem::path& bundle, const std::string& graph, const std::string& from,
                      const std::string& to) {
    std::string model = fixtures::read(bundle / graph);
    const std::size_t at = model.find(from);
    ASSERT_NE(at, std::string::npos);
    ASSERT_EQ(from.size(), to.size());
    fixtures::write(bundle / graph, model.replace(at, from.size(), to));
    sign(bundle, manifest_of(bundle));
}

}  // namespace

TEST(Lies, OfWhereWeightsLie) {
    const Copy outside, elsewhere, without, other;
    fixtures::write(outside.path / "ide.bin", std::string(50000, '\0'));
    replace_in_graph(outside.bundle, "graphs/block_00.onnx", "block_00.bin", "../../id.bin");
    expect_says(refusal(outside.bundle), "'graphs/../../id.bin', which the manifest does not name");
    replace_in_graph(elsewhere.bundle, "graphs/block_00.onnx", "block_00.bin", "block_01.bin");
    expect_says(refusal(elsewhere.bundle), "which the manifest does not name for this graph");
    // A length is optional in ONNX: without it the shape says how much it is.
    replace_in_graph(without.bundle, "graphs/embed.onnx", "length", "lengte");
    EXPECT_EQ(used(without.bundle), right_tokens("llama.ojfa"));
    replace_in_graph(without.bundle, "graphs/embed.onnx", "offset", "ofzett");  // it was 0
    EXPECT_EQ(used(without.bundle), right_tokens("llama.ojfa"));
    replace_in_graph(other.bundle, "graphs/embed.onnx", "40960", "40956");
    expect_says(refusal(other.bundle), "has 40956 bytes, its shape needs 40960");
}

TEST(Specials, AreRefusedBeforeTheyAreRead) {
    for (const char* const name :
         {"manifest.json", "graphs/block_02.bin", "graphs/embed.onnx", "tokenizer.json"}) {
        const Copy pipe, link, directory;
        std::filesystem::remove(pipe.bundle / name);
        ASSERT_EQ(mkfifo((pipe.bundle / name).c_str(), 0600), 0);
        expect_says(refusal(pipe.bundle), "a bundle holds plain files only");
        std::filesystem::remove(link.bundle / name);
        std::filesystem::create_symlink("/dev/zero", link.bundle / name);
        expect_says(refusal(link.bundle), "a bundle holds plain files only");
        std::filesystem::remove(directory.bundle / name);
        std::filesystem::create_directory(directory.bundle / name);
        EXPECT_NE(refusal(directory.bundle), "nothing was refused");
    }
    const Copy large;
    std::filesystem::resize_file(large.bundle / "manifest.json", std::uintmax_t{1} << 40);
    expect_says(refusal(large.bundle), "more than the");
}
