// A backend of another version than the library's: it must be refused before anything of it is used.
#include "backend/backend.hpp"

extern "C" __attribute__((visibility("default"))) const ojfa::core::BackendEntry* ojfa_backend_entry() {
    static const ojfa::core::BackendEntry entry = {ojfa::core::BACKEND_INTERFACE + 1, "other", "9.9.9",
                                                   nullptr};
    return &entry;
}
