#include "bundle/sha256.hpp"

#include <openssl/evp.h>

#include <stdexcept>

namespace ojfa::core {

struct Sha256::State {
    std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context{EVP_MD_CTX_new(), EVP_MD_CTX_free};
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
    if (!state_->context || EVP_DigestInit_ex(state_->context.get(), EVP_sha256(), nullptr) != 1)
        throw std::runtime_error("OpenSSL has no SHA-256");
}

Sha256::~Sha256() = default;

void Sha256::add(const void* data, std::size_t size) {
    EVP_DigestUpdate(state_->context.get(), data, size);
}

std::string Sha256::hex() {
    unsigned char bytes[EVP_MAX_MD_SIZE];
    unsigned count = 0;
    EVP_DigestFinal_ex(state_->context.get(), bytes, &count);
    std::string text;
    for (unsigned i = 0; i < count; ++i) {
        text += "0123456789abcdef"[bytes[i] >> 4];
        text += "0123456789abcdef"[bytes[i] & 15];
    }
    return text;
}

std::string sha256_text(const std::string& text) {
    Sha256 digest;
    digest.add(text.data(), text.size());
    return digest.hex();
}

}  // namespace ojfa::core
