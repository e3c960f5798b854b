#include "bundle/fields.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace ojfa::core {

Fields::Fields(const Json& value, std::string place) : value_(&value), place_(std::move(place)) {
    if (!value.is_object()) throw std::runtime_error(place_ + ": it is no object");
}

void Fields::fail(const std::string& name, const std::string& what) const {
    throw std::runtime_error(inside(name) + ": " + what);
}

const Json& Fields::at(const std::string& name) {
    asked_.insert(name);
    const auto found = value_->find(name);
    if (found == value_->end()) fail(name, "it is missing");
    return *found;
}

const Json* Fields::maybe(const std::string& name) {
    asked_.insert(name);
    const auto found = value_->find(name);
    return found == value_->end() || found->is_null() ? nullptr : &*found;
}

std::string Fields::text(const std::string& name) {
    const Json& value = at(name);
    if (!value.is_string()) fail(name, "it is no text");
    return value.get<std::string>();
}

std::string Fields::one_of(const std::string& name, const std::vector<std::string>& known) {
    std::string value = text(name);
    if (std::find(known.begin(), known.end(), value) == known.end())
        fail(name, "'" + value + "' is not known");
    return value;
}

std::int64_t Fields::integer(const std::string& name, std::int64_t least, std::int64_t most) {
    const Json& value = at(name);
    if (!value.is_number_integer()) fail(name, "it is no integer");
    const bool large = value.is_number_unsigned() &&
                       value.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()};
    const std::int64_t number = large ? 0 : value.get<std::int64_t>();
    if (large || number < least || number > most)
        fail(name, "it is outside " + std::to_string(least) + ".." + std::to_string(most));
    return number;
}

double Fields::number(const std::string& name) {
    const Json& value = at(name);
    if (!value.is_number()) fail(name, "it is no number");
    return value.get<double>();
}

bool Fields::truth(const std::string& name) {
    const Json& value = at(name);
    if (!value.is_boolean()) fail(name, "it is neither true nor false");
    return value.get<bool>();
}

std::string Fields::sha256(const std::string& name) {
    std::string value = text(name);
    if (value.size() != 64 || value.find_first_not_of("0123456789abcdef") != std::string::npos)
        fail(name, "it is no SHA-256");
    return value;
}

Fields Fields::object(const std::string& name) {
    return Fields(at(name), inside(name));
}

const Json& Fields::array(const std::string& name) {
    const Json& value = at(name);
    if (!value.is_array()) fail(name, "it is no list");
    return value;
}

std::vector<Fields> Fields::objects(const std::string& name) {
    std::vector<Fields> result;
    for (const Json& each : array(name))
        result.emplace_back(each, inside(name) + "." + std::to_string(result.size()));
    return result;
}

std::vector<std::string> Fields::texts(const std::string& name) {
    std::vector<std::string> result;
    for (const Json& each : array(name)) {
        if (!each.is_string()) fail(name, "it holds something else than text");
        result.push_back(each.get<std::string>());
    }
    return result;
}

std::vector<std::int32_t> Fields::integers(const std::string& name) {
    std::vector<std::int32_t> result;
    for (const Json& each : array(name)) {
        const bool fits = each.is_number_integer() && each >= std::numeric_limits<std::int32_t>::min() &&
                          each <= std::numeric_limits<std::int32_t>::max();
        if (!fits) fail(name, "it holds something else than integers");
        result.push_back(each.get<std::int32_t>());
    }
    return result;
}

std::vector<bool> Fields::truths(const std::string& name) {
    std::vector<bool> result;
    for (const Json& value : array(name)) {
        if (!value.is_boolean()) fail(name, "one of it is neither true nor false");
        result.push_back(value.get<bool>());
    }
    return result;
}

std::vector<double> Fields::numbers(const std::string& name) {
    std::vector<double> result;
    for (const Json& each : array(name)) {
        if (!each.is_number()) fail(name, "it holds something else than numbers");
        result.push_back(each.get<double>());
    }
    return result;
}

void Fields::done() const {
    for (const auto& member : value_->items())
        if (!asked_.count(member.key())) fail(member.key(), "it is not known");
}

}  // namespace ojfa::core
