#include "reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "backend/account.hpp"
#include "compute.hpp"
#include "failure.hpp"
#include "weights.hpp"

namespace ojfa::core {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

class ReferenceEngines : public Engines {
 public:
    ReferenceEngines(const Bundle& bundle, const OpenOptions& options)
        : spec(bundle.manifest().spec), account(options.memory_limit), weights(bundle, account) {
        if (const auto& tables = bundle.manifest().rotary) {
            cosines = bundle.tensor(tables->cosines);
            sines = bundle.tensor(tables->sines);
        }
    }

    void load_blocks(int depth) override {
        weights.graph("embed");
        for (int block = 0; block < depth; ++block) weights.graph(block_name(block));
    }
    std::unique_ptr<Cache> new_cache(int batch_size, int capacity, Interruption interruption) override;
    std::uint64_t memory() const override { return account.held(); }
    std::string describe() const override { return R"({"backend": "reference"})"; }

    const ModelSpec& spec;
    Account account;
    WeightStore weights;
    std::vector<float> cosines, sines;  // [rows, rotary_dim / 2]
};

class HostMemory : public Memory {
 public:
    HostMemory(Account& account, std::size_t floats)
        : taken_(account, floats * sizeof(float)), values_(new float[floats]) {
        address_ = reinterpret_cast<Address>(values_.get());
    }

 private:
    Taken taken_;
    std::unique_ptr<float[]> values_;
};

// Keys and values [sequences, kv_heads, capacity, head_dim] of a block.
struct KeysAndValues {
    HostMemory keys, values;
};

float* floats(Address address) {
    return reinterpret_cast<float*>(address);
}

class ReferenceCache : public Cache {
 public:
    ReferenceCache(ReferenceEngines& engines, int batch_size, int capacity, Interruption interruption)
        : engines_(engines),
          spec_(engines.spec),
          batch_size_(batch_size),
          capacity_(capacity),
          interruption_(std::move(interruption)) {}

    std::unique_ptr<Memory> allocate(std::size_t rows) override {
        return std::make_unique<HostMemory>(engines_.account, rows * at(spec_.hidden_size));
    }

    void copy(Address from, Address to, std::size_t rows) override {
        std::memmove(floats(to), floats(from), rows * at(spec_.hidden_size) * sizeof(float));
    }

    Address embed(Span<const std::int32_t> token_ids, const Rows& rows) override;
    Address run_blocks(int first, int stop, Address hidden, const Rows& rows) override;
    void keep(Address kept, std::size_t capacity, Address hidden, const Rows& rows) override {
        keep_by_copies(*this, kept, capacity, hidden, rows, at(spec_.hidden_size) * sizeof(float));
    }
    void logits(Address hidden, int count, int blocks_run, float* logits) override;
    std::unique_ptr<Choices> choose(Address hidden, int count, int blocks_run, const Choosing& how) override;
    Address embed_chosen(const Rows& rows) override { return embed(chosen_, rows); }

 private:
    Address buffer(std::size_t rows);
    void run_block(int block, float* hidden, int sequence, int position, bool long_context);
    void norm_queries_and_keys(const Weights& weights, Row& qkv) const;
    Row attend(int block, Row& qkv, int sequence, int position, bool long_context);
    Row mix(int block, const double* query, const float* keys, const float* values, int position) const;
    Row logits_of(const float* hidden, int blocks_run) const;
    KeysAndValues& cached(int block);

    ReferenceEngines& engines_;
    const ModelSpec& spec_;
    const int batch_size_, capacity_;
    Interruption interruption_;
    std::unique_ptr<Memory> buffer_;
    std::size_t buffer_rows_ = 0;
    std::map<int, std::unique_ptr<KeysAndValues>> cached_;
    std::vector<std::int32_t> chosen_;  // by the last choice
};

Address ReferenceCache::buffer(std::size_t rows) {
    if (rows > buffer_rows_) {
        buffer_.reset();
        buffer_rows_ = 0;
        buffer_ = allocate(rows);
        buffer_rows_ = rows;
    }
    return buffer_->address();
}

KeysAndValues& ReferenceCache::cached(int block) {
    auto& found = cached_[block];
    if (!found) {
        const std::size_t size = at(batch_size_) * at(spec_.kv_heads) * at(capacity_) * at(spec_.head_dim);
        found.reset(new KeysAndValues{{engines_.account, size}, {engines_.account, size}});
    }
    return *found;
}

Address ReferenceCache::embed(Span<const std::int32_t> token_ids, const Rows& rows) {
    const Weights& weights = engines_.weights.graph("embed");
    const Tensor& table = weights.at("token_embedding", {spec_.vocab_size, spec_.hidden_size});
    const Tensor* const learned =
        spec_.rotary_dim ? nullptr : &weights.at("position_embedding", {0, spec_.hidden_size});
    const Address result = buffer(token_ids.size());
    const std::size_t width = at(spec_.hidden_size);
    for (std::size_t i = 0; i < token_ids.size(); ++i) {
        float* const out = floats(result) + i * width;
        std::copy_n(table.row(at(token_ids[i])), width, out);
        if (!learned) continue;
        const std::size_t position = at(rows.starts[i / at(rows.tokens)]) + i % at(rows.tokens);
        if (position >= learned->rows())
            throw backend_failure("position " + std::to_string(position) + " is beyond the model's " +
                                  std::to_string(learned->rows()));
        for (std::size_t j = 0; j < width; ++j) out[j] += learned->row(position)[j];
    }
    return result;
}

Address ReferenceCache::run_blocks(int first, int stop, Address hidden, const Rows& rows) {
    const std::size_t count = at(rows.count) * at(rows.tokens), width = at(spec_.hidden_size);
    const Address result = buffer_ && hidden == buffer_->address() ? hidden : buffer(count);
    if (result != hidden) copy(hidden, result, count);
    for (int block = first; block < stop; ++block) {
        interruption_();
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t row = i / at(rows.tokens);
            const int position = rows.starts[row] + static_cast<int>(i % at(rows.tokens));
            run_block(block, floats(result) + i * width, rows.first + static_cast<int>(row), position,
                      rows.long_context);
        }
    }
    return result;
}

