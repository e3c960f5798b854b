#include "bundle/bundle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

const char* const WHOLE = "copy the bundle again whole, or build it again";
const char* const MANIFEST = "manifest.json";

// Whether a name of the manifest stays inside the bundle, spelt the only way it can be.
bool stays_inside(const std::string& name) {
    if (name.empty() || name[0] == '/' || name.find('\\') != std::string::npos ||
        name.find('\0') != std::string::npos)
        return false;
    std::size_t start = 0;
    while (true) {
        const std::size_t end = std::min(name.find('/', start), name.size());
        const std::string part = name.substr(start, end - start);
        if (part.empty() || part == "." || part == "..") return false;
        if (end == name.size()) return true;
        start = end + 1;
    }
}

// Every file below a directory, by its path inside; links are refused.
std::set<std::string> walk(const std::filesystem::path& directory) {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
        const auto kind = entry.symlink_status().type();
        if (kind == std::filesystem::file_type::regular) {
            names.insert(entry.path().lexically_relative(directory).generic_string());
        } else if (kind != std::filesystem::file_type::directory) {
            throw bundle_failure(entry.path().string() +
                                     " is a symbolic link or special file; a bundle holds plain files only",
                                 "use a fresh copy of the bundle");
        }
    }
    return names;
}

}  // namespace

Bundle::Bundle(const std::filesystem::path& directory)
    : manifest_(read_manifest(directory)), files_(directory) {
    hold_files();
    check_references();
    for (const GraphEntry& graph : manifest_.graphs)
        weight_files_.insert(graph.weights.begin(), graph.weights.end());
}

void Bundle::check_contents(Checker& checker, Part part, const Receive& receive) const {
    std::vector<std::pair<std::string, FileEntry>> files;
    for (const auto& file : manifest_.files)
        if ((weight_files_.count(file.first) > 0) == (part == Part::weights)) files.emplace_back(file);
    checker.check(files, receive);
}

std::uint64_t Bundle::bytes() const {
    std::uint64_t total = 0;
    for (const auto& file : manifest_.files) total += file.second.size;
    return total;
}

const EngineSet& Bundle::engines(const std::string& backend) const {
    std::string built;
    for (const EngineSet& each : manifest_.engines) {
        if (each.backend == backend) return each;
        built += (built.empty() ? "" : ", ") + each.backend;
    }
    throw bundle_failure(
        directory().string() + " has no engines for backend '" + backend +
            "' (it has: " + (built.empty() ? "none" : built) + ")",
        "build them with 'ojfa-export build " + directory().string() + " --backend " + backend + "'");
}

std::vector<float> Bundle::tensor(const TensorSlice& slice) const {
    const std::uint64_t size = manifest_.files.at(slice.file).size;
    std::uint64_t count = 1;
    for (const std::int64_t length : slice.shape)
        count = count > size ? count : count * static_cast<std::uint64_t>(length);
    if (slice.offset > size || count > (size - slice.offset) / sizeof(float))
        throw bundle_failure(std::string(MANIFEST) + ": tensor at " + slice.file + " is beyond the file",
                             WHOLE);
    std::vector<float> values(count);
    const std::vector<char> bytes = files_.read(slice.file, slice.offset, count * sizeof(float));
    if (count) std::memcpy(values.data(), bytes.data(), bytes.size());
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); }))
        throw bundle_failure(
            (directory() / slice.file).string() + " holds something else than finite numbers", WHOLE);
    return values;
}

void Bundle::read_graphs() {
    for (const GraphEntry& graph : manifest_.graphs) {
        try {
            const std::vector<char> model = files_.read(graph.file);
            weights_[graph.name] = checked_weights(
                manifest_, graph,
                read_graph({reinterpret_cast<const unsigned char*>(model.data()), model.size()}));
        } catch (const Failure&) {
            throw;
        } catch (const std::runtime_error& error) {
            throw bundle_failure((directory() / graph.file).string() + ": " + error.what(), WHOLE);
        }
    }
    try {
        check_rotary_places(manifest_, weights_.at("embed"));
    } catch (const std::runtime_error& error) {
        throw bundle_failure((directory() / MANIFEST).string() + ": " + error.what(), WHOLE);
    }
}

void Bundle::hold_files() {
    for (const auto& [name, entry] : manifest_.files)
        if (!stays_inside(name))
            throw bundle_failure(
                (directory() / MANIFEST).string() + " names a path that leaves the bundle: '" + name + "'",
                "don't use this bundle: it was altered");
    std::set<std::string> found;
    try {
        found = walk(directory());
    } catch (const std::filesystem::filesystem_error& error) {
        throw bundle_failure(directory().string() + " can't be read: " + error.what(), WHOLE);
    }
    found.erase(MANIFEST);
    for (const auto& [name, entry] : manifest_.files)
        if (!found.count(name) || !files_.hold(name))
            throw bundle_failure(directory().string() + " lacks file '" + name + "'", WHOLE);
    for (const std::string& name : found)
        if (!manifest_.files.count(name))
            throw bundle_failure(
                directory().string() + " holds '" + name + "', which its manifest does not name",
                "remove it, or use a fresh copy of the bundle");
}

void Bundle::check_references() const {
    std::set<std::string> wanted = {"tokenizer.json", "shortcut.safetensors"};
    std::set<std::string> described;
    for (const GraphEntry& graph : manifest_.graphs) {
        wanted.insert(graph.file);
        wanted.insert(graph.weights.begin(), graph.weights.end());
        described.insert(graph.name);
    }
    for (const EngineSet& engines : manifest_.engines)
        for (const auto& [graph, file] : engines.files) wanted.insert(file);
    if (manifest_.rotary) wanted.insert({manifest_.rotary->cosines.file, manifest_.rotary->sines.file});
    for (const std::string& name : wanted)
        if (!manifest_.files.count(name))
            throw bundle_failure(
                (directory() / MANIFEST).string() + " refers to '" + name + "' without its digest", WHOLE);
    const std::vector<std::string> names = graph_names(manifest_.spec.blocks);
    const std::set<std::string> expected(names.begin(), names.end());
    const auto refuse = [&](const std::string& what) {
        throw bundle_failure((directory() / MANIFEST).string() + " names " + what + " other than those of " +
                                 std::to_string(manifest_.spec.blocks) + " blocks",
                             WHOLE);
    };
    if (described != expected || manifest_.graphs.size() != expected.size()) refuse("graphs");
    for (const EngineSet& engines : manifest_.engines) {
        std::set<std::string> built;
        for (const auto& file : engines.files) built.insert(file.first);
        if (built != expected) refuse(engines.backend + " engines");
    }
}

}  // namespace ojfa::core
