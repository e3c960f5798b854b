// Generates with exits decided per token:  example_generate BUNDLE BACKEND [ID...]
#include <iostream>

#include "ojfa/ojfa.hpp"

int main(int argc, char** argv) try {
    if (argc < 3) return std::cerr << "usage: example_generate BUNDLE BACKEND [ID...]\n", 2;
    ojfa::LoadOptions options;
    options.backend = argv[2];
    const auto model = ojfa::Model::load(argv[1], options);
    ojfa::TokenIds prompt = {1};  // as the model's tokenizer gives them
    for (int i = 3; i < argc; ++i) prompt.push_back(std::stoi(argv[i]));

    auto session = model.session();
    ojfa::GenerateOptions how;
    how.exit = model.info().auto_exits < 0 ? ojfa::Exit::full() : ojfa::Exit::automatic();
    how.max_new_tokens = 16;
    for (const auto& step : session.generate(prompt, how))
        std::cout << step.token << " after " << step.blocks_run << " blocks\n";
    return 0;
} catch (const ojfa::Error& error) {
    std::cerr << "error: " << error.what() << "\nhint: " << error.hint() << "\n";
    return 1;
}
