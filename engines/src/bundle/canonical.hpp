// The manifest's own digest: of its JSON as Python's json.dumps(sort_keys=True, separators=(",", ":")) has
// it.
#pragma once

#include <string>

namespace ojfa::core {

// The canonical text of a JSON object, without the member `left_out` of the outermost one. ASCII only, keys
// sorted by code point, numbers as Python's repr writes them.
// Throws std::runtime_error where the text is no JSON object, or nested deeper than a manifest ever is.
std::string canonical_json(const std::string& text, const std::string& left_out);

}  // namespace ojfa::core
