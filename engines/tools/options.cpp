#include "options.hpp"

#include <cstring>
#include <iostream>

namespace tools {

const std::set<std::string> LOAD_OPTIONS = {"--backend", "--backend-library", "--device", "--memory-limit"};
const std::set<std::string> LOAD_FLAGS = {"--no-golden"};

namespace {

template <class Number, class Parse>
Number parsed(const std::string& name, const std::string& text, Parse parse) {
    try {
        std::size_t used = 0;
        const Number value = parse(text, &used);
        if (used == text.size()) return value;
    } catch (const std::exception&) {  // no number, or out of range: below
    }
    throw UsageError(name + ": '" + text + "' is no number");
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

long CommandLine::integer(const std::string& name, long otherwise) const {
    const auto parse = [](const std::string& text, std::size_t* used) { return std::stol(text, used); };
    return has(name) ? parsed<long>(name, all(name).back(), parse) : otherwise;
}

double CommandLine::number(const std::string& name, double otherwise) const {
    const auto parse = [](const std::string& text, std::size_t* used) { return std::stod(text, used); };
    return has(name) ? parsed<double>(name, all(name).back(), parse) : otherwise;
}

ojfa::TokenIds token_ids(const std::string& text) {
    ojfa::TokenIds ids;
    const auto parse = [](const std::string& each, std::size_t* used) { return std::stoi(each, used); };
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(',', start), text.size());
        ids.push_back(parsed<int>("--ids", text.substr(start, end - start), parse));
        start = end + 1;
    }
    return ids;
}

ojfa::Exit exit_of(const std::string& text) {
    if (text == "full") return ojfa::Exit::full();
    if (text == "auto") return ojfa::Exit::automatic();
    const auto parse = [](const std::string& each, std::size_t* used) { return std::stoi(each, used); };
    const int blocks = parsed<int>("--exit", text, parse);
    if (blocks < 1) throw UsageError("--exit: '" + text + "' is not full, auto, or a number of blocks");
    return blocks;
}

ojfa::LoadOptions load_options(const CommandLine& line) {
    ojfa::LoadOptions options;
    options.backend = line.text("--backend", "tensorrt");
    options.backend_library = line.text("--backend-library", "");
    options.device = static_cast<int>(line.integer("--device", 0));
    options.memory_limit = static_cast<std::uint64_t>(line.integer("--memory-limit", 0));
    options.check_golden = !line.has("--no-golden");
    return options;
}

int run(const char* usage, int argc, char** argv, int (*body)(int, char**)) {
    for (int i = 1; i < argc; ++i)
        if (!std::strcmp(argv[i], "--help")) return std::cout << usage, 0;
    try {
        return body(argc, argv);
    } catch (const UsageError& error) {
        std::cerr << "error: " << error.what() << "\n" << usage;
        return 2;
    } catch (const ojfa::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        if (!error.hint().empty()) std::cerr << "hint: " << error.hint() << "\n";
        return error.status() == OJFA_ERROR_USAGE ? 2 : 1;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}

}  // namespace tools
