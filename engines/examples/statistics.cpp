// Reads what a session counted, and compares early tokens with the full model:  example_statistics BUNDLE
// BACKEND
#include <iostream>

#include "ojfa/ojfa.hpp"

int main(int argc, char** argv) try {
    if (argc != 3) return std::cerr << "usage: example_statistics BUNDLE BACKEND\n", 2;
    ojfa::LoadOptions options;
    options.backend = argv[2];
    const auto model = ojfa::Model::load(argv[1], options);
    ojfa::SessionOptions watched;
    watched.shadow_share = 0.5;
    auto session = model.session(watched);
    const ojfa::Policy policy{{1}, ojfa::Measure::top, {0.1}};
    for (const auto& step : session.generate({5, 6, 7}, {policy, 16})) (void)step;
    session.run_shadow_checks();

    const auto stats = session.stats();
    for (std::size_t blocks = 1; blocks < stats.exits.size(); ++blocks)
        std::cout << stats.exits[blocks] << " tokens after " << blocks << " blocks\n";
    std::cout << stats.shadow_checks << " early tokens compared, " << stats.shadow_disagreements
              << " differ\n";
    return 0;
} catch (const ojfa::Error& error) {
    std::cerr << "error: " << error.what() << "\nhint: " << error.hint() << "\n";
    return 1;
}
