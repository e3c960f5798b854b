#include "bundle/manifest.hpp"

#include "bundle/canonical.hpp"
#include "bundle/sha256.hpp"
#include "failure.hpp"
#include "fixtures.hpp"

using namespace ojfa::core;
using fixtures::Json;

namespace {

Json stored() {
    return fixtures::read_json(fixtures::vectors("llama.ojfa") / "manifest.json");
}

// A manifest's text whose digest fits what it says.
std::string signed_text(Json manifest) {
    manifest["digest"] = sha256_text(canonical_json(manifest.dump(), "digest"));
    return manifest.dump();
}

std::string refusal(const std::string& text) {
    try {
        parse_manifest(text, "B/manifest.json");
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.status(), OJFA_ERROR_BUNDLE);
        EXPECT_FALSE(failure.hint().empty());
        return failure.what();
    }
    return "nothing was refused";
}

}  // namespace

TEST(Manifest, SaysWhatTheBundleIs) {
    const Manifest manifest = parse_manifest(signed_text(stored()), "manifest.json");
    EXPECT_EQ(manifest.spec.family, "llama");
    EXPECT_EQ(manifest.spec.blocks, 4);
    EXPECT_EQ(manifest.spec.kv_heads, 2);
    EXPECT_EQ(manifest.spec.activation, Activation::silu);
    EXPECT_EQ(manifest.max_length, 64);
    EXPECT_EQ(manifest.automatic->exits, (std::vector<std::int32_t>{1, 2, 3}));
    EXPECT_EQ(manifest.planned->speculation->exit, 3);
    EXPECT_EQ(manifest.golden.size(), 2u);
    EXPECT_EQ(graph_names(2),
              (std::vector<std::string>{"embed", "block_00", "block_01", "exit_head", "final_head"}));
    EXPECT_EQ(block_name(123), "block_123");
}

TEST(Manifest, EveryMemberIsNeededAndKnown) {
    const std::set<std::string> optional = {"auto", "promise", "default"};
    const Json whole = stored();
    for (const auto& member : whole.items()) {
        Json without = stored(), other = stored();
        without.erase(member.key());
        other[member.key()] = 7.5;
        if (member.key() == "digest") {
            EXPECT_NE(refusal(without.dump()).find("altered"), std::string::npos);
            continue;
        }
        if (!optional.count(member.key())) {
            EXPECT_NE(refusal(signed_text(without)), "nothing was refused") << member.key();
        }
        EXPECT_NE(refusal(signed_text(other)), "nothing was refused") << member.key();
    }
    Json more = stored();
    more["colour"] = "red";
    EXPECT_EQ(refusal(signed_text(more)), "B/manifest.json is damaged: colour: it is not known");
}

TEST(Manifest, ALayerThatDraftsIsLeftToPython) {
    Json with = stored();
    with["draft"] = {{"depths", {1, 2, 4}}, {"graphs", Json::array()}};
    const Manifest manifest = parse_manifest(signed_text(with), "manifest.json");
    EXPECT_EQ(manifest.graphs.size(), stored()["graphs"].size());
    // Where it was planned to draft with the layer, nothing is planned here; without a layer that can't be.
    const Json speculation = {{"exit", 0}, {"draft", nullptr}, {"draft_cost", 0.1}};
    const Json planned = {{"exit", "full"},
                          {"speculation", speculation},
                          {"reason", "drafts"},
                          {"ms_per_token", 1.0},
                          {"full_ms_per_token", 2.0}};
    with["default"] = planned;
    EXPECT_FALSE(parse_manifest(signed_text(with), "manifest.json").planned);
    Json without = stored();
    without["default"] = planned;
    EXPECT_NE(refusal(signed_text(without)), "nothing was refused");
}

TEST(Manifest, APromiseSaysWhatItWasMadeOn) {
    Json with = stored();
    const Json domain = {{"name", "code"},          {"windows", 65}, {"tokens", 4160}, {"disagreement", 0.01},
                         {"extra_surprisal", 0.02}, {"depth", 3.5},  {"p_value", 0.03}};
    const Json limits = {{"max_disagreement", 0.05},
                         {"confidence", 0.95},
                         {"max_extra_surprisal", nullptr},
                         {"surprisal_clip", 10.0}};
    with["promise"] = {{"limits", limits},     {"policy", nullptr}, {"domains", {domain, domain}},
                       {"relative_cost", 1.0}, {"candidates", 0},   {"reason", "full depth"}};
    const auto parse = [&] { parse_manifest(signed_text(with), "manifest.json"); };
    EXPECT_NO_THROW(parse());  // as bundles said it before there was another text than files
    with["promise"]["domains"][0]["made_on"] = "files";
    with["promise"]["domains"][1]["made_on"] = "self-text";
    with["promise"]["domains"][1]["text"] = "what the model wrote";
    EXPECT_NO_THROW(parse());
    with["promise"]["domains"][1]["text"] = 7;
    EXPECT_NE(refusal(signed_text(with)).find("text"), std::string::npos);
    with["promise"]["domains"][1]["text"] = "";
    with["promise"]["domains"][1]["made_on"] = "hearsay";
    EXPECT_NE(refusal(signed_text(with)).find("hearsay"), std::string::npos);
}

