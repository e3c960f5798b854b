#include "plan.hpp"

#include <fstream>
#include <limits>
#include <sstream>

#include "bundle/fields.hpp"
#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

const char* const REBUILD = "rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt'";
constexpr std::int64_t ANY = std::numeric_limits<std::int64_t>::max();

// A name in the plan's own directory, or in that of the weights.
std::string plain(core::Fields& fields, const std::string& name) {
    std::string file = fields.text(name);
    if (file.empty() || file[0] == '.' || file.find('/') != std::string::npos)
        fields.fail(name, "it names a file elsewhere");
    return file;
}

std::map<std::string, std::string> plain_files(core::Fields fields) {
    std::map<std::string, std::string> files;
    for (const auto& member : fields.json().items()) files[member.key()] = plain(fields, member.key());
    return files;
}

Weight read_weight(core::Fields fields, const std::map<std::string, core::FileEntry>& files) {
    Weight weight;
    weight.file = plain(fields, "file");
    weight.offset = static_cast<std::uint64_t>(fields.integer("offset", 0, ANY));
    for (const std::int32_t length : fields.integers("shape")) {
        if (length < 1) fields.fail("shape", "a length is below 1");
        weight.shape.push_back(length);
    }
    weight.precision = fields.one_of("precision", {"fp32", "fp16"});
    weight.transposed = fields.truth("transposed");
    fields.done();
    if (weight.transposed && weight.shape.size() != 2)
        fields.fail("shape", "only a matrix can be transposed");
    const auto entry = files.find("graphs/" + weight.file);
    if (entry == files.end()) fields.fail("file", "the manifest does not name it");
    const std::uint64_t size = entry->second.size;
    if (weight.count() > size || weight.bytes() > size || weight.offset > size - weight.bytes())
        fields.fail("offset", "the weight is beyond its file");
    return weight;
}

}  // namespace

std::uint64_t Weight::count() const {
    std::uint64_t count = 1;
    for (const std::int64_t length : shape) {
        const auto each = static_cast<std::uint64_t>(length);
        if (count > (std::uint64_t{1} << 48) / each) return std::uint64_t{1} << 48;  // more than any file has
        count *= each;
    }
    return count;
}

Plan read_plan(const std::filesystem::path& path, const std::map<std::string, core::FileEntry>& files) {
    try {
        std::ifstream file(path, std::ios::binary);
        std::ostringstream text;
        text << file.rdbuf();
        const core::Json raw = core::Json::parse(text.str());
        core::Fields fields(raw, "");
        Plan plan;
        plan.precision = fields.one_of("precision", {"fp32", "fp16"});
        plan.engines = plain_files(fields.object("engines"));
        plan.kernels = plain_files(fields.object("kernels"));
        core::Fields weights = fields.object("weights");
        for (const auto& member : weights.json().items())
            plan.weights[member.key()] = read_weight(weights.object(member.key()), files);
        fields.maybe("activation_bytes");  // of what a request takes; bundles of before 0.1 lack it
        fields.done();
        return plan;
    } catch (const std::exception& error) {
        throw core::bundle_failure(path.string() + " can't be read: " + error.what(), REBUILD);
    }
}

}  // namespace ojfa::tensorrt
