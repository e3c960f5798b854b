#include <cstring>

#include "capi/handles.hpp"

namespace ojfa::capi {

Registry<core::Model>& models() {
    static auto& registry = *new Registry<core::Model>("model");
    return registry;
}

core::Policy policy_of(const ojfa_policy& policy) {
    core::Policy result;
    if (policy.count) {
        need(policy.exits, "policy.exits");
        need(policy.thresholds, "policy.thresholds");
        result.exits.assign(policy.exits, policy.exits + policy.count);
        result.thresholds.assign(policy.thresholds, policy.thresholds + policy.count);
    }
    switch (policy.measure) {
        case OJFA_MEASURE_TOP:
            result.measure = core::Measure::top;
            break;
        case OJFA_MEASURE_MARGIN:
            result.measure = core::Measure::margin;
            break;
        case OJFA_MEASURE_ENTROPY:
            result.measure = core::Measure::entropy;
            break;
        default:
            throw usage_failure("a policy's measure is not known");
    }
    result.check();
    return result;
}

namespace {

core::LoadOptions load_options(const ojfa_load_options* given) {
    const ojfa_load_options options = taken(given, ojfa_load_options_init);
    core::LoadOptions result;
    if (options.backend) result.backend = options.backend;
    if (options.backend_library) result.library = options.backend_library;
    if (options.device < 0) throw usage_failure("device " + std::to_string(options.device) + " is below 0");
    result.open = {options.device, options.memory_limit};
    result.check_golden = options.check_golden != 0;
    if (options.blocks >= 0) result.blocks = options.blocks;
    if (options.progress)
        result.progress = [progress = options.progress, user = options.user](
                              std::uint64_t done, std::uint64_t total) { progress(user, done, total); };
    return result;
}

}  // namespace
}  // namespace ojfa::capi

using namespace ojfa::capi;

void ojfa_load_options_init(ojfa_load_options* options) {
    if (!options) return;
    *options = {};
    options->struct_size = sizeof *options;
    options->check_golden = 1;
    options->blocks = -1;
}

ojfa_status ojfa_model_load(const char* bundle, const ojfa_load_options* options, ojfa_model* model) {
    return guarded([&] {
        need(bundle, "bundle");
        need(model, "model");
        *model = {0};
        model->id = models().add(std::make_shared<ojfa::core::Model>(bundle, load_options(options)));
    });
}

ojfa_status ojfa_model_close(ojfa_model model) {
    return guarded([&] { models().remove(model.id); });
}

ojfa_status ojfa_model_get_info(ojfa_model model, ojfa_model_info* info) {
    return guarded([&] {
        need(info, "info");
        const auto open = models().get(model.id);
        const auto& manifest = open->manifest();
        const auto& spec = manifest.spec;
        const int exits = manifest.automatic ? static_cast<int>(manifest.automatic->exits.size()) : -1;
        *info = {spec.blocks,
                 spec.hidden_size,
                 spec.vocab_size,
                 manifest.max_length,
                 manifest.max_batch_size,
                 exits,
                 static_cast<int32_t>(spec.eos_token_ids.size())};
    });
}

ojfa_status ojfa_model_load_blocks(ojfa_model model, int32_t depth) {
    return guarded([&] {
        const auto open = models().get(model.id);
        open->engines().load_blocks(ojfa::core::resolve_exit(depth, open->spec().blocks));
    });
}

ojfa_status ojfa_model_memory(ojfa_model model, uint64_t* bytes) {
    return guarded([&] {
        need(bytes, "bytes");
        *bytes = models().get(model.id)->engines().memory();
    });
}

ojfa_status ojfa_model_backend(ojfa_model model, char* json, size_t capacity, size_t* size) {
    return guarded([&] {
        need(size, "size");
        const std::string text = models().get(model.id)->engines().describe();
        *size = text.size() + 1;
        if (!json && !capacity) return;
        need(json, "json");
        if (capacity < *size)
            throw usage_failure("the description needs " + std::to_string(*size) +
                                " bytes, there is room for " + std::to_string(capacity));
        std::memcpy(json, text.c_str(), *size);
    });
}

ojfa_status ojfa_model_policy(ojfa_model model, ojfa_policy* policy) {
    return guarded([&] {
        need(policy, "policy");
        const auto open = models().get(model.id);
        const auto& automatic = open->automatic();
        *policy = {automatic.exits.data(), automatic.thresholds.data(), automatic.exits.size(),
                   static_cast<std::int32_t>(automatic.measure)};
    });
}
