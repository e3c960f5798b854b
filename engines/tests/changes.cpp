// Bundles that change while a process uses them: what is read later is what was checked, or it is said.
#include <sys/resource.h>
#include <sys/stat.h>

#include <fstream>
#include <functional>

#include "tried.hpp"

using namespace tried;
using fixtures::Copy;
using fixtures::Json;

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
    // A sanitizer opens a pipe where it sees a class for the first time: all of them are seen here.
    Model another(fixtures::vectors("llama.ojfa"), reference(false));
    tokens_of(another);
    try {
        Model nowhere(fixtures::vectors("none.ojfa"), reference(false));
    } catch (const Failure& failure) {
        expect_proper(failure);
    }
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
    const Json files = fixtures::read_json(copy.bundle / "manifest.json")["files"];
    bool changed = false;
    LoadOptions options = reference();
    options.progress = [&](std::uint64_t, std::uint64_t) {
        if (changed) return;
        changed = true;
        for (const auto& file : files.items()) std::filesystem::resize_file(copy.bundle / file.key(), 7);
    };
    try {
        Model model(copy.bundle, options);
        FAIL() << "nothing was refused";
    } catch (const Failure& failure) {
        expect_proper(failure);
        expect_says(failure.what(), CHANGED);
    }
}
