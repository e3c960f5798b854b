// What goes wrong: a status for programs, a sentence and a hint for people.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "ojfa/ojfa.h"

namespace ojfa::core {

// The one exception inside the library; the C interface turns it into a status and messages. It crosses the
// border to a backend's shared library, so that its type is visible there.
class __attribute__((visibility("default"))) Failure : public std::runtime_error {
 public:
    Failure(ojfa_status status, const std::string& message, std::string hint = {})
        : std::runtime_error(message), status_(status), hint_(std::move(hint)) {}

    ojfa_status status() const { return status_; }
    const std::string& hint() const { return hint_; }

 private:
    ojfa_status status_;
    std::string hint_;
};

// An argument that can't be right whatever the files hold.
inline Failure usage_failure(const std::string& message, std::string hint = {}) {
    return Failure(OJFA_ERROR_USAGE, message, std::move(hint));
}

// A bundle that is incomplete, altered, or of another version.
inline Failure bundle_failure(const std::string& message, std::string hint) {
    return Failure(OJFA_ERROR_BUNDLE, message, std::move(hint));
}

// A backend that is missing, or that can't run what it was given.
inline Failure backend_failure(const std::string& message, std::string hint = {}) {
    return Failure(OJFA_ERROR_BACKEND, message, std::move(hint));
}

}  // namespace ojfa::core
