// SHA-256, by OpenSSL.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

namespace ojfa::core {

// Hex digest of a text.
std::string sha256_text(const std::string& text);

// Hex digest of a file, read in pieces; `read` is told the bytes of each. Throws std::runtime_error.
std::string sha256_file(const std::filesystem::path& path, const std::function<void(std::uint64_t)>& read);

}  // namespace ojfa::core
