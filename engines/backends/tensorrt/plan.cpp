#include "plan.hpp"

#include <filesystem>
#include <limits>

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

std::map<std::string, std::string> plain_files(core::Fields fields, const std::filesystem::path& folder,
                                               const core::Manifest& manifest) {
    std::map<std::string, std::string> files;
    for (const auto& member : fields.json().items()) {
        files[member.key()] = plain(fields, member.key());
        if (!manifest.files.count((folder / files[member.key()]).generic_string()))
            fields.fail(member.key(), "the manifest does not name '" + files[member.key()] + "'");
    }
    return files;
}

// A weight, which is where the graph has it: what holds for that place holds for this.
Weight read_weight(core::Fields fields, const std::string& name, const core::WeightPlaces& places) {
    Weight weight;
    weight.file = "graphs/" + plain(fields, "file");
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
    const auto place = places.find(name);
    if (place == places.end() || weight.file != place->second.file || weight.offset != place->second.offset ||
        weight.shape != place->second.shape || (weight.precision == "fp16") != place->second.half)
        fields.fail("file", "the graph has another weight, or has it elsewhere");
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

Plan read_plan(const core::Bundle& bundle, const std::string& graph, const std::string& file) {
    const std::vector<char> text = bundle.files().read(file);
    try {
        const core::Json raw = core::Json::parse(text.begin(), text.end());
        core::Fields fields(raw, "");
        Plan plan;
        plan.precision = fields.one_of("precision", {"fp32", "fp16"});
        const std::filesystem::path folder = std::filesystem::path(file).parent_path();
        plan.engines = plain_files(fields.object("engines"), folder, bundle.manifest());
        plan.kernels = plain_files(fields.object("kernels"), folder, bundle.manifest());
        core::Fields weights = fields.object("weights");
        for (const auto& member : weights.json().items())
            plan.weights[member.key()] =
                read_weight(weights.object(member.key()), member.key(), bundle.weights(graph));
        fields.maybe("activation_bytes");  // of what a request takes; bundles of before 0.1 lack it
        fields.maybe("interface");         // kernels.cpp looks at their parameters
        fields.maybe("products");          // of passes of many tokens, which engines run here
        fields.done();
        return plan;
    } catch (const std::exception& error) {
        throw core::bundle_failure((bundle.directory() / file).string() + " can't be read: " + error.what(),
                                   REBUILD);
    }
}

}  // namespace ojfa::tensorrt
