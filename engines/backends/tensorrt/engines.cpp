#include "engines.hpp"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "cache.hpp"
#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

const char* const REBUILD = "rebuild them here with 'ojfa-export build BUNDLE --backend tensorrt'";

// "10.16.1" of "10.16.1.11": Python's package names the build as well.
std::string three_numbers(const std::string& version) {
    std::size_t end = 0;
    for (int dots = 0; end < version.size(); ++end)
        if (version[end] == '.' && ++dots == 3) break;
    return version.substr(0, end);
}

CUdeviceptr address_in(const Arrays& arrays, const std::string& name) {
    const auto found = arrays.find(name);
    return found == arrays.end() ? 0 : found->second.address();
}

const Array& array_in(const Arrays& arrays, const std::string& name) {
    const auto found = arrays.find(name);
    if (found == arrays.end())
        throw core::bundle_failure("the engines have no weight '" + name + "'", REBUILD);
    return found->second;
}

const Weight& weight_in(const Plan& plan, const std::string& name) {
    const auto found = plan.weights.find(name);
    if (found == plan.weights.end())
        throw core::bundle_failure("the engines have no weight '" + name + "'", REBUILD);
    return found->second;
}

// Refuses models with parts that this backend doesn't run.
const core::ModelSpec& checked(const core::ModelSpec& spec) {
    const std::pair<const char*, bool> parts[] = {
        {"norms after attention and MLP", spec.norms_are(core::NormPlace::after)},
        {"attention and MLP side by side", spec.parallel},
        {"norms over all heads of queries and of keys", spec.qk_norm == core::QkNorm::projection},
        {"sliding windows in some blocks only", !spec.windowed.empty()},
        {"two sets of rotations", !spec.rotated_second.empty()},
        {"softcaps", spec.attention_softcap || spec.logit_softcap}};
    for (const auto& [part, there] : parts)
        if (there)
            throw core::backend_failure(
                std::string("this model has ") + part + ", which the TensorRT backend doesn't run",
                "open it with the backend 'reference', or run it in Python");
    return spec;
}

}  // namespace

TensorRtEngines::TensorRtEngines(const core::Bundle& bundle, const core::OpenOptions& options)
    : spec(checked(bundle.manifest().spec)),
      device(options.device, options.memory_limit),
      bundle_(bundle),
      checked_(device) {
    const core::EngineSet& engines = bundle.engines("tensorrt");
    check_built_for(engines);
    for (const auto& [graph, file] : engines.files) {
        plans_[graph] = read_plan(bundle, graph, file);
        folder_ = std::filesystem::path(file).parent_path().generic_string();
    }
    const Plan& embed = plans_.at("embed");
    precision = embed.precision;
    if (precision != bundle.manifest().precision)
        throw core::bundle_failure(
            "the engines are in " + precision + ", their bundle in " + bundle.manifest().precision, REBUILD);
    element_bytes = precision == "fp16" ? 2 : 4;
    if (precision == "fp16") most_tiled_ = most_tiled_tokens(spec, device);
    for (const auto& [kind, file] : embed.kernels)
        kernels[kind] = std::make_unique<Kernels>(device, bundle.files(), beside_plans(file));
    for (const std::string& kind : {precision, std::string("fp32")})
        if (!kernels.count(kind))
            throw core::bundle_failure("the engines have no kernels for " + kind, REBUILD);
    store_ = std::make_unique<WeightStore>(device, bundle.files(), kernels);
    if (const auto& tables = bundle.manifest().rotary)
        for (const auto* table : {&tables->cosines, &tables->sines})
            rotary_.push_back(store_->upload(bundle.tensor(*table)));
}

