#include <new>

#include "capi/handles.hpp"

namespace ojfa::capi {
namespace {

struct Last {
    std::string message, hint;
};
thread_local Last last;

ojfa_status remember(ojfa_status status, const std::string& message, const std::string& hint) noexcept {
    try {
        last = {message, hint};
    } catch (...) {
        last.message.clear();
        last.hint.clear();
    }
    return status;
}

}  // namespace

ojfa_status caught() noexcept {
    try {
        throw;
    } catch (const Failure& failure) {
        return remember(failure.status(), failure.what(), failure.hint());
    } catch (const std::bad_alloc&) {
        return remember(OJFA_ERROR_OUT_OF_MEMORY, "the host's memory ran out", "");
    } catch (const std::exception& error) {
        return remember(OJFA_ERROR_INTERNAL, error.what(), "please report this");
    } catch (...) {
        return remember(OJFA_ERROR_INTERNAL, "an unknown exception", "please report this");
    }
}

}  // namespace ojfa::capi

const char* ojfa_version(void) {
    return OJFA_VERSION;
}
const char* ojfa_last_error(void) {
    return ojfa::capi::last.message.c_str();
}
const char* ojfa_last_hint(void) {
    return ojfa::capi::last.hint.c_str();
}
