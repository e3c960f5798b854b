#include <variant>

#include "capi/handles.hpp"

namespace ojfa::capi {

Registry<OpenGeneration>& generations() {
    static auto& registry = *new Registry<OpenGeneration>("generation");
    return registry;
}

namespace {

core::Sampling sampling_of(const ojfa_generate_options& options) {
    core::Sampling sampling;
    sampling.temperature = options.temperature;
    if (options.top_k < 0) throw usage_failure("top-k must be 1 or more, or 0 for all");
    if (options.top_k) sampling.top_k = options.top_k;
    sampling.top_p = options.top_p;
    sampling.seed = options.seed;
    sampling.check();
    return sampling;
}

core::Speculation speculation_of(const ojfa_speculation& given) {
    core::Speculation result;
    if (given.exit < 0 || given.draft < 0)
        throw usage_failure("an exit and a draft length of speculation are 0 or more");
    if (given.exit) result.exit = given.exit;
    if (given.draft) result.draft = given.draft;
    if (!(given.draft_cost < 0)) result.draft_cost = given.draft_cost;
    result.check_cost = given.check_cost;
    result.round_cost = given.round_cost;
    result.acceptance = given.acceptance;
    result.check();
    return result;
}

// How tokens are got: an exit, a policy, or drafts.
struct Way {
    std::variant<int, core::Policy> exit;
    std::optional<core::Speculation> speculation;
};

Way planned(core::Model& model, int sequences, bool greedy) {
    const auto& planned = model.manifest().planned;
    const int full = model.spec().blocks;
    if (!planned || sequences != 1 || !greedy) return {full, std::nullopt};
    if (planned->automatic) return {model.automatic(), planned->speculation};
    return {full, planned->speculation};
}

Way way_of(core::Model& model, const ojfa_generate_options& options, int sequences) {
    const int blocks = model.spec().blocks;
    if (options.speculation) {
        const bool full =
            options.exit == OJFA_EXIT_FULL || options.exit == OJFA_EXIT_DEFAULT || options.exit == blocks;
        if (!full || options.policy)
            throw usage_failure("speculation gives the tokens of full depth, and an exit was asked for",
                                "leave out one of them; the exit that drafts is a setting of speculation");
        return {blocks, speculation_of(*options.speculation)};
    }
    if (options.policy) {
        core::Policy policy = policy_of(*options.policy);
        policy.check_fits(blocks);
        return {std::move(policy), std::nullopt};
    }
    if (options.exit == OJFA_EXIT_DEFAULT) return planned(model, sequences, options.temperature == 0);
    if (options.exit == OJFA_EXIT_AUTO) return {model.automatic(), std::nullopt};
    return {core::resolve_exit(options.exit, blocks), std::nullopt};
}

std::set<std::int32_t> end_tokens(const core::ModelSpec& spec, const ojfa_generate_options& options) {
    std::set<std::int32_t> tokens;
    if (!options.ignore_eos) tokens.insert(spec.eos_token_ids.begin(), spec.eos_token_ids.end());
    if (options.stop_token_count) need(options.stop_tokens, "stop_tokens");
    tokens.insert(options.stop_tokens, options.stop_tokens + options.stop_token_count);
    return tokens;
}

std::unique_ptr<core::Generation> started(core::Model& model, core::Session& session,
                                          const ojfa_tokens* prompts, const ojfa_generate_options& options) {
    const core::Sampling sampling = sampling_of(options);
    const Way way = way_of(model, options, session.batch_size());
    if (way.speculation && session.has_shadow())
        throw usage_failure(
            "speculation gives the tokens of full depth: there is nothing to check in the shadow",
            "leave out one of them");
    const std::set<std::int32_t> ends = end_tokens(model.spec(), options);
    const core::TokenRows rows = rows_of(session, prompts);
    session.check(rows);  // before any of them is drafted for: a generation that fails changes nothing
    core::Pending pending;
    for (const auto& ids : rows) pending.emplace_back(ids.begin(), ids.end());
    std::unique_ptr<core::Decoder> decoder;
    if (way.speculation) {
        decoder = std::make_unique<core::Speculator>(session, *way.speculation, sampling, ends);
    } else {
        decoder = std::make_unique<core::StepByStep>(session, way.exit, sampling);
    }
    return std::make_unique<core::Generation>(session, std::move(decoder), std::move(pending),
                                              options.max_new_tokens, ends);
}

}  // namespace
}  // namespace ojfa::capi

using namespace ojfa::capi;

void ojfa_speculation_init(ojfa_speculation* speculation) {
    if (!speculation) return;
    const ojfa::core::Speculation defaults;
    *speculation = {0, 0, -1.0, defaults.check_cost, defaults.round_cost, defaults.acceptance};
}

void ojfa_generate_options_init(ojfa_generate_options* options) {
    if (!options) return;
    *options = {};
    options->struct_size = sizeof *options;
    options->exit = OJFA_EXIT_DEFAULT;
    options->max_new_tokens = 64;
    options->top_p = 1;
}

ojfa_status ojfa_generation_start(ojfa_session session, const ojfa_tokens* prompts,
                                  const ojfa_generate_options* options, ojfa_generation* generation) {
    return guarded([&] {
        need(generation, "generation");
        *generation = {0};
        const Borrowed borrowed(session);
        const ojfa_generate_options given = taken(options, ojfa_generate_options_init);
        auto open = std::make_shared<OpenGeneration>();
        open->session = borrowed.open();
        open->generation = started(borrowed.model(), *borrowed, prompts, given);
        generation->id = generations().add(std::move(open));
    });
}

ojfa_status ojfa_generation_next(ojfa_generation generation, ojfa_step* step, int* more) {
    return guarded([&] {
        need(step, "step");
        need(more, "more");
        const auto open = generations().get(generation.id);
        const Borrowed borrowed(open->session);
        const auto token = open->generation->next();
        *more = token.has_value();
        if (token)
            *step = {token->row, token->id, token->blocks_run, token->drafted,
                     static_cast<ojfa_finish>(token->finish)};
    });
}

ojfa_status ojfa_generation_close(ojfa_generation generation) {
    return guarded([&] { generations().remove(generation.id); });
}
