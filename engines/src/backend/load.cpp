#include <dlfcn.h>

#include <filesystem>
#include <map>
#include <mutex>
#include <vector>

#include "backend/backend.hpp"
#include "failure.hpp"
#include "reference.hpp"

namespace ojfa::core {
namespace {

const char* const HOW_TO_GET_IT =
    "build engines/ with -DTENSORRT_ROOT=… (engines/README.md), or name its file with backend_library";

// Where this library itself lies.
std::filesystem::path own_directory() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void*>(&load_backend), &info) || !info.dli_fname) return {};
    std::error_code ignored;
    return std::filesystem::canonical(info.dli_fname, ignored).parent_path();
}

void* open_library(const std::string& name, const std::string& library) {
    std::vector<std::string> places;
    if (library.empty()) {
        const std::string file = "libojfa_" + name + ".so";
        if (std::filesystem::exists(own_directory() / file)) places.push_back(own_directory() / file);
        places.push_back(file);
    } else {
        places.push_back(library);
    }
    std::string reason;
    for (const std::string& place : places) {
        if (void* handle = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
        if (reason.empty()) reason = dlerror();
    }
    throw backend_failure("backend '" + name + "' can't be loaded: " + reason, HOW_TO_GET_IT);
}

const BackendEntry& shake_hands(void* handle, const std::string& name) {
    using Entry = const BackendEntry* (*)();
    const auto entry = reinterpret_cast<Entry>(dlsym(handle, "ojfa_backend_entry"));
    if (!entry)
        throw backend_failure("the library of backend '" + name + "' is none of ojfa's", HOW_TO_GET_IT);
    const BackendEntry& backend = *entry();
    if (backend.interface != BACKEND_INTERFACE)
        throw backend_failure("the library of backend '" + name + "' has interface " +
                                  std::to_string(backend.interface) + " (version " + backend.version +
                                  "), this library needs " + std::to_string(BACKEND_INTERFACE) +
                                  " (version " + OJFA_VERSION + ")",
                              "install both from the same build of engines/");
    if (backend.name != name)
        throw backend_failure("the library of backend '" + name + "' holds backend '" + backend.name + "'");
    return backend;
}

}  // namespace

const BackendEntry& load_backend(const std::string& name, const std::string& library) {
    if (name == "reference") return reference_backend();
    if (name.empty() || name.find_first_not_of("abcdefghijklmnopqrstuvwxyz") != std::string::npos)
        throw usage_failure("backend '" + name + "' is not known", "known: tensorrt, reference");
    // A backend stays for the life of the process: objects of it may be anywhere.
    static std::mutex mutex;
    static std::map<std::string, const BackendEntry*> loaded;
    const std::lock_guard lock(mutex);
    const BackendEntry*& entry = loaded[name + "\n" + library];
    if (!entry) entry = &shake_hands(open_library(name, library), name);
    return *entry;
}

}  // namespace ojfa::core