void TensorRtEngines::check_built_for(const core::EngineSet& engines) const {
    if (const auto cache = engines.built_with.find("cache"); cache != engines.built_with.end())
        throw core::backend_failure("the TensorRT engines keep keys and values in " + cache->second +
                                        ", which the C++ runtime doesn't run",
                                    "build them again without --cache, or run them in Python");
    const std::map<std::string, std::string> here = {{"tensorrt", library_version()},
                                                     {"gpu", device.name},
                                                     {"compute capability", device.compute_capability}};
    std::string differs;
    for (const auto& [what, value] : here) {
        const auto found = engines.built_with.find(what);
        const std::string built = found == engines.built_with.end() ? "unknown" : found->second;
        if ((what == "tensorrt" ? three_numbers(built) : built) == value) continue;
        differs += (differs.empty() ? "" : ", ") + what + " " + built + " (here: " + value + ")";
    }
    if (!differs.empty())
        throw core::backend_failure("the TensorRT engines were built for " + differs, REBUILD);
}

std::string TensorRtEngines::describe() const {
    return nlohmann::ordered_json{{"backend", "tensorrt"},
                                  {"tensorrt", library_version()},
                                  {"gpu", device.name},
                                  {"compute capability", device.compute_capability},
                                  {"driver", "CUDA " + device.driver_version},
                                  {"precision", precision}}
        .dump();
}

const Arrays& TensorRtEngines::weights(const std::string& graph) {
    const std::lock_guard lock(mutex_);
    const auto found = weights_.find(graph);
    if (found != weights_.end()) return found->second;
    device.make_current();
    return weights_[graph] = store_->load(plan(graph));
}

void TensorRtEngines::load_blocks(int depth) {
    weights("embed");
    for (int block = 0; block < depth; ++block) weights(core::block_name(block));
}

std::unique_ptr<core::Loading> TensorRtEngines::begin_loading(int depth) {
    std::vector<const Plan*> plans = {&plan("embed")};
    for (int block = 0; block < depth; ++block) plans.push_back(&plan(core::block_name(block)));
    if (depth == spec.blocks) plans.push_back(&plan("final_head"));
    device.make_current();
    return store_->begin_loading(plans);
}

std::unique_ptr<Kernels> TensorRtEngines::lend_kernels() {
    join_sessions();
    {
        const std::lock_guard lock(mutex_);
        if (!unused_kernels_.empty()) {
            std::unique_ptr<Kernels> unused = std::move(unused_kernels_.back());
            unused_kernels_.pop_back();
            return unused;
        }
    }
    return std::make_unique<Kernels>(device, bundle_.files(),
                                     beside_plans(plan("embed").kernels.at(precision)));
}

std::unique_ptr<EngineSet> TensorRtEngines::lend_engines(CUstream stream) {
    {
        const std::lock_guard lock(mutex_);
        if (!unused_engines_.empty()) {
            std::unique_ptr<EngineSet> unused = std::move(unused_engines_.back());
            unused_engines_.pop_back();
            return unused;
        }
    }
    std::set<std::string> files;  // equal blocks share theirs
    for (const auto& plan : plans_)
        for (const auto& engine : plan.second.engines) files.insert(beside_plans(engine.second));
    return std::make_unique<EngineSet>(device, bundle_.files(), files, stream);
}

void TensorRtEngines::take_back(std::unique_ptr<Kernels> kernels_of_session,
                                std::unique_ptr<EngineSet> engine_set) {
    {
        const std::lock_guard lock(check_mutex_);
        if (--sessions_ == 0) unmarked_ = nullptr;
    }
    const std::lock_guard lock(mutex_);
    if (kernels_of_session) unused_kernels_.push_back(std::move(kernels_of_session));
    if (engine_set) unused_engines_.push_back(std::move(engine_set));
}

void TensorRtEngines::launch_check(Stream& stream, const std::uint64_t* word, std::uint32_t answer) {
    const std::lock_guard lock(check_mutex_);
    if (sessions_ == 1) {
        stream.flush();
        unmarked_ = word;
        unmarked_answer_ = answer;
        return;
    }
    if (checked_by_ && checked_by_ != stream.number())
        check(driver().cuStreamWaitEvent(stream.handle(), checked_.handle(), 0), "waiting for another check");
    stream.flush();
    check(driver().cuEventRecord(checked_.handle(), stream.handle()), "marking a check");
    checked_by_ = stream.number();
}