void ReferenceCache::run_block(int block, float* hidden, int sequence, int position, bool long_context) {
    const Weights& weights = engines_.weights.graph(block_name(block));
    const std::int64_t width = spec_.hidden_size, attended = std::int64_t{spec_.heads} * spec_.head_dim;
    const std::int64_t inner_width = spec_.intermediate_size, up_width = inner_width * (spec_.gated ? 2 : 1);
    const std::int64_t qkv_width = attended + 2 * std::int64_t{spec_.kv_heads} * spec_.head_dim;
    const auto product = [&](const Row& x, const char* name, std::int64_t inputs, std::int64_t outputs) {
        return linear(x, weights.at(std::string(name) + ".weight", {inputs, outputs}),
                      weights.maybe(std::string(name) + ".bias", {outputs}));
    };
    const auto normed = [&](const Row& x, const std::string& part, NormPlace place) {
        if (!spec_.norms_are(place)) return x;
        const bool second = spec_.norms == NormPlace::both && place == NormPlace::after;
        return norm(spec_, x, weights, part + (second ? ".after_norm" : ".norm"));
    };
    Row states(hidden, hidden + width);
    Row qkv = product(normed(states, "attention", NormPlace::before), "attention.qkv", width, qkv_width);
    norm_queries_and_keys(weights, qkv);
    const Row mixed = attend(block, qkv, sequence, position, long_context);
    const Row out = normed(product(mixed, "attention.out", attended, width), "attention", NormPlace::after);
    const Row given = states;
    for (std::size_t i = 0; i < states.size(); ++i) states[i] += out[i];
    const Row up =
        product(normed(spec_.parallel ? given : states, "mlp", NormPlace::before), "mlp.up", width, up_width);
    Row inner(at(spec_.intermediate_size));
    for (std::size_t i = 0; i < inner.size(); ++i)
        inner[i] = activate(up[i], spec_.activation) * (spec_.gated ? up[i + inner.size()] : 1.0);
    const Row down = normed(product(inner, "mlp.down", inner_width, width), "mlp", NormPlace::after);
    for (std::size_t i = 0; i < states.size(); ++i) hidden[i] = static_cast<float>(states[i] + down[i]);
}

void ReferenceCache::norm_queries_and_keys(const Weights& weights, Row& qkv) const {
    if (spec_.qk_norm == QkNorm::none) return;
    const std::size_t dim = at(spec_.head_dim), queries = at(spec_.heads) * dim;
    norm_parts(spec_, qkv, 0, queries,
               weights.at("attention.q_norm.weight", {spec_.qk_norm_features(spec_.heads)}));
    norm_parts(spec_, qkv, queries, at(spec_.kv_heads) * dim,
               weights.at("attention.k_norm.weight", {spec_.qk_norm_features(spec_.kv_heads)}));
}

