// How much memory a model and its sessions hold on their device, and how much they may.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "failure.hpp"

namespace ojfa::core {

// Any thread.
class Account {
 public:
    explicit Account(std::uint64_t limit) : limit_(limit) {}

    // Throws Failure where it would be more than the limit.
    void take(std::uint64_t bytes) {
        const std::uint64_t held = held_.fetch_add(bytes) + bytes;
        if (!limit_ || held <= limit_) return;
        held_ -= bytes;
        throw Failure(
            OJFA_ERROR_OUT_OF_MEMORY,
            std::to_string(bytes) + " bytes more are needed, and of the limit of " + std::to_string(limit_) +
                " bytes " + std::to_string(held - bytes) + " are in use",
            "use fewer sequences, a shorter cache, or an earlier fixed exit: blocks past it take no memory");
    }
    void give_back(std::uint64_t bytes) { held_ -= bytes; }
    std::uint64_t held() const { return held_; }

 private:
    const std::uint64_t limit_;  // 0: none
    std::atomic<std::uint64_t> held_{0};
};

// A part of an account, given back at its end.
class Taken {
 public:
    Taken(Account& account, std::uint64_t bytes) : account_(account), bytes_(bytes) { account.take(bytes); }
    ~Taken() { account_.give_back(bytes_); }
    Taken(const Taken&) = delete;
    Taken& operator=(const Taken&) = delete;

 private:
    Account& account_;
    std::uint64_t bytes_;
};

}  // namespace ojfa::core
