// SHA-256, by OpenSSL.
#pragma once

#include <memory>
#include <string>

namespace ojfa::core {

class Sha256 {
 public:
    Sha256();
    ~Sha256();
    Sha256(const Sha256&) = delete;
    Sha256& operator=(const Sha256&) = delete;

    void add(const void* data, std::size_t size);

    // Of all that was added, once.
    std::string hex();

 private:
    struct State;
    std::unique_ptr<State> state_;
};

// Hex digest of a text.
std::string sha256_text(const std::string& text);

}  // namespace ojfa::core
