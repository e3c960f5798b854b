// Bundles that were damaged, changed while they are used, or lie: each is refused with one sentence and a
// hint, or gives the tokens of the whole one. Nothing crashes or waits.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <functional>
#include <optional>

#include "bundle/canonical.hpp"
#include "bundle/sha256.hpp"
#include "failure.hpp"
#include "fixtures.hpp"
#include "runtime/generation.hpp"
#include "runtime/model.hpp"

using namespace ojfa::core;
using fixtures::Copy;
using fixtures::Json;

namespace {

const char* const NAMES[] = {"llama.ojfa", "gpt2.ojfa", "phi3.ojfa"};
constexpr unsigned MOST_SECONDS = 60;  // that a load may take, which is milliseconds on a machine at rest

std::string now;  // what is being tried, for who waits in vain

// Ends the process where something waits.
struct TimeLimit {
    TimeLimit() {
        signal(SIGALRM, [](int) {
            std::cerr << "it hangs: " << now << std::endl;
            abort();
        });
        alarm(MOST_SECONDS);
    }
    ~TimeLimit() { alarm(0); }
};

// How many random damages of a kind; OJFA_TEST_DAMAGES asks for more.
int damages(int usual) {
    const char* const given = std::getenv("OJFA_TEST_DAMAGES");
    return given ? std::stoi(given) : usual;
}

LoadOptions reference(bool check_golden = true) {
    LoadOptions options;
    options.backend = "reference";
    options.check_golden = check_golden;
    return options;
}

using Tokens = std::vector<std::int32_t>;

// What a model says of a prompt, at full depth and at an early exit.
Tokens tokens_of(Model& model) {
    Tokens tokens;
    for (const int exit : {model.spec().blocks, 2}) {
        const std::unique_ptr<Session> session = model.session({});
        Tokens pending = {5, 17, 200, 33, 8};
        for (int i = 0; i < 4; ++i) {
            std::int32_t chosen = -1;
            session->advance({pending}, exit, {nullptr, &chosen});
            tokens.push_back(chosen);
            pending = {chosen};
        }
    }
    return tokens;
}

const Tokens& right_tokens(const std::string& name) {
    static std::map<std::string, Tokens> known;
    Tokens& tokens = known[name];
    if (tokens.empty()) {
        Model model(fixtures::vectors(name), reference());
        tokens = tokens_of(model);
    }
    return tokens;
}

void expect_proper(const Failure& failure) {
    const std::string message = failure.what();
    EXPECT_TRUE(failure.status() == OJFA_ERROR_BUNDLE || failure.status() == OJFA_ERROR_BACKEND) << message;
    EXPECT_FALSE(failure.hint().empty()) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

// The tokens of a bundle; what was refused in `refusal` where it can't be used.
std::optional<Tokens> used(const std::filesystem::path& bundle, std::string* refusal = nullptr) {
    const TimeLimit limit;
    try {
        Model model(bundle, reference());
        return tokens_of(model);
    } catch (const Failure& failure) {
        expect_proper(failure);
        if (refusal) *refusal = failure.what();
        return std::nullopt;
    }
}

std::string refusal(const std::filesystem::path& bundle) {
    std::string said = "nothing was refused";
    used(bundle, &said);
    return said;
}

void expect_says(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
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
        {"gpt2.ojfa", {{"/cache/max_length", 129}}, "it has 128 positions"},
        {"gpt2.ojfa", {{"/shortcut/residual", false}}, "is none of the manifest's model"},
        {"llama.ojfa", {{"/shortcut/rank", 9}}, "weight 'project'"},
        {"phi3.ojfa", {{"/model/spec/rotary_switch", nullptr}}, "two sets of rotary factors"},
        {"llama.ojfa", {{"/rotary/cos/file", "graphs/embed.bin"}}, "its rotary tables are others"},
        {"llama.ojfa", {{"/rotary/cos/offset", 2048}}, "its rotary tables are others"},
        {"llama.ojfa", {{"/graphs/0/weights", Json::array()}}, "does not name for this graph"},
        {"llama.ojfa", {{"/golden", Json::array()}}, "no golden tokens"},
        {"llama.ojfa", {{"/golden/0/token_ids", Json::array()}}, "golden.0.token_ids: there is none"},
        {"llama.ojfa", {{"/model/spec/heads", 2147483647}, {"/model/spec/kv_heads", 1}}, "so many features"},
        {"llama.ojfa", {{"/model/spec/activation", "relu"}}, "gives other tokens"},
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

namespace {

// A change of a bundle under a model that has opened it and used its first blocks.
using Change = std::function<void(const std::filesystem::path& bundle)>;

void expect_noticed(const Change& change, const std::string& said) {
    const TimeLimit limit;
    const Copy copy;
    Model model(copy.bundle, reference(false));
    const std::unique_ptr<Session> session = model.session({});
    std::int32_t chosen = -1;
    session->advance({Tokens{5, 17}}, 1, {nullptr, &chosen});
    change(copy.bundle);
    for (int i = 0; i < 2; ++i) {  // it is said again, and the session stays as it was
        try {
            session->advance({Tokens{200}}, 4, {nullptr, &chosen});
            FAIL() << "nothing was refused";
        } catch (const Failure& failure) {
            expect_proper(failure);
            expect_says(failure.what(), said);
        }
        EXPECT_EQ(session->length(0), 2);
    }
    session->advance({Tokens{200}}, 1, {nullptr, &chosen});  // what is loaded goes on
}

const char* const LAZY = "graphs/block_03.bin";
const char* const CHANGED = "was replaced or changed since the bundle was opened";

}  // namespace

TEST(ChangesUnderAModel, AreNoticedWhereAFileIsReadLater) {
    expect_noticed([](const auto& bundle) { std::filesystem::remove_all(bundle); }, "is gone since");
    expect_noticed([](const auto& bundle) { std::filesystem::resize_file(bundle / LAZY, 1000); }, CHANGED);
    expect_noticed(
        [](const auto& bundle) {  // as large and as old as before
            const auto time = std::filesystem::last_write_time(bundle / LAZY);
            std::string content = fixtures::read(bundle / LAZY);
            content[100] ^= 1;
            std::fstream(bundle / LAZY, std::ios::in | std::ios::out | std::ios::binary) << content;
            std::filesystem::last_write_time(bundle / LAZY, time);
        },
        CHANGED);
    expect_noticed(
        [](const auto& bundle) {
            fixtures::write(bundle / "new", fixtures::read(bundle / LAZY));
            std::filesystem::rename(bundle / "new", bundle / LAZY);
        },
        CHANGED);
    expect_noticed(
        [](const auto& bundle) {
            std::filesystem::remove(bundle / LAZY);
            mkfifo((bundle / LAZY).c_str(), 0600);
        },
        CHANGED);
}

TEST(ChangesUnderAModel, NoMoreFilesMayBeOpened) {
    Model model(fixtures::vectors("llama.ojfa"), reference(false));
    rlimit usual{};
    ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &usual), 0);
    const rlimit none = {0, usual.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    std::string said = "nothing was refused";
    try {
        tokens_of(model);
    } catch (const Failure& failure) {
        said = failure.what() + std::string("\n") + failure.hint();
    }
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &usual), 0);
    expect_says(said, "can't be read: Too many open files\nclose some files, or raise the limit");
    EXPECT_EQ(tokens_of(model), right_tokens("llama.ojfa"));  // the model goes on
}

TEST(ChangesUnderAModel, AnotherBundleUnderItsNameChangesNothing) {
    const Copy copy;
    Model model(copy.bundle, reference(false));
    std::filesystem::rename(copy.bundle, copy.path / "old");
    std::filesystem::copy(fixtures::vectors("gpt2.ojfa"), copy.bundle,
                          std::filesystem::copy_options::recursive);
    EXPECT_EQ(tokens_of(model), right_tokens("llama.ojfa"));
}

TEST(ChangesUnderAModel, WhileItIsLoaded) {
    // A file that was checked already becomes another before its last sibling is.
    const Copy copy;
    bool changed = false;
    LoadOptions options = reference();
    options.progress = [&](std::uint64_t, std::uint64_t) {
        if (changed) return;
        changed = true;
        for (const std::string& name : files_of(copy.bundle))
            if (name != "manifest.json") std::filesystem::resize_file(copy.bundle / name, 7);
    };
    try {
        Model model(copy.bundle, options);
        FAIL() << "nothing was refused";
    } catch (const Failure& failure) {
        expect_proper(failure);
        expect_says(failure.what(), CHANGED);
    }
}
