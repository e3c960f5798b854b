#include "bundle/canonical.hpp"

#include <charconv>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>
#include <vector>

namespace ojfa::core {
namespace {

constexpr std::size_t DEEPEST = 64;

// A string in quotes, as Python's ensure_ascii writes it. `text` is valid UTF-8: the parser has checked it.
std::string json_string(const std::string& text) {
    static const char* const digits = "0123456789abcdef";
    std::string out = "\"";
    const auto escape = [&out](unsigned unit) {
        out += "\\u";
        for (int shift = 12; shift >= 0; shift -= 4) out += digits[(unit >> shift) & 15];
    };
    for (std::size_t at = 0; at < text.size();) {
        const auto first = static_cast<unsigned char>(text[at]);
        const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
        std::uint32_t code = length == 1 ? first : first & (0x7fu >> length);
        for (std::size_t i = 1; i < length; ++i)
            code = code << 6 | (static_cast<unsigned char>(text[at + i]) & 63u);
        at += length;
        static const std::map<std::uint32_t, const char*> short_forms = {
            {'"', "\\\""}, {'\\', "\\\\"}, {'\n', "\\n"}, {'\r', "\\r"},
            {'\t', "\\t"}, {'\b', "\\b"},  {'\f', "\\f"}};
        const auto known = short_forms.find(code);
        if (known != short_forms.end()) {
            out += known->second;
        } else if (code >= 0x10000) {
            escape(0xd800 + ((code - 0x10000) >> 10));
            escape(0xdc00 + ((code - 0x10000) & 0x3ff));
        } else if (code < ' ' || code > '~') {
            escape(code);
        } else {
            out += static_cast<char>(code);
        }
    }
    return out + "\"";
}

// A double as Python's repr: the shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
std::string float_repr(double value) {
    char buffer[40];
    const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
    std::string digits(buffer, end);
    const std::size_t e = digits.find('e');
    const int exponent = std::stoi(digits.substr(e + 1));
    std::string mantissa = digits.substr(0, e), sign;
    if (mantissa[0] == '-') sign = "-", mantissa.erase(0, 1);
    if (exponent < -4 || exponent >= 16) {
        const std::string power = std::to_string(std::abs(exponent));
        return sign + mantissa + (exponent < 0 ? "e-" : "e+") + (power.size() < 2 ? "0" : "") + power;
    }
    if (mantissa.size() > 1) mantissa.erase(1, 1);
    if (exponent < 0)
        return sign + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + mantissa;
    const auto whole = static_cast<std::size_t>(exponent) + 1;
    if (mantissa.size() <= whole) return sign + mantissa + std::string(whole - mantissa.size(), '0') + ".0";
    return sign + mantissa.substr(0, whole) + "." + mantissa.substr(whole);
}

// Builds the canonical text while the parser goes through the JSON.
class Canonical : public nlohmann::json_sax<nlohmann::json> {
 public:
    explicit Canonical(std::string left_out) : left_out_(std::move(left_out)) {}

    std::string result;

    bool null() override { return add("null"); }
    bool boolean(bool value) override { return add(value ? "true" : "false"); }
    bool number_integer(number_integer_t value) override { return add(std::to_string(value)); }
    bool number_unsigned(number_unsigned_t value) override { return add(std::to_string(value)); }
    bool number_float(number_float_t value, const string_t& text) override {
        // Python's integers have no limit; the parser takes large ones for floats.
        return add(text.find_first_of(".eE") == std::string::npos ? text : float_repr(value));
    }
    bool string(string_t& value) override { return add(json_string(value)); }
    bool binary(binary_t&) override { return false; }
    bool start_object(std::size_t) override { return open(true); }
    bool start_array(std::size_t) override { return open(false); }
    bool key(string_t& value) override {
        levels_.back().key = value;
        return true;
    }
    bool end_object() override {
        const bool outermost = levels_.size() == 1;
        std::string text = "{";
        for (const auto& [name, value] : levels_.back().members)
            if (!outermost || name != left_out_)
                text += (text.size() > 1 ? "," : "") + json_string(name) + ":" + value;
        levels_.pop_back();
        return add(text + "}");
    }
    bool end_array() override {
        std::string text = "[" + levels_.back().elements + "]";
        levels_.pop_back();
        return add(std::move(text));
    }
    bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) override {
        throw std::runtime_error(error.what());
    }

 private:
    struct Level {
        bool object;
        std::string key, elements;
        std::map<std::string, std::string> members;  // of equal keys the last counts, as in Python
    };

    bool open(bool object) {
        if (levels_.size() == DEEPEST) throw std::runtime_error("it is nested too deeply");
        if (levels_.empty() && !object) throw std::runtime_error("it is no JSON object");
        levels_.push_back({object, {}, {}, {}});
        return true;
    }

    bool add(std::string text) {
        if (levels_.empty()) {
            result = std::move(text);
        } else if (levels_.back().object) {
            levels_.back().members[levels_.back().key] = std::move(text);
        } else {
            std::string& elements = levels_.back().elements;
            elements += (elements.empty() ? "" : ",") + text;
        }
        return true;
    }

    std::string left_out_;
    std::vector<Level> levels_;
};

}  // namespace

std::string canonical_json(const std::string& text, const std::string& left_out) {
    Canonical canonical(left_out);
    nlohmann::json::sax_parse(text, &canonical);
    if (canonical.result.empty() || canonical.result[0] != '{')
        throw std::runtime_error("it is no JSON object");
    return canonical.result;
}

}  // namespace ojfa::core
