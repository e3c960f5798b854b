// Which backends are taken, and what is said of the others.
#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

namespace {

std::pair<ojfa_status, std::string> refusal(const std::string& backend, const std::string& library) {
    ojfa::LoadOptions options;
    options.backend = backend;
    options.backend_library = library;
    try {
        ojfa::Model::load(fixtures::vectors("llama.ojfa"), options);
    } catch (const ojfa::Error& error) {
        return {error.status(), std::string(error.what()) + "\n" + error.hint()};
    }
    return {OJFA_OK, "nothing was refused"};
}

void expect(const std::pair<ojfa_status, std::string>& said, ojfa_status status, const std::string& part) {
    EXPECT_EQ(said.first, status);
    EXPECT_NE(said.second.find(part), std::string::npos) << said.second;
}

}  // namespace

TEST(Backends, OfAnotherVersionAreRefused) {
    const auto said = refusal("other", OTHER_BACKEND);
    expect(said, OJFA_ERROR_BACKEND, "has interface 4 (version 9.9.9), this library needs 3");
    expect(said, OJFA_ERROR_BACKEND, "install both from the same build");
}

TEST(Backends, OtherLibrariesAreRefused) {
    expect(refusal("other", NO_BACKEND), OJFA_ERROR_BACKEND, "is none of ojfa's");
    expect(refusal("other", "/nowhere/lib.so"), OJFA_ERROR_BACKEND, "can't be loaded");
    expect(refusal("absent", ""), OJFA_ERROR_BACKEND, "libojfa_absent.so");
    expect(refusal("../x", ""), OJFA_ERROR_USAGE, "is not known");
}
