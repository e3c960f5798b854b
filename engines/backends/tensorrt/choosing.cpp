// How a session on the GPU asks heads: for logits, or for choices, with the next block begun ahead of an
// exit's check.
#include <algorithm>
#include <cstring>
#include <utility>

#include "cache.hpp"

namespace ojfa::tensorrt {
namespace {

std::size_t at(int index) {
    return static_cast<std::size_t>(index);
}

std::uint64_t number(int value) {
    return static_cast<std::uint64_t>(value);
}

}  // namespace

// Choices of a launch that may not have ended.
class TensorRtCache::OnTheirWay : public core::Choices {
 public:
    OnTheirWay(TensorRtCache& cache, int count, std::optional<core::Measure> measure)
        : cache_(cache),
          answer_(cache.mailbox_.expect()),
          launch_(cache.stream_.launches()),
          count_(count),
          measure_(measure) {}

    const std::vector<core::Choice>& wait() override {
        while (rows_.size() < at(count_))
            rows_.push_back(cache_.mailbox_.read(answer_, static_cast<int>(rows_.size()), measure_));
        cache_.ended_ = std::max(cache_.ended_, launch_);
        return rows_;
    }

 private:
    TensorRtCache& cache_;
    const std::uint32_t answer_;
    const std::uint64_t launch_;
    const int count_;
    const std::optional<core::Measure> measure_;
    std::vector<core::Choice> rows_;
};

void TensorRtCache::logits(core::Address hidden, int count, int blocks_run, float* logits) {
    engines_.device.make_current();
    if (ahead_) call_off();
    for (int start = 0; start < count; start += Mailbox::MOST_ROWS) {
        const int rows = std::min(Mailbox::MOST_ROWS, count - start);
        heads_.prepare(rows, blocks_run);
        const CUdeviceptr states = in_place(hidden + at(start) * row_bytes_, rows);
        const std::size_t width = at(engines_.spec.vocab_size), bytes = at(rows) * width * sizeof(float);
        stream_.add({LOGITS, states, number(rows), number(blocks_run)}, [this, states, rows, blocks_run,
                                                                         bytes] {
            heads_.run(states, rows, blocks_run);
            check(driver().cuMemcpyDtoHAsync(logits_.as<void>(), heads_.logits(), bytes, stream_.handle()),
                  "copying logits");
        });
        stream_.synchronize();
        ended_ = stream_.launches();
        std::memcpy(logits + at(start) * width, logits_.as<void>(), bytes);
    }
}

std::unique_ptr<core::Choices> TensorRtCache::choose(core::Address hidden, int count, int blocks_run,
                                                     const core::Choosing& how) {
    std::unique_ptr<core::Choices> choices;
    guarded([&] {
        engines_.device.make_current();
        if (ahead_) call_off();
        chosen_.clear();
        choices = count > Mailbox::MOST_ROWS ? choose_in_parts(hidden, count, blocks_run, how)
                                             : choose_rows(hidden, count, blocks_run, how);
    });
    return choices;
}

// Makes sure that nothing is believed of what an operation has begun that failed.
void TensorRtCache::forget() noexcept {
    last_.reset();
    for (auto& step : steps_) step.second->forget();
    if (prompt_) prompt_->forget();
    try {
        stream_.settle();
        engines_.forget_check();
        mailbox_.reset();
    } catch (...) {  // the device is lost, and says so again
    }
}

std::unique_ptr<core::Choices> TensorRtCache::choose_in_parts(CUdeviceptr hidden, int count, int blocks_run,
                                                              const core::Choosing& how) {
    std::vector<core::Choice> choices;
    for (int start = 0; start < count; start += Mailbox::MOST_ROWS) {
        const std::size_t rows = at(std::min(Mailbox::MOST_ROWS, count - start));
        core::Choosing part = how;
        if (!how.draws.empty()) part.draws = {how.draws.data() + start, rows};
        part.stop.reset();
        const auto chosen =
            choose_rows(hidden + at(start) * row_bytes_, static_cast<int>(rows), blocks_run, part);
        const std::vector<core::Choice>& known = chosen->wait();
        choices.insert(choices.end(), known.begin(), known.end());
    }
    for (const core::Choice& choice : choices) chosen_.push_back(choice.token);
    return std::make_unique<core::KnownChoices>(std::move(choices));
}

std::unique_ptr<core::Choices> TensorRtCache::choose_rows(CUdeviceptr hidden, int count, int blocks_run,
                                                          const core::Choosing& how) {
    heads_.prepare(count, blocks_run);
    const CUdeviceptr states = in_place(hidden, count);
    const Asked question = asked(how, count);
    Keeping keeping;
    if (keeping_.kept && keeping_.hidden == states && keeping_.tokens == count &&
        stream_.take_back(keeping_.key()))
        keeping = keeping_;
    keeping_ = {};
    const bool in_one = heads_.checks_in_one(count, blocks_run);
    if (question.measure >= 0) blocks_.open(how.stop->first);
    if (in_one && engines_.has_several_sessions()) stream_.flush();  // the others needn't wait for all this
    Key key = {CHOOSE, states, number(count), number(blocks_run)};
    for (const Key& more : {question.key(), keeping.kept ? keeping.key() : Key()})
        key.insert(key.end(), more.begin(), more.end());
    const auto choice = [this, states, count, blocks_run, question, keeping] {
        heads_.choose(states, count, blocks_run, question, keeping);
    };
    if (question.measure < 0) {
        stream_.add(key, choice);
    } else {
        ahead_ = how.stop->first;
        const Work then = blocks_of_step(*ahead_, *ahead_ + 1, count, last_->long_context);
        key.insert(key.end(), then.key.begin(), then.key.end());
        stream_.add(key, [this, choice, in_one, run = then.run] {
            if (in_one) return stream_.beside(choice, run);
            choice();
            run();
        });
    }
    mailbox_.leave(how.sampling, how.draws);
    if (in_one) {
        const std::uint32_t answer = mailbox_.next();
        engines_.launch_check(stream_, mailbox_.first_word(answer), answer);
    } else {
        stream_.flush();
    }
    return std::make_unique<OnTheirWay>(*this, count, how.measure);
}

// What kernels are asked. A check calls off the block that is begun with it: TensorRT's engines can't be
// called off.
Asked TensorRtCache::asked(const core::Choosing& how, int count) const {
    Asked result;
    if (how.stop && how.measure && last_ && count <= MOST_TOKENS) {
        result.measure = static_cast<int>(*how.measure);
        result.threshold = how.stop->threshold;
    }
    result.sampled = !how.sampling.greedy();
    return result;
}

// Hidden states where they always lie, as recordings refer to them.
CUdeviceptr TensorRtCache::in_place(CUdeviceptr hidden, int count) {
    if (last_ && last_->holds(hidden, count)) return hidden;
    last_.reset();
    stream_.copy(hidden, states_.address(), at(count) * row_bytes_);
    return states_.address();
}

}  // namespace ojfa::tensorrt