// Rotates, appends to the cache, attends: queries, keys and values of one token to what its heads mix.
Row ReferenceCache::attend(int block, Row& qkv, int sequence, int position, bool long_context) {
    KeysAndValues& kept = cached(block);
    const std::size_t dim = at(spec_.head_dim), capacity = at(capacity_);
    const std::size_t half = at(spec_.rotary_dim_of(block) / 2);
    if (half) {
        const bool second = (long_context && spec_.rotary_switch) || spec_.rotates_second(block);
        const std::size_t from = at(position) * half + (second ? engines_.cosines.size() / 2 : 0);
        for (int head = 0; head < spec_.heads + spec_.kv_heads; ++head)
            rotate(qkv.data() + at(head) * dim, spec_.rotary_dim, engines_.cosines.data() + from,
                   engines_.sines.data() + from);
    }
    const auto plane = [&](int kv_head) {
        return (at(sequence) * at(spec_.kv_heads) + at(kv_head)) * capacity * dim;
    };
    float* const keys = floats(kept.keys.address());
    float* const values = floats(kept.values.address());
    for (int kv_head = 0; kv_head < spec_.kv_heads; ++kv_head) {
        const double* const key = qkv.data() + at(spec_.heads + kv_head) * dim;
        const double* const value = qkv.data() + at(spec_.heads + spec_.kv_heads + kv_head) * dim;
        for (std::size_t i = 0; i < dim; ++i) {
            keys[plane(kv_head) + at(position) * dim + i] = static_cast<float>(key[i]);
            values[plane(kv_head) + at(position) * dim + i] = static_cast<float>(value[i]);
        }
    }
    Row mixed;
    for (int head = 0; head < spec_.heads; ++head) {
        const std::size_t from = plane(head / (spec_.heads / spec_.kv_heads));
        const Row part = mix(block, qkv.data() + at(head) * dim, keys + from, values + from, position);
        mixed.insert(mixed.end(), part.begin(), part.end());
    }
    return mixed;
}

// One head's values [capacity, head_dim], weighted by the softmax of its scores.
Row ReferenceCache::mix(int block, const double* query, const float* keys, const float* values,
                        int position) const {
    const std::size_t dim = at(spec_.head_dim);
    const double scale = spec_.attention_scales[at(block)];
    const std::optional<int> window = spec_.window_of(block);
    const int oldest = window ? std::max(0, position + 1 - *window) : 0;
    Row scores;
    for (int key = oldest; key <= position; ++key) {
        double dot = 0;
        for (std::size_t i = 0; i < dim; ++i) dot += query[i] * keys[at(key) * dim + i];
        scores.push_back(softcapped(dot * scale, spec_.attention_softcap));
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - largest);
    Row mixed(dim, 0.0);
    for (std::size_t key = 0; key < scores.size(); ++key)
        for (std::size_t i = 0; i < dim; ++i)
            mixed[i] += scores[key] / total * values[(at(oldest) + key) * dim + i];
    return mixed;
}

Row ReferenceCache::logits_of(const float* hidden, int blocks_run) const {
    const std::int64_t width = spec_.hidden_size, vocabulary = spec_.vocab_size;
    Row states(hidden, hidden + width);
    const Weights& final_head = engines_.weights.graph("final_head");
    if (blocks_run < spec_.blocks) {
        const Weights& weights = engines_.weights.graph("exit_head");
        const Tensor& project = weights.at("project", {width, 0});
        const std::int64_t rank = project.shape[1];
        const Row z = linear(states, project, &weights.at("project.bias", {rank}));
        const Tensor* const gates = weights.maybe("gates", {spec_.blocks - 1});
        if (!gates)  // folded with the final norm and the head
            return linear_transposed(root_mean_square(z, spec_.norm_epsilon),
                                     weights.at("vocabulary", {vocabulary, rank}),
                                     weights.maybe("vocabulary.bias", {vocabulary}));
        const Row jump = linear(z, weights.at("up", {rank, width}), nullptr);
        const double gate = gates->values[at(blocks_run - 1)];
        for (std::size_t i = 0; i < states.size(); ++i) states[i] += gate * jump[i];
    }
    return linear_transposed(norm(spec_, states, final_head, "final_norm"),
                             final_head.at("head", {vocabulary, width}), nullptr);
}

void ReferenceCache::logits(Address hidden, int count, int blocks_run, float* logits) {
    for (std::size_t row = 0; row < at(count); ++row) {
        const Row exact = logits_of(floats(hidden) + row * at(spec_.hidden_size), blocks_run);
        std::transform(exact.begin(), exact.end(), logits + row * exact.size(), [this](double logit) {
            return static_cast<float>(softcapped(logit, spec_.logit_softcap));
        });
    }
}

std::unique_ptr<Choices> ReferenceCache::choose(Address hidden, int count, int blocks_run,
                                                const Choosing& how) {
    const std::size_t width = at(spec_.vocab_size);
    std::vector<float> all(at(count) * width);
    logits(hidden, count, blocks_run, all.data());
    std::vector<Choice> rows;
    chosen_.clear();
    for (std::size_t row = 0; row < at(count); ++row) {
        rows.push_back(choice_of({all.data() + row * width, width}, row, how));
        chosen_.push_back(rows.back().token);
    }
    return std::make_unique<KnownChoices>(std::move(rows));
}

std::unique_ptr<Cache> ReferenceEngines::new_cache(int batch_size, int capacity, Interruption interruption) {
    return std::make_unique<ReferenceCache>(*this, batch_size, capacity, std::move(interruption));
}

std::unique_ptr<Engines> open_reference(const Bundle& bundle, const OpenOptions& options) {
    return std::make_unique<ReferenceEngines>(bundle, options);
}

}  // namespace

const BackendEntry& reference_backend() {
    static const BackendEntry entry = {BACKEND_INTERFACE, "reference", OJFA_VERSION, open_reference};
    return entry;
}

}  // namespace ojfa::core
