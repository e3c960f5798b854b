// Command lines of the programs: what is shared between them. They use the public interface alone.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "ojfa/ojfa.hpp"

namespace tools {

// A command line that can't be understood.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Options "--name value", "--name" alone for the names in `flags`, and one operand.
class CommandLine {
 public:
    CommandLine(int argc, char** argv, const std::set<std::string>& known,
                const std::set<std::string>& flags);

    const std::string& operand() const { return operand_; }
    bool has(const std::string& name) const { return values_.count(name) > 0; }
    const std::vector<std::string>& all(const std::string& name) const;
    std::string text(const std::string& name, const std::string& otherwise) const;
    long integer(const std::string& name, long otherwise) const;
    double number(const std::string& name, double otherwise) const;

 private:
    std::string operand_;
    std::map<std::string, std::vector<std::string>> values_;
};

// "5,6,7" as token ids.
ojfa::TokenIds token_ids(const std::string& text);

// "full", "auto" or a number.
ojfa::Exit exit_of(const std::string& text);

// --backend, --backend-library, --device, --no-golden.
ojfa::LoadOptions load_options(const CommandLine& line);
extern const std::set<std::string> LOAD_OPTIONS, LOAD_FLAGS;

// Runs a program's body; errors become a message and the exit status of ojfa-export.
int run(const char* usage, int argc, char** argv, int (*body)(int, char**));

}  // namespace tools
