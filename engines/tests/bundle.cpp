#include "bundle/bundle.hpp"

#include <sys/stat.h>

#include <limits>

#include "bundle/canonical.hpp"
#include "bundle/sha256.hpp"
#include "failure.hpp"
#include "fixtures.hpp"

using namespace ojfa::core;
using fixtures::Copy;
using fixtures::Json;

namespace {

// Opens a bundle and checks all its files.
Bundle opened(const std::filesystem::path& directory, const Progress& progress = {},
              const Receive& receive = {}) {
    Bundle bundle(directory);
    Checker checker(bundle.files(), progress, bundle.bytes());
    bundle.check_contents(checker, Bundle::Part::others, receive);
    bundle.check_contents(checker, Bundle::Part::weights, receive);
    return bundle;
}

std::string refusal(const std::filesystem::path& bundle) {
    try {
        opened(bundle);
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.status(), OJFA_ERROR_BUNDLE);
        EXPECT_FALSE(failure.hint().empty());
        return failure.what();
    }
    return "nothing was refused";
}

void expect_says(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
}

// Changes the manifest and signs it again.
template <class Change>
void rewrite(const std::filesystem::path& bundle, Change change) {
    Json manifest = fixtures::read_json(bundle / "manifest.json");
    change(manifest);
    manifest["digest"] = sha256_text(canonical_json(manifest.dump(), "digest"));
    fixtures::write(bundle / "manifest.json", manifest.dump());
}

}  // namespace

TEST(BundleFiles, WholeOnesOpenAndReportProgress) {
    std::uint64_t last = 0, total = 0;
    const Bundle bundle = opened(fixtures::vectors("gpt2.ojfa"), [&](std::uint64_t done, std::uint64_t all) {
        EXPECT_GE(done, last);
        last = done, total = all;
    });
    EXPECT_EQ(last, total);
    EXPECT_GT(total, 100000u);
    EXPECT_EQ(bundle.engines("onnxruntime").files.size(), 7u);
    EXPECT_THROW(bundle.engines("tensorrt"), Failure);
}

TEST(BundleFiles, EveryFileIsCheckedForSizeAndContent) {
    std::mt19937 random = fixtures::random_numbers();
    const Json files = fixtures::read_json(fixtures::vectors("llama.ojfa") / "manifest.json")["files"];
    for (const auto& file : files.items()) {
        const Copy copy;
        const auto path = copy.bundle / file.key();
        const std::string content = fixtures::read(path);
        fixtures::write(path, content.substr(0, content.size() - 1));
        expect_says(refusal(copy.bundle), "its manifest says");
        std::string altered = content;
        altered[random() % altered.size()] ^= 1;
        fixtures::write(path, altered);
        expect_says(refusal(copy.bundle), "was altered");
        std::filesystem::remove(path);
        expect_says(refusal(copy.bundle), "lacks file");
    }
}

namespace {

// Keeps a file's bytes, with room for a few at a time.
class Kept : public Receiver {
 public:
    explicit Kept(std::string& content) : content_(content) {}
    Span<char> room() override { return {piece_, sizeof piece_}; }
    void take(std::size_t count) override { content_.append(piece_, count); }

 private:
    char piece_[37] = {};
    std::string& content_;
};

}  // namespace

TEST(BundleFiles, AreGivenToWhoReceivesThemWhileTheyAreChecked) {
    const auto directory = fixtures::vectors("llama.ojfa");
    std::map<std::string, std::string> received;
    const Bundle whole = opened(directory);
    for (const auto& file : whole.manifest().files) received[file.first];  // threads then change no map
    opened(directory, {}, [&](const std::string& name) -> std::unique_ptr<Receiver> {
        if (name == "tokenizer.json") return nullptr;
        return std::make_unique<Kept>(received.at(name));
    });
    for (const auto& [name, content] : received)
        EXPECT_EQ(content, name == "tokenizer.json" ? "" : fixtures::read(directory / name)) << name;
}

TEST(BundleFiles, NothingElseMayBeThere) {
    const Copy extra;
    fixtures::write(extra.bundle / "graphs" / "more.bin", "x");
    expect_says(refusal(extra.bundle), "which its manifest does not name");
    const Copy link;
    std::filesystem::rename(link.bundle / "tokenizer.json", link.path / "elsewhere.json");
    std::filesystem::create_symlink(link.path / "elsewhere.json", link.bundle / "tokenizer.json");
    expect_says(refusal(link.bundle), "symbolic link");
    const Copy pipe;
    ASSERT_EQ(mkfifo((pipe.bundle / "pipe").c_str(), 0600), 0);
    expect_says(refusal(pipe.bundle), "special file");
}

TEST(BundleFiles, PathsThatLeaveTheBundle) {
    for (const char* name :
         {"../secret", "/etc/passwd", "graphs/../../secret", "a\\b", "./x", "graphs//x", "", "x/"}) {
        const Copy copy;
        fixtures::write(copy.path / "secret", "x");
        rewrite(copy.bundle, [&](Json& manifest) {
            manifest["files"][name] = {{"size", 1}, {"sha256", sha256_text("x")}};
        });
        expect_says(refusal(copy.bundle), "names a path that leaves the bundle");
    }
}

TEST(BundleFiles, ReferencesNeedDigests) {
    const Copy graphs, engines, unnamed;
    rewrite(graphs.bundle, [](Json& manifest) { manifest["graphs"][0]["file"] = "graphs/none.onnx"; });
    expect_says(refusal(graphs.bundle), "refers to 'graphs/none.onnx' without its digest");
    rewrite(engines.bundle, [](Json& manifest) { manifest["engines"][0]["files"].erase("embed"); });
    expect_says(refusal(engines.bundle), "names onnxruntime engines other than those of 4 blocks");
    rewrite(unnamed.bundle, [](Json& manifest) { manifest["graphs"].erase(2); });
    expect_says(refusal(unnamed.bundle), "names graphs other than those of 4 blocks");
}

TEST(BundleFiles, TensorsBeyondTheirFiles) {
    for (const std::int64_t offset :
         {std::int64_t{1} << 20, std::numeric_limits<std::int64_t>::max(), std::int64_t{2052}}) {
        const Copy copy;
        rewrite(copy.bundle, [&](Json& manifest) { manifest["rotary"]["sin"]["offset"] = offset; });
        const Bundle bundle = opened(copy.bundle);
        EXPECT_THROW(bundle.tensor(bundle.manifest().rotary->sines), Failure);
        EXPECT_EQ(bundle.tensor(bundle.manifest().rotary->cosines).size(), 64u * 8);
    }
}

TEST(BundleFiles, NoBundleAtAll) {
    const fixtures::TemporaryDirectory empty;
    expect_says(refusal(empty.path), "it has no manifest.json");
    expect_says(refusal(empty.path / "nowhere"), "no such directory");
}
