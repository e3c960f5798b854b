// Sessions of many threads on one model.
#include <atomic>
#include <chrono>
#include <thread>

#include "fixtures.hpp"
#include "ojfa/ojfa.hpp"

namespace {

ojfa::Model open() {
    return ojfa::Model::load(fixtures::bundle("llama.ojfa"), {0, fixtures::BACKEND});
}

ojfa::TokenIds tokens_of(const ojfa::Model& model, int which, int count = 16) {
    const ojfa::Exit exits[] = {ojfa::Exit::full(), 1, 2, ojfa::Exit::automatic(), 3, ojfa::Exit::planned()};
    ojfa::GenerateOptions options;
    options.exit = exits[which % 6];
    options.max_new_tokens = count;
    options.temperature = which % 2 ? 0.8 : 0.0;
    options.seed = static_cast<std::uint64_t>(which);
    auto session = model.session();
    ojfa::TokenIds tokens;
    for (const auto& step : session.generate({which + 1, 2 * which + 1}, options))
        tokens.push_back(step.token);
    return tokens;
}

}  // namespace

TEST(Threads, EightSessionsAtOnceGiveWhatEachGivesAlone) {
    constexpr int SESSIONS = 8;
    const auto alone = open();
    std::vector<ojfa::TokenIds> expected, actual(SESSIONS);
    for (int i = 0; i < SESSIONS; ++i) expected.push_back(tokens_of(alone, i));
    const auto model = open();  // blocks are loaded by all threads at once
    std::vector<std::thread> threads;
    for (int i = 0; i < SESSIONS; ++i)
        threads.emplace_back([&, i] { actual[static_cast<std::size_t>(i)] = tokens_of(model, i); });
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(actual, expected);
}

// A session alone, one that joins it, one that ends while another joins.
TEST(Threads, SessionsThatComeAndGo) {
    constexpr int THREADS = 3, SESSIONS = 25;
    const auto model = open();
    std::vector<ojfa::TokenIds> expected;
    for (int which = 0; which < 6; ++which) expected.push_back(tokens_of(model, which, 3));
    std::atomic<int> different{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < THREADS; ++thread)
        threads.emplace_back([&, thread] {
            std::minstd_rand random{std::random_device{}()};
            for (int i = 0; i < SESSIONS; ++i) {
                const int which = (thread + i) % 6;
                if (tokens_of(model, which, 3) != expected[static_cast<std::size_t>(which)]) ++different;
                std::this_thread::sleep_for(std::chrono::milliseconds(random() % 40));
            }
        });
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(different, 0);
}

TEST(Threads, CancellingFromAnother) {
    const auto model = open();
    auto session = model.session();
    std::atomic<bool> ended{false};
    std::thread canceller([&] {
        while (!ended) {
            session.cancel();
            std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
    });
    int cancelled = 0, done = 0;
    for (int i = 0; i < 300; ++i) {
        try {
            session.rewind(0);
            session.advance({{5, 6, 7, 8}});
            ++done;
            EXPECT_EQ(session.lengths()[0], 4);
        } catch (const ojfa::Error& error) {
            EXPECT_EQ(error.status(), OJFA_ERROR_CANCELLED);
            EXPECT_EQ(session.lengths()[0], 0);
            ++cancelled;
        }
    }
    ended = true;
    canceller.join();
    EXPECT_EQ(cancelled + done, 300);
    EXPECT_GT(cancelled, 0);
}

TEST(Threads, OneSessionIsForOneThreadAtATime) {
    const auto model = open();
    auto session = model.session();
    struct Waiting {
        std::atomic<bool> inside{false}, leave{false};
    } waiting;
    const auto wait = [](void* user, const ojfa_event*) {
        auto* const self = static_cast<Waiting*>(user);
        self->inside = true;
        while (!self->leave) std::this_thread::yield();
    };
    ASSERT_EQ(ojfa_session_listen(session.handle(), wait, &waiting), OJFA_OK);
    std::thread busy([&] { session.advance({{5}}); });
    while (!waiting.inside) std::this_thread::yield();
    std::int32_t length = 0;
    EXPECT_EQ(ojfa_session_lengths(session.handle(), &length), OJFA_ERROR_BUSY);
    EXPECT_NE(std::string(ojfa_last_error()).find("another thread"), std::string::npos);
    EXPECT_EQ(ojfa_session_cancel(session.handle()), OJFA_OK);
    EXPECT_EQ(ojfa_session_close(session.handle()), OJFA_OK);  // alive until the call returns
    waiting.leave = true;
    busy.join();
    EXPECT_EQ(ojfa_session_lengths(session.handle(), &length), OJFA_ERROR_USAGE);
}
