// Reading a JSON object whose every member is known: what is missing, of another type or unknown is refused
// by its place in the document.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace ojfa::core {

using Json = nlohmann::json;

class Fields {
 public:
    // Throws std::runtime_error, as all members do, where `value` is no object.
    Fields(const Json& value, std::string place);

    // A member that must be there.
    const Json& at(const std::string& name);
    // A member that may be absent or null: then a null pointer.
    const Json* maybe(const std::string& name);

    std::string text(const std::string& name);
    std::string one_of(const std::string& name, const std::vector<std::string>& known);
    std::int64_t integer(const std::string& name, std::int64_t least,
                         std::int64_t most = std::numeric_limits<std::int32_t>::max());
    double number(const std::string& name);
    bool truth(const std::string& name);
    std::string sha256(const std::string& name);
    Fields object(const std::string& name);
    std::vector<Fields> objects(const std::string& name);
    std::vector<std::string> texts(const std::string& name);
    std::vector<std::int32_t> integers(const std::string& name);
    std::vector<double> numbers(const std::string& name);
    std::vector<bool> truths(const std::string& name);

    // To be called when all members were asked for: refuses those that weren't.
    void done() const;

    [[noreturn]] void fail(const std::string& name, const std::string& what) const;
    const Json& json() const { return *value_; }
    const std::string& place() const { return place_; }

 private:
    const Json& array(const std::string& name);
    std::string inside(const std::string& name) const { return place_.empty() ? name : place_ + "." + name; }

    const Json* value_;
    std::string place_;
    std::set<std::string> asked_;
};

}  // namespace ojfa::core
