#include <algorithm>
#include <cmath>
#include <limits>

#include "capi/handles.hpp"

namespace ojfa::capi {

Registry<OpenSession>& sessions() {
    static auto& registry = *new Registry<OpenSession>("session");
    return registry;
}

core::TokenRows rows_of(const core::Session& session, const ojfa_tokens* tokens) {
    need(tokens, "tokens");
    core::TokenRows rows;
    for (int row = 0; row < session.batch_size(); ++row) {
        if (tokens[row].count) need(tokens[row].ids, "tokens.ids");
        rows.emplace_back(tokens[row].ids, tokens[row].count);
    }
    return rows;
}

namespace {

// Refuses a buffer for logits that is too small for so many rows.
void need_room(const core::Session& session, std::size_t rows, const float* logits, std::size_t capacity) {
    const std::size_t wanted = rows * static_cast<std::size_t>(session.spec().vocab_size);
    if (logits && capacity < wanted)
        throw usage_failure("the logits need " + std::to_string(wanted) + " floats, there is room for " +
                            std::to_string(capacity));
}

std::size_t new_tokens(const core::TokenRows& rows) {
    std::size_t count = 0;
    for (const auto& ids : rows) count += ids.size();
    return count;
}

int to_int(std::size_t value, const char* name) {
    if (value > static_cast<std::size_t>(std::numeric_limits<int>::max()))
        throw usage_failure(std::string(name) + " is too large");
    return static_cast<int>(value);
}

ojfa_event event_of(const core::Event& event) {
    static_assert(static_cast<int>(core::Event::Kind::shadow_check) == OJFA_EVENT_SHADOW);
    return {static_cast<ojfa_event_kind>(event.kind),
            event.row,
            event.position,
            event.blocks_run,
            event.drafted,
            event.accepted,
            event.agrees};
}

}  // namespace
}  // namespace ojfa::capi

using namespace ojfa::capi;
using ojfa::core::resolve_exit;

void ojfa_session_options_init(ojfa_session_options* options) {
    if (!options) return;
    *options = {};
    options->struct_size = sizeof *options;
    options->batch_size = 1;
}

ojfa_status ojfa_session_open(ojfa_model model, const ojfa_session_options* options, ojfa_session* session) {
    return guarded([&] {
        need(session, "session");
        *session = {0};
        const ojfa_session_options given = taken(options, ojfa_session_options_init);
        ojfa::core::SessionOptions wanted;
        wanted.batch_size = given.batch_size;
        if (given.max_length) wanted.max_length = given.max_length;
        wanted.shadow_share = given.shadow_share;
        wanted.shadow_seed = given.shadow_seed;
        wanted.shadow_index = given.shadow_index;
        auto open = std::make_shared<OpenSession>();
        open->model = models().get(model.id);
        open->session = open->model->session(wanted);
        session->id = sessions().add(std::move(open));
    });
}

ojfa_status ojfa_session_close(ojfa_session session) {
    return guarded([&] { sessions().remove(session.id); });
}

ojfa_status ojfa_session_cancel(ojfa_session session) {
    return guarded([&] { sessions().get(session.id)->session->cancel(); });
}

ojfa_status ojfa_session_advance(ojfa_session session, const ojfa_tokens* tokens, int32_t exit, float* logits,
                                 size_t capacity, int32_t* likeliest) {
    return guarded([&] {
        const Borrowed borrowed(session);
        need_room(*borrowed, static_cast<std::size_t>(borrowed->batch_size()), logits, capacity);
        const int depth = resolve_exit(exit, borrowed->spec().blocks);
        borrowed->advance(rows_of(*borrowed, tokens), depth, {logits, likeliest});
    });
}

ojfa_status ojfa_session_advance_every(ojfa_session session, const ojfa_tokens* tokens, int32_t exit,
                                       float* logits, size_t capacity) {
    return guarded([&] {
        need(logits, "logits");
        const Borrowed borrowed(session);
        const auto rows = rows_of(*borrowed, tokens);
        need_room(*borrowed, new_tokens(rows), logits, capacity);
        borrowed->advance_every(rows, resolve_exit(exit, borrowed->spec().blocks), logits);
    });
}

ojfa_status ojfa_session_decide(ojfa_session session, const ojfa_tokens* tokens, const ojfa_policy* policy,
                                float* logits, size_t capacity, int32_t* likeliest, int32_t* blocks_run,
                                double* confidence) {
    return guarded([&] {
        need(policy, "policy");
        need(blocks_run, "blocks_run");
        const Borrowed borrowed(session);
        need_room(*borrowed, static_cast<std::size_t>(borrowed->batch_size()), logits, capacity);
        ojfa::core::Decided decided;
        decided.logits = logits;
        decided.likeliest = likeliest;
        decided.blocks_run = blocks_run;
        decided.confidence = confidence;
        borrowed->decide(rows_of(*borrowed, tokens), policy_of(*policy), decided);
    });
}

