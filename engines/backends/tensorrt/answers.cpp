#include "answers.hpp"

#include <algorithm>
#include <cstring>

#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

// As in engines/kernels/choose.cuh: what is told of a row, each four bytes with the number of the answer.
enum { TOKEN, LIKELIEST, TOP, MARGIN, ENTROPY, ANSWER_WORDS };
constexpr std::size_t MAIL_SLOTS = 8, ROWS = Answers::MOST_ROWS;
constexpr std::size_t MAIL_BYTES = MAIL_SLOTS * ROWS * (ANSWER_WORDS + 1) * 8;
constexpr std::size_t MOST_PARTS = 1024, PART_BYTES = 5 * 8;
constexpr std::size_t DESK_BYTES = 4 * ROWS + 2 * 4 + 4 * ROWS + MOST_PARTS * PART_BYTES;
constexpr unsigned CHOOSE_PARTS = 32, CHOOSE_THREADS = 512;
// Looks for an answer between two at the stream's state.
constexpr unsigned LOOKS_AT_STREAM = 1 << 14;
// Floats that a shortcut's projection needs at most, a token.
constexpr std::size_t MOST_RANK = 8192;

std::size_t rows_of(int width) {
    return static_cast<std::size_t>(Answers::MOST_ROWS) * static_cast<std::size_t>(width) * sizeof(float);
}

CUdeviceptr row_of(CUdeviceptr address, int row, int width) {
    return address + static_cast<CUdeviceptr>(row) * static_cast<CUdeviceptr>(width) * sizeof(float);
}

}  // namespace

Answers::Answers(TensorRtEngines& engines, Stream& stream)
    : engines_(engines),
      stream_(stream),
      states_(engines.device, rows_of(engines.spec.hidden_size)),
      logits_(engines.device, rows_of(engines.spec.vocab_size)),
      z_(engines.device, MOST_TOKENS * MOST_RANK * sizeof(float)),
      jumped_(engines.device, rows_of(engines.spec.hidden_size)),
      desk_(engines.device, DESK_BYTES),
      mail_(engines.device, MAIL_BYTES),
      logits_host_(engines.device, rows_of(engines.spec.vocab_size)) {
    std::memset(mail_.as<char>(), 0, MAIL_BYTES);
    stream.clear(desk_.address(), DESK_BYTES);
    stream.clear(logits_.address(), logits_.bytes());
}

void Answers::ask(CUdeviceptr hidden, bool in_place, int count, int blocks_run,
                  const core::HeadOutputs& outputs, std::unique_ptr<EngineSet>& engine_set) {
    const bool chosen = outputs.likeliest || outputs.confidence, copied = outputs.logits != nullptr;
    if (count > MOST_TOKENS && !engine_set) engine_set = engines_.engine_set(stream_.handle());
    if (!in_place) {
        stream_.copy(hidden, states_.address(), row_of(0, count, engines_.spec.hidden_size));
        hidden = states_.address();
    }
    // What a head needs is made before it may be recorded.
    if (blocks_run == engines_.spec.blocks || engines_.has_gates()) engines_.final_head();
    if (blocks_run < engines_.spec.blocks && engines_.has_gates()) engines_.residual_head(blocks_run);
    if (blocks_run < engines_.spec.blocks && !engines_.has_gates()) engines_.folded_head();
    const std::size_t size = row_of(0, count, engines_.spec.vocab_size);
    const auto number = [](auto value) { return static_cast<std::uint64_t>(value); };
    stream_.add({3, hidden, number(count), number(blocks_run), number(chosen), number(copied)},
                [this, hidden, count, blocks_run, chosen, copied, size, &engine_set] {
                    run(hidden, count, blocks_run, engine_set.get());
                    if (chosen) choose(count);
                    if (copied)
                        check(driver().cuMemcpyDtoHAsync(logits_host_.as<void>(), logits_.address(), size,
                                                         stream_.handle()),
                              "copying logits");
                });
    if (chosen) ++given_;
    // What the device tells by itself is sooner known than the end of all work.
    copied ? stream_.synchronize() : stream_.flush();
    if (copied) std::memcpy(outputs.logits, logits_host_.as<void>(), size);
    for (int row = 0; chosen && row < count; ++row) read(row, outputs);
}

