// A service's loop: requests with an exit each, a thread and a session each, on one model.
//   example_batch_service BUNDLE BACKEND
#include <iostream>
#include <mutex>
#include <thread>

#include "ojfa/ojfa.hpp"

struct Request {
    ojfa::TokenIds prompt;
    ojfa::Exit exit;
};

int main(int argc, char** argv) try {
    if (argc != 3) return std::cerr << "usage: example_batch_service BUNDLE BACKEND\n", 2;
    ojfa::LoadOptions options;
    options.backend = argv[2];
    const auto model = ojfa::Model::load(argv[1], options);
    const std::vector<Request> requests = {
        {{5, 6, 7}, ojfa::Exit::full()}, {{8, 9}, 1}, {{4}, model.blocks()}};
    std::mutex output;
    std::vector<std::thread> threads;
    for (const Request& request : requests)
        threads.emplace_back([&model, &output, &request] {
            auto session = model.session();
            ojfa::GenerateOptions how{request.exit, 8};
            for (const auto& step : session.generate(request.prompt, how)) {
                const std::lock_guard lock(output);
                std::cout << "exit " << request.exit.number() << ": " << step.token << "\n";
            }
        });
    for (auto& thread : threads) thread.join();
    return 0;
} catch (const ojfa::Error& error) {
    std::cerr << "error: " << error.what() << "\nhint: " << error.hint() << "\n";
    return 1;
}
