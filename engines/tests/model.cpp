#include "runtime/model.hpp"

#include "bundle/canonical.hpp"
#include "bundle/sha256.hpp"
#include "failure.hpp"
#include "fixtures.hpp"

using namespace ojfa::core;

namespace {

LoadOptions reference() {
    LoadOptions options;
    options.backend = "reference";
    return options;
}

}  // namespace

TEST(GoldenTokens, AreComparedAtLoad) {
    for (const char* name : {"llama.ojfa", "gpt2.ojfa", "phi3.ojfa", "qwen3.ojfa", "gemma3.ojfa"}) {
        EXPECT_NO_THROW(Model(fixtures::vectors(name), reference()));
        // The same bundle whose last golden token is another.
        const fixtures::Copy copy(name);
        fixtures::Json manifest = fixtures::read_json(copy.bundle / "manifest.json");
        fixtures::Json& token = manifest["golden"].back()["token_ids"].back();
        token = (token.get<int>() + 1) % 320;
        manifest["digest"] = sha256_text(canonical_json(manifest.dump(), "digest"));
        fixtures::write(copy.bundle / "manifest.json", manifest.dump());
        try {
            Model opened(copy.bundle, reference());
            FAIL() << "nothing was refused";
        } catch (const Failure& failure) {
            EXPECT_EQ(failure.status(), OJFA_ERROR_BACKEND);
            EXPECT_NE(std::string(failure.what()).find("gives other tokens here"), std::string::npos);
        }
        LoadOptions unchecked = reference();
        unchecked.check_golden = false;
        EXPECT_NO_THROW(Model(copy.bundle, unchecked));
    }
}

TEST(Loading, BlocksThatAreAskedForAreThereAtOnce) {
    LoadOptions options = reference();
    Model all(fixtures::vectors("llama.ojfa"), options);
    options.check_golden = false;
    Model none(fixtures::vectors("llama.ojfa"), options);
    options.blocks = 2;
    Model two(fixtures::vectors("llama.ojfa"), options);
    EXPECT_GT(two.engines().memory(), none.engines().memory());
    EXPECT_LT(two.engines().memory(), all.engines().memory());
    options.blocks = 5;
    EXPECT_THROW(Model(fixtures::vectors("llama.ojfa"), options), Failure);
}
