#include "bundle/parts.hpp"

#include <cmath>
#include <limits>

#include "failure.hpp"

namespace ojfa::core {
namespace {

constexpr std::int64_t ANY_SIZE = std::numeric_limits<std::int64_t>::max();

std::optional<int> maybe_integer(Fields& fields, const std::string& name, int least) {
    fields.at(name);
    if (!fields.maybe(name)) return std::nullopt;
    return static_cast<int>(fields.integer(name, least));
}

void maybe_text(Fields& fields, const std::string& name) {
    fields.at(name);
    if (fields.maybe(name)) fields.text(name);
}

std::map<std::string, std::string> texts_by_name(Fields fields) {
    std::map<std::string, std::string> result;
    for (const auto& member : fields.json().items()) result[member.key()] = fields.text(member.key());
    return result;
}

// What later models have, and manifests of others leave out.
void read_later_parts(Fields& fields, ModelSpec& spec) {
    const auto is_there = [&](const char* name) { return fields.json().contains(name); };
    if (is_there("norms")) {
        const std::string place = fields.one_of("norms", {"before", "after", "both"});
        spec.norms = place == "both"    ? NormPlace::both
                     : place == "after" ? NormPlace::after
                                        : NormPlace::before;
    }
    if (is_there("parallel")) spec.parallel = fields.truth("parallel");
    if (spec.parallel && spec.norms != NormPlace::before) fields.fail("parallel", "the norms must be before");
    if (is_there("qk_norm")) {
        const std::string kind = fields.one_of("qk_norm", {"none", "head", "projection"});
        spec.qk_norm = kind == "head"         ? QkNorm::head
                       : kind == "projection" ? QkNorm::projection
                                              : QkNorm::none;
    }
    for (auto [name, cap] :
         {std::pair{"attention_softcap", &spec.attention_softcap}, {"logit_softcap", &spec.logit_softcap}}) {
        if (!is_there(name) || !fields.maybe(name)) continue;
        *cap = fields.number(name);
        if (!(**cap > 0)) fields.fail(name, "it must be above 0");
    }
    for (auto [name, of_blocks] : {std::pair{"rotated", &spec.rotated},
                                   {"windowed", &spec.windowed},
                                   {"rotated_second", &spec.rotated_second}}) {
        if (!is_there(name)) continue;
        *of_blocks = fields.truths(name);
        if (!of_blocks->empty() && of_blocks->size() != static_cast<std::size_t>(spec.blocks))
            fields.fail(name, "there must be one for each block, or none");
    }
    if (!spec.rotated_second.empty() && (!spec.rotary_dim || spec.rotary_switch))
        fields.fail("rotated_second", "there must be rotations, and one set without");
}

ModelSpec read_spec(Fields fields) {
    ModelSpec spec;
    const auto positive = [&](const char* name) { return static_cast<int>(fields.integer(name, 1)); };
    spec.family = fields.text("family");
    spec.blocks = static_cast<int>(fields.integer("blocks", 1, 1 << 16));
    spec.hidden_size = positive("hidden_size");
    spec.vocab_size = positive("vocab_size");
    spec.heads = positive("heads");
    spec.kv_heads = positive("kv_heads");
    spec.head_dim = positive("head_dim");
    spec.intermediate_size = positive("intermediate_size");
    spec.attention_scales = fields.numbers("attention_scales");
    spec.window = maybe_integer(fields, "window", 1);
    spec.rotary_dim = static_cast<int>(fields.integer("rotary_dim", 0));
    spec.rotary_switch = maybe_integer(fields, "rotary_switch", 1);
    const std::vector<std::string> activations = {"silu", "gelu", "gelu_tanh", "relu"};
    const std::string activation = fields.one_of("activation", activations);
    for (std::size_t i = 0; i < activations.size(); ++i)
        if (activations[i] == activation) spec.activation = static_cast<Activation>(i);
    spec.gated = fields.truth("gated");
    spec.norm = fields.one_of("norm", {"rms", "layer"}) == "rms" ? NormKind::rms : NormKind::layer;
    spec.norm_epsilon = fields.number("norm_epsilon");
    spec.max_positions = positive("max_positions");
    spec.tied_head = fields.truth("tied_head");
    spec.eos_token_ids = fields.integers("eos_token_ids");
    read_later_parts(fields, spec);
    fields.done();
    // What Python's runtime takes from the model's family, and this one must not trust.
    if (spec.attention_scales.size() != static_cast<std::size_t>(spec.blocks))
        fields.fail("attention_scales", "there must be one for each block");
    if (spec.heads % spec.kv_heads) fields.fail("kv_heads", "they must divide the heads");
    if (spec.head_dim > std::numeric_limits<std::int32_t>::max() / spec.heads)
        fields.fail("head_dim", "no model has heads of so many features");
    if (!(spec.norm_epsilon > 0)) fields.fail("norm_epsilon", "it must be above 0");
    if (spec.rotary_dim % 2 || spec.rotary_dim > spec.head_dim)
        fields.fail("rotary_dim", "it must be even and at most head_dim");
    return spec;
}

TensorSlice read_slice(Fields fields) {
    TensorSlice slice;
    slice.file = fields.text("file");
    slice.offset = static_cast<std::uint64_t>(fields.integer("offset", 0, ANY_SIZE));
    for (const std::int32_t length : fields.integers("shape")) {
        if (length < 1) fields.fail("shape", "a length is below 1");
        slice.shape.push_back(length);
    }
    fields.done();
    return slice;
}

void check_ports(Fields& fields, const std::string& name) {
    for (Fields port : fields.objects(name)) {
        port.text("name");
        port.text("dtype");
        const Json& shape = port.at("shape");
        if (!shape.is_array()) port.fail("shape", "it is no list");
        for (const Json& length : shape)
            if (!length.is_string() && !length.is_number_integer()) port.fail("shape", "it is no shape");
        port.done();
    }
}

Speculation read_speculation(Fields fields) {
    Speculation speculation;
    if (fields.maybe("exit")) speculation.exit = static_cast<int>(fields.integer("exit", 0));
    if (fields.maybe("draft")) speculation.draft = static_cast<int>(fields.integer("draft", 1));
    if (fields.maybe("draft_cost")) speculation.draft_cost = fields.number("draft_cost");
    if (fields.maybe("check_cost")) speculation.check_cost = fields.number("check_cost");
    if (fields.maybe("round_cost")) speculation.round_cost = fields.number("round_cost");
    if (fields.maybe("acceptance")) speculation.acceptance = fields.number("acceptance");
    fields.done();
    speculation.check();
    return speculation;
}

void check_share(Fields& fields, const std::string& name) {
    const double share = fields.number(name);
    if (!(share >= 0 && share <= 1)) fields.fail(name, "it is no share");
}

void check_positive(Fields& fields, const std::string& name) {
    if (!(fields.number(name) > 0)) fields.fail(name, "it must be above 0");
}

}  // namespace

int ModelSpec::rotary_dim_of(int block) const {
    return rotated.empty() || rotated[static_cast<std::size_t>(block)] ? rotary_dim : 0;
}

bool ModelSpec::rotates_second(int block) const {
    return !rotated_second.empty() && rotated_second[static_cast<std::size_t>(block)];
}

std::optional<int> ModelSpec::window_of(int block) const {
    return windowed.empty() || windowed[static_cast<std::size_t>(block)] ? window : std::nullopt;
}

int ModelSpec::qk_norm_features(int of_heads) const {
    if (qk_norm == QkNorm::none) return 0;
    return head_dim * (qk_norm == QkNorm::head ? 1 : of_heads);
}

ModelSpec read_model(Fields fields) {
    fields.text("name");
    maybe_text(fields, "revision");
    fields.sha256("sha256");
    const Fields config = fields.object("config");
    if (fields.json().contains("ignored_fields")) fields.texts("ignored_fields");
    ModelSpec spec = read_spec(fields.object("spec"));
    fields.done();
    const auto type = config.json().find("model_type");
    if (type == config.json().end() || *type != spec.family)
        fields.fail("spec.family", "it isn't the config's model_type");
    return spec;
}

RotaryTables read_rotary(Fields fields) {
    RotaryTables tables = {read_slice(fields.object("cos")), read_slice(fields.object("sin"))};
    fields.done();
    return tables;
}

GraphEntry read_graph(Fields fields) {
    GraphEntry graph;
    graph.name = fields.text("name");
    graph.file = fields.text("file");
    fields.text("description");
    check_ports(fields, "inputs");
    check_ports(fields, "outputs");
    graph.weights = fields.texts("weights");
    fields.done();
    return graph;
}

EngineSet read_engines(Fields fields) {
    EngineSet engines;
    engines.backend = fields.text("backend");
    engines.files = texts_by_name(fields.object("files"));
    engines.built_with = texts_by_name(fields.object("built_with"));
    fields.done();
    return engines;
}

Shortcut read_shortcut(Fields fields) {
    Shortcut shortcut{};
    const std::string kind = fields.text("kind");
    if (kind == "mlp")
        throw bundle_failure("the bundle's shortcut is an MLP, which this library doesn't run",
                             "run it in Python, or build it again with --shortcut ojfa or residual");
    if (kind == "block")
        throw bundle_failure("the bundle's shortcut is a block jump, which this library doesn't run",
                             "run it in Python, or build it again with --shortcut ojfa or residual");
    for (const char* name : {"fitted_at", "parameters"}) fields.integer(name, 1, ANY_SIZE);
    shortcut.rank = fields.integer("rank", 1);
    shortcut.residual = fields.truth("residual");
    if (fields.maybe("gates")) shortcut.gates = fields.numbers("gates").size();
    fields.maybe("width");
    fields.done();
    return shortcut;
}

Golden read_golden(Fields fields) {
    Golden golden;
    golden.exit = static_cast<int>(fields.integer("exit", 1));
    golden.prompt = fields.integers("prompt_token_ids");
    golden.tokens = fields.integers("token_ids");
    if (golden.tokens.empty()) fields.fail("token_ids", "there is none");
    fields.done();
    return golden;
}

Policy read_policy(Fields fields) {
    Policy policy;
    policy.exits = fields.integers("exits");
    policy.measure = measure_named(fields.one_of("measure", {"top", "margin", "entropy"}));
    policy.thresholds = fields.numbers("thresholds");
    fields.done();
    policy.check();
    return policy;
}

Default read_default(Fields fields) {
    Default planned;
    planned.automatic = fields.one_of("exit", {"full", "auto"}) == "auto";
    fields.at("speculation");
    if (const Json* value = fields.maybe("speculation"))
        planned.speculation = read_speculation(Fields(*value, fields.place() + ".speculation"));
    check_positive(fields, "ms_per_token");
    check_positive(fields, "full_ms_per_token");
    fields.text("reason");
    fields.done();
    return planned;
}

FileEntry read_file_entry(Fields fields) {
    const auto size = static_cast<std::uint64_t>(fields.integer("size", 0, ANY_SIZE));
    FileEntry entry = {size, fields.sha256("sha256")};
    fields.done();
    return entry;
}

void check_calibration(Fields fields) {
    for (Fields source : fields.objects("sources")) {
        source.text("name");
        source.sha256("sha256");
        source.integer("bytes", 0, ANY_SIZE);
        source.done();
    }
    fields.integer("tokens_fit", 0, ANY_SIZE);
    fields.integer("tokens_held_out", 1, ANY_SIZE);
    fields.done();
}

void check_promise(Fields fields) {
    Fields limits = fields.object("limits");
    check_share(limits, "max_disagreement");
    check_share(limits, "confidence");
    if (limits.maybe("max_extra_surprisal")) check_positive(limits, "max_extra_surprisal");
    check_positive(limits, "surprisal_clip");
    limits.done();
    fields.at("policy");
    if (const Json* policy = fields.maybe("policy")) read_policy(Fields(*policy, "promise.policy"));
    std::vector<Fields> domains = fields.objects("domains");
    if (domains.empty()) fields.fail("domains", "there is none");
    for (Fields& domain : domains) {
        domain.text("name");
        domain.integer("windows", 1, ANY_SIZE);
        domain.integer("tokens", 1, ANY_SIZE);
        check_share(domain, "disagreement");
        if (!(domain.number("extra_surprisal") >= 0)) domain.fail("extra_surprisal", "it is below 0");
        check_positive(domain, "depth");
        domain.at("p_value");
        if (domain.maybe("p_value")) check_share(domain, "p_value");
        if (domain.maybe("made_on")) domain.one_of("made_on", {"files", "self-text"});
        if (domain.maybe("text")) domain.text("text");
        domain.done();
    }
    check_positive(fields, "relative_cost");
    fields.integer("candidates", 0, ANY_SIZE);
    fields.text("reason");
    fields.done();
}

void check_generation(Fields fields, int vocab_size) {
    if (fields.maybe("temperature")) check_positive(fields, "temperature");
    if (fields.maybe("top_k")) fields.integer("top_k", 1);
    for (const char* name : {"top_p", "min_p"})
        if (fields.maybe(name)) check_share(fields, name);
    if (fields.maybe("top_p")) check_positive(fields, "top_p");
    if (fields.maybe("repetition_penalty")) {
        const double penalty = fields.number("repetition_penalty");
        if (!(penalty >= 1e-6 && penalty <= 1e6)) fields.fail("repetition_penalty", "it is out of range");
    }
    if (fields.json().contains("suppress_tokens"))
        for (const std::int32_t token : fields.integers("suppress_tokens"))
            if (token < 0 || token >= vocab_size)
                fields.fail("suppress_tokens", "they are outside the model");
    fields.done();
}

void check_built(Fields fields) {
    fields.text("time");
    fields.text("host");
    texts_by_name(fields.object("versions"));
    fields.done();
}

}  // namespace ojfa::core
