// Handles of the C interface: numbers, so that one that is closed or made up is refused instead of followed.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "failure.hpp"
#include "runtime/generation.hpp"
#include "runtime/model.hpp"

namespace ojfa::capi {

using core::Failure;
using core::usage_failure;

inline std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

// What handles of one kind stand for. What is removed lives until its last user lets go of it. Any thread.
template <class T>
class Registry {
 public:
    explicit Registry(const char* kind) : kind_(kind) {}

    std::uint64_t add(std::shared_ptr<T> object) {
        const std::uint64_t id = next_id();
        const std::lock_guard lock(mutex_);
        objects_[id] = std::move(object);
        return id;
    }

    std::shared_ptr<T> get(std::uint64_t id) const {
        const std::lock_guard lock(mutex_);
        const auto found = objects_.find(id);
        if (found == objects_.end()) refuse(id);
        return found->second;
    }

    std::shared_ptr<T> remove(std::uint64_t id) {
        const std::lock_guard lock(mutex_);
        const auto found = objects_.find(id);
        if (found == objects_.end()) refuse(id);
        std::shared_ptr<T> object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

 private:
    [[noreturn]] void refuse(std::uint64_t id) const {
        throw usage_failure(std::string("the handle of a ") + kind_ +
                            (id ? " is closed or was never one" : " is null"));
    }

    const char* kind_;
    mutable std::mutex mutex_;
    std::unordered_map<std::uint64_t, std::shared_ptr<T>> objects_;
};

// A session, and what it needs to be alive.
struct OpenSession {
    std::shared_ptr<core::Model> model;
    std::unique_ptr<core::Session> session;
    std::mutex in_use;
};

struct OpenGeneration {
    std::shared_ptr<OpenSession> session;
    std::unique_ptr<core::Generation> generation;
};

// Never destroyed: at the end of a process the drivers beneath may be gone already.
Registry<core::Model>& models();
Registry<OpenSession>& sessions();
Registry<OpenGeneration>& generations();

// A session for the length of a call. Throws Failure where another thread has it.
class Borrowed {
 public:
    explicit Borrowed(std::shared_ptr<OpenSession> open)
        : open_(std::move(open)), lock_(open_->in_use, std::try_to_lock) {
        if (!lock_.owns_lock())
            throw Failure(OJFA_ERROR_BUSY, "another thread is using the session",
                          "use a session from one thread at a time, or open one for each");
    }
    explicit Borrowed(ojfa_session session) : Borrowed(sessions().get(session.id)) {}

    core::Session& operator*() const { return *open_->session; }
    core::Session* operator->() const { return open_->session.get(); }
    core::Model& model() const { return *open_->model; }
    const std::shared_ptr<OpenSession>& open() const { return open_; }

 private:
    std::shared_ptr<OpenSession> open_;
    std::unique_lock<std::mutex> lock_;
};

// Remembers an exception as the thread's last error, and gives its status. To be called in a handler.
ojfa_status caught() noexcept;

// Runs a function of the interface; no exception leaves it.
template <class Body>
ojfa_status guarded(Body&& body) noexcept {
    try {
        body();
        return OJFA_OK;
    } catch (...) {
        return caught();
    }
}

inline void need(const void* pointer, const char* name) {
    if (!pointer) throw usage_failure(std::string(name) + " is null");
}

// A caller's struct of options that begins with its size: filled up with the defaults of what it lacks.
template <class Options>
Options taken(const Options* options, void (*init)(Options*)) {
    Options result;
    init(&result);
    if (!options) return result;
    if (options->struct_size != sizeof(Options))
        throw usage_failure(
            "options have " + std::to_string(options->struct_size) + " bytes, this library's have " +
                std::to_string(sizeof(Options)),
            "set them up by the struct's _init function, with the headers of this library's version");
    return *options;
}

core::Policy policy_of(const ojfa_policy& policy);
core::TokenRows rows_of(const core::Session& session, const ojfa_tokens* tokens);

}  // namespace ojfa::capi
