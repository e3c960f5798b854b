// What the kernels of engines/kernels compute, one number after the other, with their parameters.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "binding.hpp"

namespace stand_in {
namespace {

using std::int64_t;
using std::size_t;

float widened(std::uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                                     : std::ldexp(static_cast<float>(fraction), -24);
    return half >> 15 ? -magnitude : magnitude;
}

std::uint16_t narrowed(float value) {  // to nearest; the tests have no infinities
    const float magnitude = std::fabs(value);
    const int exponent = magnitude < std::ldexp(1.0f, -14) ? -14 : std::ilogb(magnitude);
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    const int bits = units + ((exponent + 14) << 10);
    return static_cast<std::uint16_t>(bits | (std::signbit(value) ? 1 << 15 : 0));
}

constexpr int PAGE = 64;  // as in tiles.cuh

// What attention is given.
struct Attended {
    Program& program;
    const float* qkv;
    void *keys, *values;
    const float *cosines, *sines;
    const int *positions, *sequences;
    const int* table;
    int most_pages;

    int dim() const { return program.at("HEAD_DIM"); }

    // A head's features of a token, queries first, then keys, then values; rotated where it isn't a value.
    std::vector<double> head(int token, int index) const {
        const int heads = program.at("HEADS"), kv_heads = program.at("KV_HEADS");
        const float* const from = qkv + at(token) * at((heads + 2 * kv_heads) * dim()) + index * dim();
        std::vector<double> out(from, from + dim());
        const int half = cosines && index < heads + kv_heads ? program.at("ROTARY_DIM") / 2 : 0;
        for (int i = 0; i < half; ++i) {
            const size_t angle = at(positions[token]) * at(half) + at(i);
            const double one = out[at(i)], other = out[at(i + half)];
            out[at(i)] = one * cosines[angle] - other * sines[angle];
            out[at(i + half)] = other * cosines[angle] + one * sines[angle];
        }
        return out;
    }
    size_t place(int token, int kv_head, int position) const {
        const int index = sequences[token] * most_pages + position / PAGE;
        const int plane = (table ? table[index] : index) * program.at("KV_HEADS") + kv_head;
        return (at(plane) * at(PAGE) + at(position % PAGE)) * at(dim());
    }
    void append(int token) const {
        const int heads = program.at("HEADS"), kv_heads = program.at("KV_HEADS");
        for (int kv = 0; kv < kv_heads; ++kv) {
            const auto key = head(token, heads + kv), value = head(token, heads + kv_heads + kv);
            for (size_t i = 0; i < key.size(); ++i) {
                program.write(keys, place(token, kv, positions[token]) + i, static_cast<float>(key[i]));
                program.write(values, place(token, kv, positions[token]) + i, static_cast<float>(value[i]));
            }
        }
    }
    void attend(void* out, float scale, int token, int index) const {
        const int heads = program.at("HEADS"), kv = index / (heads / program.at("KV_HEADS"));
        const int window = program.at("WINDOW"), last = positions[token];
        const auto query = head(token, index);
        std::vector<double> mixed(at(dim())), scores;
        const int oldest = window ? std::max(0, last + 1 - window) : 0;
        double total = 0;
        for (int key = oldest; key <= last; ++key) {
            double sum = 0;
            for (size_t i = 0; i < query.size(); ++i)
                sum += query[i] * program.read(keys, place(token, kv, key) + i);
            scores.push_back(sum * scale);
        }
        const double largest = *std::max_element(scores.begin(), scores.end());
        for (int key = oldest; key <= last; ++key) {
            const double weight = std::exp(scores[at(key - oldest)] - largest);
            total += weight;
            for (size_t i = 0; i < mixed.size(); ++i)
                mixed[i] += weight * program.read(values, place(token, kv, key) + i);
        }
        for (size_t i = 0; i < mixed.size(); ++i)
            program.write(out, (at(token) * at(heads) + at(index)) * at(dim()) + i,
                          static_cast<float>(mixed[i] / total));
    }
};

// As in choose.cuh.
constexpr int SLOTS = 8, ROWS = 64, WORDS = 5;
struct Desk {
    int tokens[ROWS];
    unsigned answers, finished;
    float largest[ROWS];
};
struct Mail {
    std::uint64_t answers[SLOTS][ROWS][WORDS];
    struct {
        double draw, top_p;
        float temperature;
        int top_k;
    } drawings[SLOTS][ROWS];
};

template <class Value>
std::uint64_t word(Value value, unsigned answer) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return std::uint64_t{answer} << 32 | bits;
}

void store(std::uint64_t* to, std::uint64_t word) {
    __atomic_store_n(to, word, __ATOMIC_RELEASE);
}

void give(Program& program, const float* logits, int vocabulary, int rows, Desk* desk, Mail* mail,
          int measure, double threshold, int sampled) {
    const unsigned answer = desk->answers + 1;
    bool all_sure = measure >= 0;
    for (int row = 0; row < rows; ++row, logits += vocabulary) {
        const float* const best = std::max_element(logits, logits + vocabulary);
        double total = 0, products = 0;
        float second = -1e30f;
        for (const float* each = logits; each < logits + vocabulary; ++each) {
            total += std::exp(static_cast<double>(*each) - *best);
            products += std::exp(static_cast<double>(*each) - *best) * (static_cast<double>(*each) - *best);
            if (each != best) second = std::max(second, *each);
        }
        const float said[] = {static_cast<float>(1 / total),
                              static_cast<float>((1 - std::exp(static_cast<double>(second) - *best)) / total),
                              static_cast<float>(products / total - std::log(total))};
        const int index = static_cast<int>(best - logits);
        std::uint64_t* const words = mail->answers[(answer - 1) % SLOTS][row];
        desk->tokens[row] = index;
        desk->largest[row] = *best;
        all_sure = all_sure && said[measure] >= threshold;
        for (int i = 0; i < 3; ++i) store(words + 2 + i, word(said[i], answer));
        store(words + 1, word(index, answer));
        if (!sampled) store(words, word(index, answer));
    }
    if (all_sure) program.called_off = 1;
    if (!sampled) desk->answers = answer;
}

// A draw after temperature, top-k and top-p, as runtime/sampling.cpp has it.
int drawn(const float* logits, int vocabulary, float temperature, int top_k, double top_p, double draw) {
    std::vector<int> order(at(vocabulary));
    for (int i = 0; i < vocabulary; ++i) order[at(i)] = i;
    std::stable_sort(order.begin(), order.end(), [=](int a, int b) { return logits[a] > logits[b]; });
    const auto weight = [&](int i) {
        return std::exp((static_cast<double>(logits[i]) - logits[order[0]]) /
                        static_cast<double>(temperature));
    };
    double total = 0, before = 0, kept = 0;
    for (int rank = 0; rank < top_k; ++rank) total += weight(order[at(rank)]);
    std::vector<double> shares(at(vocabulary));
    for (int rank = 0; rank < top_k && (top_p == 1 || before < top_p); ++rank) {
        shares[at(order[at(rank)])] = weight(order[at(rank)]);
        kept += weight(order[at(rank)]);
        before += weight(order[at(rank)]) / total;
    }
    double reached = 0;
    for (int i = 0; i < vocabulary; ++i)
        if ((reached += shares[at(i)]) > draw * kept) return i;
    return order[0];
}

void embed(Program& program, const Launch& launch, float* hidden, const void* table, const void* learned,
           const int* ids, const int* positions, int* positions_out, int steps, int features,
           const int* chosen) {
    for (int token = 0; token < launch.x; ++token) {
        const int position = positions[token] + steps;
        const int id = ids[token] < 0 ? chosen[-1 - ids[token]] : ids[token];
        positions_out[token] = position;
        for (int i = 0; i < features; ++i)
            hidden[token * features + i] =
                program.read(table, at(id) * at(features) + at(i)) +
                (learned ? program.read(learned, at(position) * at(features) + at(i)) : 0.0f);
    }
}

// Of a step, by thread blocks of few warps or of many.
void attention(Program& program, const Launch& launch, void* out, const float* qkv, void* keys, void* values,
               const float* cosines, const float* sines, const int* positions, const int* sequences,
               const int* table, int most_pages, float scale, int tokens, int most_new, const int* chunks,
               float*, unsigned*) {
    if (program.called_off) return;
    if (chunks) throw std::logic_error("no runtime in C++ lists chunks");
    const Attended all{program, qkv, keys, values, cosines, sines, positions, sequences, table, most_pages};
    for (int token = 0; token < launch.z * tokens; ++token) {
        if (tokens <= most_new) all.append(token);
        for (int head = 0; head < program.at("HEADS"); ++head) all.attend(out, scale, token, head);
    }
}

void norm_queries_and_keys(Program& program, const Launch& launch, float* qkv, const float* queries,
                           const float* keys, float epsilon) {
    const int heads = program.at("HEADS"), kv_heads = program.at("KV_HEADS"), dim = program.at("HEAD_DIM");
    for (int token = 0; token < launch.x; ++token) {
        for (int head = 0; head < heads + kv_heads; ++head) {
            float* const from = qkv + at(token * (heads + 2 * kv_heads) + head) * at(dim);
            double squares = 0;
            for (int i = 0; i < dim; ++i) squares += double{from[i]} * double{from[i]};
            const double scale = 1 / std::sqrt(squares / dim + epsilon);
            for (int i = 0; i < dim; ++i)
                from[i] = static_cast<float>(from[i] * scale * (head < heads ? queries : keys)[i]);
        }
    }
}

void keep(Program&, const Launch& launch, float* kept, const float* hidden, const int* positions,
          const int* sequences, int capacity, int features) {
    for (int token = 0; token < launch.x; ++token)
        std::copy_n(hidden + token * features, features,
                    kept + (at(sequences[token]) * at(capacity) + at(positions[token])) * at(features));
}

void exit_check(Program& program, const Launch& launch, float* logits, const float* hidden,
                const float* project, const float* bias, const void* vocabulary, const float* vocabulary_bias,
                std::uint64_t*, int features, int rank, int columns, int outputs, float epsilon, float* kept,
                const int* positions, const int* sequences, int capacity, Desk* desk, Mail* mail, int measure,
                double threshold, int sampled) {
    const int tokens = launch.tokens;
    std::vector<float> z(at(tokens * rank)), all(at(tokens) * at(outputs));
    for (int token = 0; token < tokens; ++token)
        for (int row = 0; row < rank; ++row) {
            double sum = bias[row];
            for (int i = 0; i < features; ++i)
                sum += static_cast<double>(hidden[token * features + i]) * project[row * features + i];
            z[at(token * rank + row)] = static_cast<float>(sum);
        }
    norm_linear(program, all.data(), z.data(), tokens, nullptr, nullptr, epsilon, rank, vocabulary,
                vocabulary_bias, columns, outputs);
    if (logits) std::copy(all.begin(), all.end(), logits);
    if (kept) keep(program, {tokens, 1, 1, tokens}, kept, hidden, positions, sequences, capacity, features);
    give(program, all.data(), outputs, tokens, desk, mail, measure, threshold, sampled);
}

}  // namespace