ojfa_status ojfa_session_complete(ojfa_session session, const ojfa_tokens* tokens, const size_t* counts,
                                  float* logits, size_t capacity) {
    return guarded([&] {
        need(counts, "counts");
        need(logits, "logits");
        const Borrowed borrowed(session);
        std::vector<int> wanted;
        std::size_t total = 0;
        for (int row = 0; row < borrowed->batch_size(); ++row) {
            wanted.push_back(to_int(counts[row], "a count"));
            total += counts[row];
        }
        need_room(*borrowed, total, logits, capacity);
        borrowed->complete(rows_of(*borrowed, tokens), wanted, logits, nullptr);
    });
}

ojfa_status ojfa_session_deepen(ojfa_session session, int32_t exit, float* logits, size_t capacity,
                                int32_t* likeliest) {
    return guarded([&] {
        const Borrowed borrowed(session);
        need_room(*borrowed, static_cast<std::size_t>(borrowed->batch_size()), logits, capacity);
        borrowed->deepen(resolve_exit(exit, borrowed->spec().blocks), {logits, likeliest});
    });
}

ojfa_status ojfa_session_rewind(ojfa_session session, size_t row, size_t length) {
    return guarded([&] { Borrowed(session)->rewind(to_int(length, "length"), to_int(row, "row")); });
}

ojfa_status ojfa_session_lengths(ojfa_session session, int32_t* lengths) {
    return guarded([&] {
        need(lengths, "lengths");
        const Borrowed borrowed(session);
        for (int row = 0; row < borrowed->batch_size(); ++row) lengths[row] = borrowed->length(row);
    });
}

ojfa_status ojfa_session_tokens(ojfa_session session, size_t row, int32_t* ids, size_t capacity,
                                size_t* count) {
    return guarded([&] {
        need(count, "count");
        if (capacity) need(ids, "ids");
        const Borrowed borrowed(session);
        if (row >= static_cast<std::size_t>(borrowed->batch_size()))
            throw usage_failure("row " + std::to_string(row) + " is outside 0.." +
                                std::to_string(borrowed->batch_size() - 1));
        const auto& tokens = borrowed->tokens(static_cast<int>(row));
        *count = tokens.size();
        std::copy_n(tokens.begin(), std::min(capacity, tokens.size()), ids);
    });
}

ojfa_status ojfa_session_watermarks(ojfa_session session, int32_t* marks) {
    return guarded([&] {
        need(marks, "marks");
        const Borrowed borrowed(session);
        for (int block = 0; block < borrowed->spec().blocks; ++block)
            for (int row = 0; row < borrowed->batch_size(); ++row) *marks++ = borrowed->watermark(block, row);
    });
}

ojfa_status ojfa_session_stats(ojfa_session session, ojfa_stats* stats, uint64_t* exits, uint64_t* stopped,
                               double* confidence_sums) {
    return guarded([&] {
        need(stats, "stats");
        const Borrowed borrowed(session);
        const ojfa::core::Stats& counted = borrowed->stats;
        *stats = {
            counted.exit_heads, counted.final_heads, counted.checks,        counted.drafted,
            counted.accepted,   counted.rounds,      counted.shadow_checks, counted.shadow_disagreements};
        const auto fill = [&](auto* out, const auto& by_blocks) {
            if (!out) return;
            std::fill_n(out, borrowed->spec().blocks + 1, 0);
            for (const auto& [blocks, value] : by_blocks) out[blocks] = value;
        };
        fill(exits, counted.exits);
        fill(stopped, counted.stopped);
        fill(confidence_sums, counted.confidence_sums);
    });
}

ojfa_status ojfa_session_reset_stats(ojfa_session session) {
    return guarded([&] { Borrowed(session)->stats = {}; });
}

ojfa_status ojfa_session_listen(ojfa_session session, void (*listener)(void*, const ojfa_event*),
                                void* user) {
    return guarded([&] {
        const Borrowed borrowed(session);
        borrowed->on_event = nullptr;
        if (listener)
            borrowed->on_event = [listener, user](const ojfa::core::Event& event) {
                const ojfa_event told = event_of(event);
                listener(user, &told);
            };
    });
}

ojfa_status ojfa_session_run_shadow_checks(ojfa_session session, int64_t budget, size_t* done) {
    return guarded([&] {
        need(done, "done");
        const Borrowed borrowed(session);
        std::optional<int> most;
        if (budget >= 0) most = static_cast<int>(std::min<int64_t>(budget, std::numeric_limits<int>::max()));
        *done = static_cast<size_t>(borrowed->run_shadow_checks(most));
    });
}

ojfa_status ojfa_session_shadow_loss(ojfa_session session, size_t row, double* loss) {
    return guarded([&] {
        need(loss, "loss");
        *loss = Borrowed(session)->shadow_loss(to_int(row, "row")).value_or(std::nan(""));
    });
}
