// Fuzzes the manifest reader: whatever the bytes, a manifest or a Failure of a bundle, in bounds and in
// little time. An input is a manifest whose digest is put right, so that what lies behind that check is
// reached too.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "bundle/canonical.hpp"
#include "bundle/manifest.hpp"
#include "bundle/sha256.hpp"
#include "failure.hpp"

namespace {

void read(const std::string& text) {
    try {
        ojfa::core::parse_manifest(text, "manifest.json");
    } catch (const ojfa::core::Failure& failure) {
        if (failure.status() != OJFA_ERROR_BUNDLE) __builtin_trap();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string text(reinterpret_cast<const char*>(data), size);
    read(text);
    nlohmann::json manifest = nlohmann::json::parse(text, nullptr, false);
    if (!manifest.is_object()) return 0;
    try {
        manifest["digest"] = ojfa::core::sha256_text(ojfa::core::canonical_json(manifest.dump(), "digest"));
    } catch (const std::exception&) {
        return 0;  // nested too deeply
    }
    read(manifest.dump());
    return 0;
}
