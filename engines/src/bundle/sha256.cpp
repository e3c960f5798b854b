#include "bundle/sha256.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace ojfa::core {
namespace {

constexpr std::size_t PIECE = 1 << 20;

class Digest {
 public:
    Digest() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1)
            throw std::runtime_error("OpenSSL has no SHA-256");
    }

    void add(const void* data, std::size_t size) { EVP_DigestUpdate(context_.get(), data, size); }

    std::string hex() {
        unsigned char bytes[EVP_MAX_MD_SIZE];
        unsigned count = 0;
        EVP_DigestFinal_ex(context_.get(), bytes, &count);
        std::string text;
        for (unsigned i = 0; i < count; ++i) {
            text += "0123456789abcdef"[bytes[i] >> 4];
            text += "0123456789abcdef"[bytes[i] & 15];
        }
        return text;
    }

 private:
    std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context_;
};

class File {
 public:
    explicit File(const std::filesystem::path& path) : handle_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (handle_ < 0) throw std::runtime_error(path.string() + ": " + std::strerror(errno));
    }
    ~File() { ::close(handle_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    std::size_t read(void* buffer, std::size_t size) {
        const ssize_t count = ::read(handle_, buffer, size);
        if (count < 0) throw std::runtime_error(std::strerror(errno));
        return static_cast<std::size_t>(count);
    }

 private:
    int handle_;
};

}  // namespace

std::string sha256_text(const std::string& text) {
    Digest digest;
    digest.add(text.data(), text.size());
    return digest.hex();
}

std::string sha256_file(const std::filesystem::path& path, const std::function<void(std::uint64_t)>& read) {
    Digest digest;
    File file(path);
    std::vector<char> buffer(PIECE);
    while (const std::size_t count = file.read(buffer.data(), buffer.size())) {
        digest.add(buffer.data(), count);
        read(count);
    }
    return digest.hex();
}

}  // namespace ojfa::core
