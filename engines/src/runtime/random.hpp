// NumPy's random numbers, so that a seed gives the same tokens here and in Python: numpy.random.SeedSequence
// and PCG64 (O'Neill, HMC-CS-2014-0905; NumPy's default_rng).
#pragma once

#include <cstdint>
#include <vector>

namespace ojfa::core {

class Random {
 public:
    // As numpy.random.default_rng(numpy.random.SeedSequence(entropy, spawn_key=spawn_key)); non-negative
    // integers as lists of their 32-bit words.
    explicit Random(const std::vector<std::uint64_t>& entropy,
                    const std::vector<std::uint32_t>& spawn_key = {});

    // As Generator.random(): 53 bits, in [0, 1).
    double uniform();

    // As Generator.choice(len(weights), p=weights): an index, drawn by weights that sum to 1 (or nearly).
    std::size_t choice(const std::vector<double>& weights) { return choice(weights, uniform()); }

    // The index that a number from [0, 1) stands for.
    static std::size_t choice(const std::vector<double>& weights, double draw);

 private:
    std::uint64_t next();

    unsigned __int128 state_, increment_;
};

}  // namespace ojfa::core
