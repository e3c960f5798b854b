#include "runtime/model.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

void check_limit(int value, int limit, const std::string& what, const std::string& option) {
    if (value < 1 || value > limit)
        throw usage_failure(
            what + " " + std::to_string(value) + " is outside this bundle's 1.." + std::to_string(limit),
            "build it with a larger " + option);
}

}  // namespace

Model::Model(const std::filesystem::path& bundle, const LoadOptions& options)
    // The backend first: one that isn't there is no reason to read a bundle.
    : bundle_((load_backend(options.backend, options.library), bundle)) {
    open(options);
    if (options.check_golden) check_golden();
}

// Opens the engines when what they are opened from is checked, and gives them the weights as these are.
void Model::open(const LoadOptions& options) {
    Checker checker(bundle_.files(), options.progress, bundle_.bytes());
    bundle_.check_contents(checker, Bundle::Part::others);
    bundle_.read_graphs();
    engines_ = load_backend(options.backend, options.library).open(bundle_, options.open);
    const int depth = options.blocks ? resolve_exit(*options.blocks, spec().blocks) : 0;
    const std::unique_ptr<Loading> loading = depth ? engines_->begin_loading(depth) : nullptr;
    Receive receive;
    if (loading) receive = [&loading](const std::string& name) { return loading->receive(name); };
    bundle_.check_contents(checker, Bundle::Part::weights, receive);
    if (loading) loading->end();
    if (depth) engines_->load_blocks(depth);
}

std::unique_ptr<Session> Model::session(const SessionOptions& options) {
    const int length = options.max_length.value_or(manifest().max_length);
    check_limit(options.batch_size, manifest().max_batch_size, "batch size", "--max-batch-size");
    check_limit(length, manifest().max_length, "cache length", "--max-cache-length");
    std::optional<Shadow> shadow;
    if (options.shadow_share != 0)
        // A Monitor of Python's has taken the first for itself when its first session begins.
        shadow.emplace(options.shadow_share, Random({options.shadow_seed}, {options.shadow_index + 1}));
    return std::make_unique<Session>(spec(), *engines_, options.batch_size, length, std::move(shadow));
}

const Policy& Model::automatic() const {
    if (!manifest().automatic)
        throw bundle_failure(bundle_.directory().string() + " has no exit policy for automatic exits",
                             "build it with --max-disagreement, or give a fixed exit or a policy");
    return *manifest().automatic;
}

void Model::check_golden() {
    for (const Golden& golden : manifest().golden) {
        SessionOptions options;
        options.max_length = static_cast<int>(golden.prompt.size() + golden.tokens.size()) - 1;
        const std::unique_ptr<Session> session = this->session(options);
        std::vector<std::int32_t> pending = golden.prompt;
        std::vector<float> logits(static_cast<std::size_t>(spec().vocab_size));
        for (const std::int32_t token : golden.tokens) {
            std::int32_t chosen = -1;
            // The backend chooses, but where its logits are looked at.
            const bool last = &token == &golden.tokens.back();
            session->advance({pending}, golden.exit, {last ? logits.data() : nullptr, &chosen});
            if (chosen != token)
                throw backend_failure("at exit " + std::to_string(golden.exit) +
                                          " the bundle gives other tokens here "
                                          "than where it was built: " +
                                          engines_->describe(),
                                      "rebuild the engines; 'ojfa-export verify' says more");
            pending = {token};
        }
        if (!std::all_of(logits.begin(), logits.end(), [](float logit) { return std::isfinite(logit); }))
            throw bundle_failure(bundle_.directory().string() + " gives logits at exit " +
                                     std::to_string(golden.exit) + " that are no finite numbers",
                                 "build it again: weights are damaged or too large for its precision");
    }
}

}  // namespace ojfa::core