TEST(Manifest, EveryLeafIsChecked) {
    // Each number, text and truth value of it in turn becomes a list: refused, but for the free parts.
    const Json flat = stored().flatten();
    int refused = 0;
    for (const auto& leaf : flat.items()) {
        const std::string& place = leaf.key();
        if (place.rfind("/model/config/", 0) == 0 || place == "/digest" || place.rfind("/cache/axes", 0) == 0)
            continue;
        Json other = stored();
        other[Json::json_pointer(place)] = Json::array({Json::array()});
        EXPECT_NE(refusal(signed_text(other)), "nothing was refused") << place;
        ++refused;
    }
    EXPECT_GT(refused, 100);
}

TEST(Manifest, Versions) {
    Json newer = stored();
    newer["format_version"] = 2;
    EXPECT_EQ(refusal(newer.dump()), "B/manifest.json has format version 2; this library reads 1");
    Json other = stored();
    other["format"] = "zip";
    EXPECT_NE(refusal(other.dump()).find("does not say format"), std::string::npos);
}

TEST(Manifest, ByteByByte) {
    // Whatever one byte becomes, the reader says so; or the byte means nothing.
    std::mt19937 random = fixtures::random_numbers();
    const std::string text = fixtures::read(fixtures::vectors("llama.ojfa") / "manifest.json");
    for (int i = 0; i < 300; ++i) {
        std::string altered = text;
        altered[random() % altered.size()] = static_cast<char>(random());
        try {
            parse_manifest(altered, "m");
            EXPECT_EQ(canonical_json(altered, "digest"), canonical_json(text, "digest"));
        } catch (const Failure& failure) {
            EXPECT_EQ(failure.status(), OJFA_ERROR_BUNDLE);
        }
        EXPECT_NE(refusal(text.substr(0, random() % (text.size() - 2))), "nothing was refused");
    }
}

TEST(Manifest, WhatTheCheckpointSaysOfGeneration) {
    // It is checked, and not followed: a caller's options say how text is generated.
    const auto refused = [](const char* name, const Json& value) {
        Json other = stored();
        other["generation"] = {{"temperature", 0.7},
                               {"top_k", 40},
                               {"top_p", 1},
                               {"min_p", nullptr},
                               {"repetition_penalty", 1.1},
                               {"suppress_tokens", {0, 319}}};
        other["model"]["ignored_fields"] = {"brand_new"};
        if (*name) other["generation"][name] = value;
        return refusal(signed_text(other));
    };
    EXPECT_EQ(refused("", nullptr), "nothing was refused");
    const std::pair<const char*, Json> cases[] = {
        {"temperature", 0},
        {"temperature", "x"},
        {"top_k", 0},
        {"top_p", 0},
        {"top_p", 1.5},
        {"min_p", -1},
        {"min_p", 2},
        {"repetition_penalty", 0},
        {"repetition_penalty", 1e7},
        {"suppress_tokens", {320}},
        {"suppress_tokens", nullptr},
        {"suppress_tokens", {-1}},
        {"colour", 1},
    };
    for (const auto& [name, value] : cases)
        EXPECT_NE(refused(name, value).find("is damaged: generation"), std::string::npos)
            << name << " " << value;
}

TEST(Manifest, ValuesThatCantBe) {
    const std::pair<const char*, Json> cases[] = {
        {"/model/spec/blocks", 5},
        {"/model/spec/kv_heads", 3},
        {"/model/spec/rotary_dim", 7},
        {"/model/spec/rotary_dim", 0},
        {"/model/spec/vocab_size", -1},
        {"/auto/exits/2", 4},
        {"/auto/exits/2", 1},
        {"/auto/measure", "luck"},
        {"/cache/max_length", 0},
        {"/cache/max_length", 1e3},
        {"/default/ms_per_token", 0},
        {"/default/speculation/exit", 4},
        {"/golden/0/exit", 9},
        {"/golden/0/prompt_token_ids/0", 320},
        {"/files/tokenizer.json/size", -1},
        {"/files/tokenizer.json/sha256", "00"},
        {"/rotary/cos/shape/0", 3},
        {"/rotary/cos/shape/0", 0},
        {"/model/spec/window", 0},
        {"/model/spec/blocks", Json(std::uint64_t{1} << 63)},
    };
    for (const auto& [place, value] : cases) {
        Json other = stored();
        other[Json::json_pointer(place)] = value;
        EXPECT_NE(refusal(signed_text(other)).find("is damaged"), std::string::npos) << place << " " << value;
    }
}
