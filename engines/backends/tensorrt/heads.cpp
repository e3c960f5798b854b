#include "heads.hpp"

#include <algorithm>
#include <cstring>

namespace ojfa::tensorrt {
namespace {

// As in the kernels of choose.cu, sample.cu and exit_check.cu.
constexpr unsigned CHOOSE_PARTS = 32, CHOOSE_THREADS = 512, SAMPLE_THREADS = 1024;
constexpr unsigned CHECK_THREADS = 512, BESIDE_THREADS = 128, KEEP_THREADS = 256;
constexpr int MOST_CHECK_RANK = 128;
constexpr std::uint64_t KEEP = 100;  // a kind of work in recordings' keys, as those of cache.cpp
// Floats that a shortcut's projection needs at most, a token.
constexpr std::size_t MOST_RANK = 8192;

std::size_t rows_of(int width) {
    return static_cast<std::size_t>(Mailbox::MOST_ROWS) * static_cast<std::size_t>(width) * sizeof(float);
}

CUdeviceptr row_of(CUdeviceptr address, int row, int width) {
    return address + static_cast<CUdeviceptr>(row) * static_cast<CUdeviceptr>(width) * sizeof(float);
}

template <class Value>
std::uint64_t bits_of(Value value) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

std::size_t parts_bytes(const Device& device) {
    return static_cast<std::size_t>(device.multiprocessors) * MOST_TOKENS * MOST_CHECK_RANK * 8;
}

}  // namespace

Key Asked::key() const {
    return {bits_of(measure), bits_of(threshold), bits_of(sampled)};
}

Key Keeping::key() const {
    // Positions and sequences always lie in the same place for as many tokens.
    return {KEEP, kept, hidden, bits_of(capacity), bits_of(tokens)};
}

Heads::Heads(TensorRtEngines& engines, Lent& lent, Stream& stream, const Mailbox& mailbox)
    : engines_(engines),
      lent_(lent),
      stream_(stream),
      mailbox_(mailbox),
      logits_(engines.device, rows_of(engines.spec.vocab_size)),
      z_(engines.device, MOST_TOKENS * MOST_RANK * sizeof(float)),
      jumped_(engines.device, rows_of(engines.spec.hidden_size)),
      normed_(engines.device, rows_of(engines.spec.hidden_size)),
      z_parts_(engines.device, parts_bytes(engines.device)) {
    stream.clear(logits_.address(), logits_.bytes());
    // What was in this memory before may look like words of an answer to come.
    stream.clear(z_parts_.address(), z_parts_.bytes());
}

void Heads::prepare(int count, int blocks_run) {
    const bool early = blocks_run < engines_.spec.blocks, gates = engines_.has_gates();
    if (!early || gates) engines_.final_head();
    if (early && gates) engines_.residual_head(blocks_run);
    if (early && !gates) engines_.folded_head();
    // Folded heads have kernels for fewer tokens than the model's own.
    const bool in_kernels = early && !gates ? count <= MOST_TOKENS : engines_.in_kernels(count);
    if (!in_kernels) lent_.open_engines(stream_.handle());
}

bool Heads::checks_in_one(int count, int blocks_run) const {
    if (blocks_run == engines_.spec.blocks || engines_.has_gates() || count > MOST_TOKENS) return false;
    const FoldedHead& head = engines_.folded_head();
    return head.rank <= MOST_CHECK_RANK && head.project_precision == "fp32" &&
           head.vocabulary_precision == engines_.precision;
}

void Heads::run(CUdeviceptr hidden, int count, int blocks_run) {
    if (blocks_run == engines_.spec.blocks) {
        run_final(hidden, count);
    } else if (engines_.has_gates()) {
        run_residual(hidden, count, blocks_run);
    } else {
        run_folded(hidden, count);
    }
}

void Heads::choose(CUdeviceptr hidden, int count, int blocks_run, const Asked& asked,
                   const Keeping& keeping) {
    if (checks_in_one(count, blocks_run)) {
        check_in_one(hidden, count, asked, keeping);
    } else {
        if (keeping.kept) keep(keeping);
        run(hidden, count, blocks_run);
        choose_by_logits(count, asked);
    }
    if (asked.sampled) sample(count);
}

void Heads::keep(const Keeping& keeping) {
    lent_.kernels->launch(stream_.handle(),
                          {"keep", {static_cast<unsigned>(keeping.tokens), 1, 1}, {KEEP_THREADS, 1}, 0, true},
                          keeping.kept, keeping.hidden, keeping.positions, keeping.sequences,
                          keeping.capacity, engines_.spec.hidden_size);
}

void Heads::run_final(CUdeviceptr hidden, int count) {
    if (!engines_.in_kernels(count)) return run_engine("final_head", hidden, count);
    const FinalHead& head = engines_.final_head();
    engines_.with_products(count, *lent_.kernels, normed_.address(), [&](const auto& kernels) {
        kernels.norm_linear(stream_.handle(), logits_.address(), hidden, count, engines_.spec.hidden_size,
                            head.norm, head.matrix, 0);
    });
}

void Heads::run_folded(CUdeviceptr hidden, int count) {
    if (count > MOST_TOKENS) return run_engine("exit_head", hidden, count);
    const FoldedHead& head = engines_.folded_head();
    linear(head.project_precision)
        .linear(stream_.handle(), z_.address(), 0, hidden, count, head.project, head.project_bias.address());
    const Norm norm = {0, 0, static_cast<float>(engines_.spec.norm_epsilon)};
    linear(head.vocabulary_precision)
        .norm_linear(stream_.handle(), logits_.address(), z_.address(), count, head.rank, norm,
                     head.vocabulary, head.vocabulary_bias.address());
}

void Heads::run_residual(CUdeviceptr hidden, int count, int blocks_run) {
    const ResidualHead& head = engines_.residual_head(blocks_run);
    const LinearKernels kernels = linear("fp32");
    const int width = engines_.spec.hidden_size;
    for (int at = 0; at < count; at += MOST_TOKENS) {
        const int tokens = std::min(MOST_TOKENS, count - at);
        const CUdeviceptr part = row_of(hidden, at, width), jumped = row_of(jumped_.address(), at, width);
        kernels.linear(stream_.handle(), z_.address(), 0, part, tokens, head.project, head.bias.address());
        kernels.linear(stream_.handle(), jumped, part, z_.address(), tokens, head.up, 0);
    }
    run_final(jumped_.address(), count);
}

void Heads::run_engine(const std::string& head, CUdeviceptr hidden, int count) {
    std::vector<std::pair<std::string, CUdeviceptr>> fixed;
    for (const auto& [name, array] : engines_.weights(head)) fixed.emplace_back(name, array.address());
    lent_.engine_set->run(stream_.handle(), engines_.plan(head).engines.at(head), count,
                          {{"hidden", hidden, engines_.spec.hidden_size}, {"logits", logits_.address(), 0}},
                          fixed);
}

void Heads::check_in_one(CUdeviceptr hidden, int count, const Asked& asked, const Keeping& keeping) {
    const FoldedHead& head = engines_.folded_head();
    const auto blocks = static_cast<unsigned>(engines_.device.multiprocessors);
    // Where the answer decides about more, the next block runs at the same time.
    const bool beside = asked.measure >= 0;
    lent_.kernels->launch(stream_.handle(),
                          {(beside ? "exit_check_beside_" : "exit_check_") + std::to_string(count),
                           {blocks, 1, 1},
                           {beside ? BESIDE_THREADS : CHECK_THREADS, 1},
                           0,
                           true},
                          asked.sampled ? logits_.address() : 0, hidden, head.project.address(),
                          head.project_bias.address(), head.vocabulary.address(),
                          head.vocabulary_bias.address(), z_parts_.address(), engines_.spec.hidden_size,
                          head.rank, head.vocabulary.columns(), head.vocabulary.rows(),
                          static_cast<float>(engines_.spec.norm_epsilon), keeping.kept, keeping.positions,
                          keeping.sequences, keeping.capacity, mailbox_.desk(), mailbox_.mail(),
                          asked.measure, asked.threshold, static_cast<int>(asked.sampled));
}

void Heads::choose_by_logits(int count, const Asked& asked) {
    lent_.kernels->launch(
        stream_.handle(),
        {"choose", {CHOOSE_PARTS, static_cast<unsigned>(count), 1}, {CHOOSE_THREADS, 1}, 0, true},
        logits_.address(), engines_.spec.vocab_size, mailbox_.desk(), mailbox_.mail(), asked.measure,
        asked.threshold, static_cast<int>(asked.sampled));
}

void Heads::sample(int count) {
    lent_.kernels->launch(stream_.handle(),
                          {"sample", {static_cast<unsigned>(count), 1, 1}, {SAMPLE_THREADS, 1}, 0, true},
                          logits_.address(), engines_.spec.vocab_size, mailbox_.desk(), mailbox_.mail());
}

LinearKernels Heads::linear(const std::string& kind) const {
    return engines_.linear(kind, *lent_.kernels);
}

}  // namespace ojfa::tensorrt
