#include "options.hpp"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <system_error>

namespace tools {

const std::set<std::string> LOAD_OPTIONS = {"--backend", "--backend-library", "--device", "--memory-limit"};
const std::set<std::string> LOAD_FLAGS = {"--no-golden"};

namespace {

// The whole text as a number: no spaces, no sign but a minus.
template <class Number>
Number parsed(const std::string& name, const std::string& text) {
    Number value{};
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (text.empty() || stop != end || error == std::errc::invalid_argument)
        throw UsageError(name + ": '" + text + "' is no number");
    if (error == std::errc::result_out_of_range)
        throw UsageError(name + ": " + text + " is too large a number");
    return value;
}

}  // namespace

CommandLine::CommandLine(int argc, char** argv, const std::set<std::string>& known,
                         const std::set<std::string>& flags) {
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (flags.count(word)) {
            values_[word].push_back("");
        } else if (known.count(word)) {
            if (++i == argc) throw UsageError(word + " needs a value");
            values_[word].emplace_back(argv[i]);
        } else if (word.rfind("--", 0) == 0) {
            throw UsageError("no such option: " + word);
        } else if (!operand_.empty()) {
            throw UsageError("got unexpected argument: " + word);
        } else {
            operand_ = word;
        }
    }
    if (operand_.empty()) throw UsageError("BUNDLE is missing");
}

const std::vector<std::string>& CommandLine::all(const std::string& name) const {
    static const std::vector<std::string> none;
    const auto found = values_.find(name);
    return found == values_.end() ? none : found->second;
}

std::string CommandLine::text(const std::string& name, const std::string& otherwise) const {
    return has(name) ? all(name).back() : otherwise;
}

std::int64_t CommandLine::integer(const std::string& name, std::int64_t otherwise, std::int64_t least,
                                  std::int64_t most) const {
    if (!has(name)) return otherwise;
    const auto value = parsed<std::int64_t>(name, all(name).back());
    if (value < least)
        throw UsageError(name + " must be " + std::to_string(least) + " or more, not " +
                         std::to_string(value));
    if (value > most)
        throw UsageError(name + " must be " + std::to_string(most) + " or less, not " +
                         std::to_string(value));
    return value;
}

double CommandLine::number(const std::string& name, double otherwise) const {
    return has(name) ? parsed<double>(name, all(name).back()) : otherwise;
}

void check_top_k(std::int64_t top_k) {
    if (top_k < 1)
        throw UsageError("top-k must be 1 or more, not " + std::to_string(top_k),
                         "leave it out to sample among all tokens");
}

std::uint64_t seed_of(const std::string& text) {
    if (!text.empty() && text[0] == '-')
        throw UsageError("seed must be 0 or more, not " + text, "leave it out for seed 0");
    return parsed<std::uint64_t>("--seed", text);
}

ojfa::TokenIds token_ids(const std::string& text) {
    ojfa::TokenIds ids;
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(',', start), text.size());
        ids.push_back(parsed<std::int32_t>("--ids", text.substr(start, end - start)));
        start = end + 1;
    }
    return ids;
}

ojfa::Exit exit_of(const std::string& text) {
    if (text == "full") return ojfa::Exit::full();
    if (text == "auto") return ojfa::Exit::automatic();
    const auto blocks = parsed<std::int32_t>("--exit", text);
    if (blocks < 1) throw UsageError("--exit: '" + text + "' is not full, auto, or a number of blocks");
    return blocks;
}

ojfa::LoadOptions load_options(const CommandLine& line) {
    ojfa::LoadOptions options;
    options.backend = line.text("--backend", "tensorrt");
    options.backend_library = line.text("--backend-library", "");
    options.device = line.count("--device", 0, 0);
    options.memory_limit = static_cast<std::uint64_t>(
        line.integer("--memory-limit", 0, 0, std::numeric_limits<std::int64_t>::max()));
    options.check_golden = !line.has("--no-golden");
    return options;
}

namespace {

// A message as a terminal may show it: control characters, separators of lines and marks of direction, which
// a name in a manifest can hold, as escapes.
std::string printable(const std::string& text) {
    std::ostringstream shown;
    shown << std::hex << std::setfill('0');
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto byte = [&](std::size_t at) {
            return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u;
        };
        const unsigned first = byte(i), second = byte(i + 1), third = byte(i + 2);
        const unsigned two = ((first & 0x1f) << 6) | (second & 0x3f);
        const unsigned three = ((first & 0xf) << 12) | ((second & 0x3f) << 6) | (third & 0x3f);
        const bool marks = (three >= 0x2028 && three <= 0x202e) || (three >= 0x2066 && three <= 0x2069);
        if (first < 0x20 || first == 0x7f) {
            shown << "\\x" << std::setw(2) << first;
        } else if (first == 0xc2 && two >= 0x80 && two < 0xa0) {
            shown << "\\x" << std::setw(2) << two, i += 1;
        } else if (first == 0xe2 && marks) {
            shown << "\\u" << std::setw(4) << three, i += 2;
        } else {
            shown << text[i];
        }
    }
    return shown.str();
}

void tell(const std::string& message, const std::string& hint) {
    std::cerr << "error: " << printable(message) << "\n";
    if (!hint.empty()) std::cerr << "hint: " << printable(hint) << "\n";
}

}  // namespace

int run(const char* usage, int argc, char** argv, int (*body)(int, char**)) {
    for (int i = 1; i < argc; ++i)
        if (!std::strcmp(argv[i], "--help")) return std::cout << usage, 0;
    try {
        return body(argc, argv);
    } catch (const UsageError& error) {
        tell(error.what(), error.hint());
        if (error.hint().empty()) std::cerr << usage;
        return 2;
    } catch (const ojfa::Error& error) {
        tell(error.what(), error.hint());
        return error.status() == OJFA_ERROR_USAGE ? 2 : 1;
    } catch (const std::exception& error) {
        tell(error.what(), "");
        return 1;
    }
}

}  // namespace tools