Program Program::parse(const char* text, size_t most) {
    std::istringstream lines(std::string(text, strnlen(text, most)));
    std::string name;
    Program program;
    int number = 0;
    while (lines >> name >> number && name != "end") program.numbers[name] = number;
    if (name != "end") throw std::runtime_error("it is no program of the stand-in");
    return program;
}

float Program::read(const void* elements, size_t index) const {
    if (!at("HALF")) return static_cast<const float*>(elements)[index];
    return widened(static_cast<const std::uint16_t*>(elements)[index]);
}

void Program::write(void* elements, size_t index, float value) const {
    if (!at("HALF")) {
        static_cast<float*>(elements)[index] = value;
    } else {
        static_cast<std::uint16_t*>(elements)[index] = narrowed(value);
    }
}

const std::map<std::string, Kernel>& kernels() {
    using std::uint64_t;
    static const std::map<std::string, Kernel> by_name = with_products({
        {"embed", kernel(embed)},
        {"keep", kernel(keep)},
        {"exit_check", kernel(exit_check)},
        {"exit_check_beside", kernel(exit_check)},
        {"go_on", kernel(+[](Program& program, const Launch&) { program.called_off = 0; })},
        {"transpose",
         kernel(+[](Program& program, const Launch&, void* out, const void* in, int rows, int columns) {
             for (int row = 0; row < rows; ++row)
                 for (int column = 0; column < columns; ++column)
                     std::memcpy(
                         static_cast<char*>(out) + at(column * rows + row) * program.element_bytes(),
                         static_cast<const char*>(in) + at(row * columns + column) * program.element_bytes(),
                         program.element_bytes());
         })},
        {"append", kernel(+[](Program& program, const Launch& launch, const float* qkv, void* keys,
                              void* values, const float* cosines, const float* sines, const int* positions,
                              const int* sequences, const int* table, int most_pages) {
             const Attended all{program, qkv,       keys,      values, cosines,
                                sines,   positions, sequences, table,  most_pages};
             for (int token = 0; token < launch.x; ++token) all.append(token);
         })},
        {"norm_queries_and_keys", kernel(norm_queries_and_keys)},
        {"attention", kernel(attention)},
        {"wide_attention", kernel(attention)},
        {"prompt_attention",
         kernel(+[](Program& program, const Launch&, void* out, const float* qkv, void* keys, void* values,
                    const float* cosines, const float* sines, const int* positions, const int* sequences,
                    const int* table, int most_pages, float scale, int tokens, const int* chunks) {
             if (chunks) throw std::logic_error("no runtime in C++ lists chunks");
             const Attended all{program, qkv,       keys,      values, cosines,
                                sines,   positions, sequences, table,  most_pages};
             for (int token = 0; token < tokens; ++token)
                 for (int head = 0; head < program.at("HEADS"); ++head) all.attend(out, scale, token, head);
         })},
        {"choose", kernel(+[](Program& program, const Launch& launch, const float* logits, int vocabulary,
                              Desk* desk, Mail* mail, int measure, double threshold, int sampled) {
             give(program, logits, vocabulary, launch.y, desk, mail, measure, threshold, sampled);
         })},
        {"sample", kernel(+[](Program&, const Launch& launch, const float* logits, int vocabulary, Desk* desk,
                              Mail* mail) {
             const unsigned answer = ++desk->answers, slot = (answer - 1) % SLOTS;
             for (int row = 0; row < launch.x; ++row) {
                 const auto& how = mail->drawings[slot][row];
                 if (how.temperature > 0)
                     desk->tokens[row] =
                         drawn(logits + at(row) * at(vocabulary), vocabulary, how.temperature,
                               how.top_k ? std::min(how.top_k, vocabulary) : vocabulary, how.top_p, how.draw);
                 store(mail->answers[slot][row], word(desk->tokens[row], answer));
             }
         })},
    });
    return by_name;
}

}  // namespace stand_in
