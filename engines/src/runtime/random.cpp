#include "runtime/random.hpp"

#include <algorithm>
#include <array>

namespace ojfa::core {
namespace {

using Wide = unsigned __int128;

constexpr std::size_t POOL = 4;
constexpr Wide MULTIPLIER = (Wide{2549297995355413924u} << 64) | 4865540595714422341u;

// The mixing functions of SeedSequence; the constants are NumPy's.
class SeedPool {
 public:
    explicit SeedPool(const std::vector<std::uint32_t>& entropy) {
        for (std::size_t i = 0; i < POOL; ++i) pool_[i] = hash(i < entropy.size() ? entropy[i] : 0);
        for (std::size_t from = 0; from < POOL; ++from)
            for (std::size_t to = 0; to < POOL; ++to)
                if (from != to) pool_[to] = mix(pool_[to], hash(pool_[from]));
        for (std::size_t from = POOL; from < entropy.size(); ++from)
            for (std::uint32_t& to : pool_) to = mix(to, hash(entropy[from]));
    }

    // generate_state(4, uint64)
    std::array<std::uint64_t, 4> state() const {
        std::array<std::uint64_t, 4> words{};
        std::uint32_t constant = 0x8b51f9ddu;
        for (std::size_t i = 0; i < 8; ++i) {
            std::uint32_t value = pool_[i % POOL] ^ constant;
            constant *= 0x58f38dedu;
            value *= constant;
            value ^= value >> 16;
            words[i / 2] |= std::uint64_t{value} << (32 * (i % 2));
        }
        return words;
    }

 private:
    std::uint32_t hash(std::uint32_t value) {
        value ^= constant_;
        constant_ *= 0x931e8875u;
        value *= constant_;
        return value ^ value >> 16;
    }

    static std::uint32_t mix(std::uint32_t x, std::uint32_t y) {
        const std::uint32_t mixed = 0xca01f9ddu * x - 0x4973f715u * y;
        return mixed ^ mixed >> 16;
    }

    std::array<std::uint32_t, POOL> pool_{};
    std::uint32_t constant_ = 0x43b0d7e5u;
};

std::vector<std::uint32_t> words_of(const std::vector<std::uint64_t>& numbers) {
    std::vector<std::uint32_t> words;
    for (const std::uint64_t number : numbers) {
        words.push_back(static_cast<std::uint32_t>(number));
        if (number >> 32) words.push_back(static_cast<std::uint32_t>(number >> 32));
    }
    return words;
}

}  // namespace

Random::Random(const std::vector<std::uint64_t>& entropy, const std::vector<std::uint32_t>& spawn_key) {
    std::vector<std::uint32_t> words = words_of(entropy);
    if (!spawn_key.empty()) {
        words.resize(std::max(words.size(), POOL), 0);  // so that a key is never taken for entropy
        words.insert(words.end(), spawn_key.begin(), spawn_key.end());
    }
    const std::array<std::uint64_t, 4> seed = SeedPool(words).state();
    increment_ = ((Wide{seed[2]} << 64 | seed[3]) << 1) | 1;
    state_ = increment_ + (Wide{seed[0]} << 64 | seed[1]);
    state_ = state_ * MULTIPLIER + increment_;
}

std::uint64_t Random::next() {
    state_ = state_ * MULTIPLIER + increment_;
    const auto high = static_cast<std::uint64_t>(state_ >> 64), low = static_cast<std::uint64_t>(state_);
    const auto turn = static_cast<unsigned>(high >> 58);
    const std::uint64_t folded = high ^ low;
    return folded >> turn | folded << (-turn & 63u);
}

double Random::uniform() {
    return static_cast<double>(next() >> 11) * 0x1p-53;
}

std::size_t Random::choice(const std::vector<double>& weights, double draw) {
    std::vector<double> sums(weights.size());
    double sum = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) sums[i] = sum += weights[i];
    for (double& each : sums) each /= sum;
    const auto found = std::upper_bound(sums.begin(), sums.end(), draw);
    return std::min<std::size_t>(static_cast<std::size_t>(found - sums.begin()), weights.size() - 1);
}

}  // namespace ojfa::core
