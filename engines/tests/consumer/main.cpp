#include <iostream>
#include <ojfa/ojfa.hpp>

int main(int, char** argv) {
    const auto model = ojfa::Model::load(argv[1], {0, "reference"});
    auto session = model.session();
    int tokens = 0;
    for (auto step : session.generate({1, 2, 3}, {ojfa::Exit::automatic(), 8})) tokens += step.blocks_run > 0;
    std::cout << "consumer got " << tokens << " tokens\n";
    return tokens ? 0 : 1;
}
