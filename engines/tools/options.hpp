// Command lines of the programs: what is shared between them. They use the public interface alone.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ojfa/ojfa.hpp"

namespace tools {

// A command line that can't be understood, and perhaps what to do about it; else the usage says that.
class UsageError : public std::runtime_error {
 public:
    explicit UsageError(const std::string& message, std::string hint = {})
        : std::runtime_error(message), hint_(std::move(hint)) {}

    const std::string& hint() const { return hint_; }

 private:
    std::string hint_;
};

constexpr std::int64_t ANY_COUNT = std::numeric_limits<std::int32_t>::max();

// Options "--name value", "--name" alone for the names in `flags`, and one operand.
class CommandLine {
 public:
    CommandLine(int argc, char** argv, const std::set<std::string>& known,
                const std::set<std::string>& flags);

    const std::string& operand() const { return operand_; }
    bool has(const std::string& name) const { return values_.count(name) > 0; }
    const std::vector<std::string>& all(const std::string& name) const;
    std::string text(const std::string& name, const std::string& otherwise) const;
    // Whole numbers; throws UsageError for one below `least` or above `most`.
    std::int64_t integer(const std::string& name, std::int64_t otherwise, std::int64_t least,
                         std::int64_t most = ANY_COUNT) const;
    int count(const std::string& name, int otherwise, int least = 1) const {
        return static_cast<int>(integer(name, otherwise, least));
    }
    double number(const std::string& name, double otherwise) const;

 private:
    std::string operand_;
    std::map<std::string, std::vector<std::string>> values_;
};

// "5,6,7" as token ids.
ojfa::TokenIds token_ids(const std::string& text);

// Throws UsageError for what Python's `Sampling` refuses and this library can't be given, or takes for "all".
void check_top_k(std::int64_t top_k);
std::uint64_t seed_of(const std::string& text);

// "full", "auto" or a number.
ojfa::Exit exit_of(const std::string& text);

// --backend, --backend-library, --device, --no-golden.
ojfa::LoadOptions load_options(const CommandLine& line);
extern const std::set<std::string> LOAD_OPTIONS, LOAD_FLAGS;

// Runs a program's body; errors become a message and the exit status of ojfa-export.
int run(const char* usage, int argc, char** argv, int (*body)(int, char**));

}  // namespace tools