void TensorRtEngines::forget_check() {
    const std::lock_guard lock(check_mutex_);
    if (sessions_ == 1) unmarked_ = nullptr;
}

// Takes in another session. What the one before has launched while it was alone must have come so far that no
// thread block of it waits for another.
void TensorRtEngines::join_sessions() {
    const std::lock_guard lock(check_mutex_);
    while (unmarked_ && __atomic_load_n(unmarked_, __ATOMIC_ACQUIRE) >> 32 != unmarked_answer_) {
        std::size_t free = 0, all = 0;
        device.make_current();
        check(driver().cuMemGetInfo(&free, &all), "waiting for a check");  // says where the device is lost
    }
    unmarked_ = nullptr;
    ++sessions_;
}

const FinalHead& TensorRtEngines::final_head() {
    const std::lock_guard lock(mutex_);
    if (!final_head_) {
        const Arrays& arrays = weights("final_head");
        const Norm norm = {array_in(arrays, "final_norm.weight").address(),
                           address_in(arrays, "final_norm.bias"), static_cast<float>(spec.norm_epsilon)};
        final_head_ = std::make_unique<FinalHead>(FinalHead{norm, array_in(arrays, "head")});
    }
    return *final_head_;
}

const FoldedHead& TensorRtEngines::folded_head() {
    const std::lock_guard lock(mutex_);
    if (!folded_head_) {
        const Plan& described = plan("exit_head");
        const Weight &project = weight_in(described, "project"),
                     &vocabulary = weight_in(described, "vocabulary");
        // Copies with whole 16-byte rows: two or three megabytes for a model of 7B.
        auto head = std::make_unique<FoldedHead>();
        head->project = store_->padded(project, true);
        head->vocabulary = store_->padded(vocabulary, false);
        const Arrays& arrays = weights("exit_head");
        head->project_bias = array_in(arrays, "project.bias");
        if (arrays.count("vocabulary.bias")) head->vocabulary_bias = arrays.at("vocabulary.bias");
        head->project_precision = project.precision;
        head->vocabulary_precision = vocabulary.precision;
        head->rank = static_cast<int>(project.shape.at(1));
        folded_head_ = std::move(head);
    }
    return *folded_head_;
}

const ResidualHead& TensorRtEngines::residual_head(int blocks_run) {
    const std::lock_guard lock(mutex_);
    auto& found = residual_heads_[blocks_run];
    if (!found) {
        const Plan& described = plan("exit_head");
        const std::vector<float> gates = store_->values(weight_in(described, "gates"));
        auto head = std::make_unique<ResidualHead>();
        // The rank filled up with zeros to whole loads.
        head->project = store_->padded(weight_in(described, "project"), true, 1, true);
        std::vector<float> bias = store_->values(weight_in(described, "project.bias"));
        bias.resize(static_cast<std::size_t>(head->project.rows()));
        head->bias = store_->upload(bias);
        head->up = store_->padded(weight_in(described, "up"), true,
                                  gates.at(static_cast<std::size_t>(blocks_run - 1)));
        found = std::move(head);
    }
    return *found;
}

std::pair<CUdeviceptr, CUdeviceptr> TensorRtEngines::rotations(bool long_context) const {
    if (rotary_.empty()) return {0, 0};
    const bool second = long_context && spec.rotary_switch;
    const CUdeviceptr skipped = second ? rotary_[0].memory->bytes() / 2 : 0;
    return {rotary_[0].address() + skipped, rotary_[1].address() + skipped};
}

std::unique_ptr<core::Cache> TensorRtEngines::new_cache(int batch_size, int capacity,
                                                        core::Interruption interruption) {
    return std::make_unique<TensorRtCache>(*this, batch_size, capacity, std::move(interruption));
}

}  // namespace ojfa::tensorrt
