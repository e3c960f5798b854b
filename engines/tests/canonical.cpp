#include "bundle/canonical.hpp"

#include <stdexcept>

#include "bundle/sha256.hpp"
#include "fixtures.hpp"

using ojfa::core::canonical_json;
using ojfa::core::sha256_text;

// Left what Python reads, right what json.dumps(…, sort_keys=True, separators=(",", ":")) makes of it.
TEST(Canonical, AsPythonWritesIt) {
    const std::pair<const char*, const char*> cases[] = {
        {R"({ "b" : 1, "a" : [ true, null, false ] })", R"({"a":[true,null,false],"b":1})"},
        {R"({"x": [0.1, 1.0, 1e22, 1e-5, 0.0001, 1e16, 123456789012345680.0, -2.5e-7, -0.0]})",
         R"({"x":[0.1,1.0,1e+22,1e-05,0.0001,1e+16,1.2345678901234568e+17,-2.5e-07,-0.0]})"},
        {R"({"x": [9999999999999998.0, 5e-324, 1.7976931348623157e308, 100.0, 0.30000000000000004]})",
         R"({"x":[9999999999999998.0,5e-324,1.7976931348623157e+308,100.0,0.30000000000000004]})"},
        {R"({"x": [18446744073709551615, -9223372036854775808, 123456789012345678901234567890, -0]})",
         R"({"x":[18446744073709551615,-9223372036854775808,123456789012345678901234567890,0]})"},
        {"{\"ä\": \"é\\u001f\\n\\\"\\\\/\\u007f€\\ud83d\\ude00\"}",
         R"({"\u00e4":"\u00e9\u001f\n\"\\/\u007f\u20ac\ud83d\ude00"})"},
        {R"({"Z":1,"a":2,"é":3,"A":4})", R"({"A":4,"Z":1,"a":2,"\u00e9":3})"},
        {R"({"a":1,"a":2})", R"({"a":2})"},
        {R"({"a":{"digest":1},"digest":"x"})", R"({"a":{"digest":1}})"},
        {"{}", "{}"},
        {R"({"a":[],"b":{}})", R"({"a":[],"b":{}})"},
    };
    for (const auto& [text, expected] : cases) EXPECT_EQ(canonical_json(text, "digest"), expected);
}

TEST(Canonical, RefusesWhatIsNoManifest) {
    for (const char* text :
         {"", "[]", "1", "{", R"({"a":1}x)", R"({"a":"\ud800"})", "\"text\"", R"({"a":NaN})"})
        EXPECT_THROW(canonical_json(text, "digest"), std::runtime_error) << text;
    EXPECT_THROW(canonical_json("{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}", ""),
                 std::runtime_error);
}

TEST(Canonical, DigestsOfStoredBundles) {
    for (const char* name : {"llama.ojfa", "gpt2.ojfa", "phi3.ojfa", "qwen3.ojfa", "gemma3.ojfa"}) {
        const std::string text = fixtures::read(fixtures::vectors(name) / "manifest.json");
        EXPECT_EQ(sha256_text(canonical_json(text, "digest")), fixtures::Json::parse(text)["digest"]);
    }
}

TEST(Sha256, KnownAnswers) {  // FIPS 180-4's example, and the empty text
    EXPECT_EQ(sha256_text("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    EXPECT_EQ(sha256_text(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}
