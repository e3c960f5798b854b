// Many generations of several threads on one model:  soak BUNDLE BACKEND THREADS GENERATIONS [LIBRARY]
// Each gives what it gave alone, and nothing is held at the end. For machines with a GPU; ctest runs it on
// the reference backend, briefly. At each moment it writes a line of JSON and reads one, so that others can
// look at the memory: when everything that is kept has been made, after as many generations again, and when
// the model is closed.
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <iostream>
#include <optional>
#include <string>
#include <thread>

#include "ojfa/ojfa.hpp"

namespace {

constexpr int KINDS = 6;

ojfa::TokenIds generate(const ojfa::Model& model, int kind) {
    ojfa::GenerateOptions how;
    how.exit = kind % 3 == 0 ? ojfa::Exit::full() : ojfa::Exit(1 + kind % model.blocks());
    if (kind == 3) how.speculation.emplace();
    if (kind == 4) how.temperature = 0.8;
    how.max_new_tokens = 8;
    ojfa::TokenIds prompt;
    for (int i = 0; i <= 3 * kind; ++i) prompt.push_back(1 + (17 * i + kind) % (model.info().vocab_size - 1));
    auto session = model.session();
    ojfa::TokenIds tokens;
    for (const auto& step : session.generate(prompt, how)) tokens.push_back(step.token);
    return tokens;
}

std::uint64_t resident_bytes() {
    std::uint64_t all = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

void tell(const char* moment, int generations, int different, std::uint64_t held) {
    std::cout << "{\"moment\": \"" << moment << "\", \"generations\": " << generations
              << ", \"different\": " << different << ", \"held_bytes\": " << held
              << ", \"resident_bytes\": " << resident_bytes() << "}" << std::endl;
    std::string line;
    std::getline(std::cin, line);
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 5) return std::cerr << "usage: soak BUNDLE BACKEND THREADS GENERATIONS [LIBRARY]\n", 2;
    ojfa::LoadOptions options;
    options.backend = argv[2];
    if (argc > 5) options.backend_library = argv[5];
    std::optional<ojfa::Model> model = ojfa::Model::load(argv[1], options);
    std::vector<ojfa::TokenIds> alone;
    for (int kind = 0; kind < KINDS; ++kind) alone.push_back(generate(*model, kind));
    const int threads = std::stoi(argv[3]), generations = std::stoi(argv[4]);
    std::atomic<int> next{0}, different{0};
    const auto work = [&] {
        for (int i = next++; i < generations; i = next++)
            different += generate(*model, i % KINDS) != alone[static_cast<std::size_t>(i % KINDS)];
    };
    const auto all_at_once = [&] {
        next = 0;
        std::vector<std::thread> running;
        for (int i = 0; i < threads; ++i) running.emplace_back(work);
        for (auto& thread : running) thread.join();
    };
    all_at_once();  // what is kept for later sessions is there after as many at once
    const std::uint64_t held = model->memory();
    tell("warm", generations, different, held);
    all_at_once();
    const std::uint64_t after = model->memory();
    tell("done", 2 * generations, different, after);
    model.reset();
    tell("closed", 2 * generations, different, 0);
    return different || after > held ? 1 : 0;
} catch (const ojfa::Error& error) {
    std::cerr << "error: " << error.what() << "\nhint: " << error.hint() << "\n";
    return 1;
}