// Waits for an answer of a row.
void Answers::read(int row, const core::HeadOutputs& outputs) {
    const std::size_t slot = (given_ - 1) % MAIL_SLOTS;
    const std::uint64_t* const words =
        mail_.as<std::uint64_t>() + (slot * ROWS + static_cast<std::size_t>(row)) * ANSWER_WORDS;
    const auto await = [&](int which) {
        for (unsigned looks = 1;; ++looks) {
            const std::uint64_t word = __atomic_load_n(words + which, __ATOMIC_ACQUIRE);
            if (word >> 32 == given_) return static_cast<std::uint32_t>(word);
            if (looks % LOOKS_AT_STREAM == 0) stream_.check_alive();
        }
    };
    if (outputs.likeliest) outputs.likeliest[row] = static_cast<std::int32_t>(await(LIKELIEST));
    if (!outputs.confidence) return;
    const std::uint32_t bits = await(outputs.measure == core::Measure::top      ? TOP
                                     : outputs.measure == core::Measure::margin ? MARGIN
                                                                                : ENTROPY);
    float said;
    std::memcpy(&said, &bits, sizeof said);
    outputs.confidence[row] = said;
}

void Answers::run(CUdeviceptr hidden, int count, int blocks_run, EngineSet* engine_set) {
    if (blocks_run == engines_.spec.blocks) {
        run_final(hidden, count, engine_set);
    } else if (engines_.has_gates()) {
        run_residual(hidden, count, blocks_run, engine_set);
    } else {
        run_folded(hidden, count, engine_set);
    }
}

void Answers::run_final(CUdeviceptr hidden, int count, EngineSet* engine_set) {
    if (count > MOST_TOKENS) return run_engine("final_head", hidden, count, *engine_set);
    const FinalHead& head = engines_.final_head();
    engines_.linear(engines_.precision)
        .norm_linear(stream_.handle(), logits_.address(), hidden, count, engines_.spec.hidden_size, head.norm,
                     head.matrix, 0);
}

void Answers::run_folded(CUdeviceptr hidden, int count, EngineSet* engine_set) {
    if (count > MOST_TOKENS) return run_engine("exit_head", hidden, count, *engine_set);
    const FoldedHead& head = engines_.folded_head();
    engines_.linear(head.project_precision)
        .linear(stream_.handle(), z_.address(), 0, hidden, count, head.project, head.project_bias.address());
    const Norm norm = {0, 0, static_cast<float>(engines_.spec.norm_epsilon)};
    engines_.linear(head.vocabulary_precision)
        .norm_linear(stream_.handle(), logits_.address(), z_.address(), count, head.rank, norm,
                     head.vocabulary, head.vocabulary_bias.address());
}

void Answers::run_residual(CUdeviceptr hidden, int count, int blocks_run, EngineSet* engine_set) {
    const ResidualHead& head = engines_.residual_head(blocks_run);
    const LinearKernels linear = engines_.linear("fp32");
    const int width = engines_.spec.hidden_size;
    for (int at = 0; at < count; at += MOST_TOKENS) {
        const int tokens = std::min(MOST_TOKENS, count - at);
        const CUdeviceptr part = row_of(hidden, at, width), jumped = row_of(jumped_.address(), at, width);
        linear.linear(stream_.handle(), z_.address(), 0, part, tokens, head.project, head.bias.address());
        linear.linear(stream_.handle(), jumped, part, z_.address(), tokens, head.up, 0);
    }
    run_final(jumped_.address(), count, engine_set);
}

void Answers::run_engine(const std::string& head, CUdeviceptr hidden, int count, EngineSet& engine_set) {
    std::vector<std::pair<std::string, CUdeviceptr>> fixed;
    for (const auto& [name, array] : engines_.weights(head)) fixed.emplace_back(name, array.address());
    engine_set.run(stream_.handle(), engines_.plan(head).engines.at(head), count,
                   {{"hidden", hidden, engines_.spec.hidden_size}, {"logits", logits_.address(), 0}}, fixed);
}

void Answers::choose(int count) {
    engines_.main_kernels().launch(
        stream_.handle(),
        {"choose", {CHOOSE_PARTS, static_cast<unsigned>(count), 1}, {CHOOSE_THREADS, 1}, 0, true},
        logits_.address(), engines_.spec.vocab_size, desk_.address(),
        reinterpret_cast<CUdeviceptr>(mail_.as<void>()), -1, 0.0, 0);
}

}  // namespace ojfa::tensorrt
