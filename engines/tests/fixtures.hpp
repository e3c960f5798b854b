// What tests share: the stored bundles, copies of them, fresh random numbers.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

namespace fixtures {

using Json = nlohmann::json;
namespace fs = std::filesystem;

inline fs::path vectors(const std::string& name) {
    return fs::path(VECTORS) / name;
}

inline std::string read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

inline void write(const fs::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

inline Json read_json(const fs::path& path) {
    return Json::parse(read(path));
}

// A directory that is gone when the test ends.
class TemporaryDirectory {
 public:
    TemporaryDirectory() {
        static std::atomic<int> count{0};
        path =
            fs::temp_directory_path() / ("ojfa-" + std::to_string(getpid()) + "-" + std::to_string(count++));
        fs::create_directories(path);
    }
    ~TemporaryDirectory() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

    fs::path path;
};

// A stored bundle that may be damaged.
struct Copy : TemporaryDirectory {
    explicit Copy(const std::string& name = "llama.ojfa") : bundle(path / name) {
        fs::copy(vectors(name), bundle, fs::copy_options::recursive);
    }
    fs::path bundle;
};

// The backend that tests run on, and a stored bundle that has engines for it.
#ifdef OJFA_STAND_IN
constexpr const char* BACKEND = "tensorrt";
fs::path bundle(const std::string& name);
#else
constexpr const char* BACKEND = "reference";
inline fs::path bundle(const std::string& name) {
    return vectors(name);
}
#endif

// Fresh in every run; OJFA_TEST_SEED repeats one.
inline std::mt19937 random_numbers() {
    const char* const given = std::getenv("OJFA_TEST_SEED");
    const unsigned seed = given ? static_cast<unsigned>(std::stoul(given)) : std::random_device()();
    std::cout << "OJFA_TEST_SEED=" << seed << std::endl;  // whatever comes
    return std::mt19937(seed);
}

}  // namespace fixtures
