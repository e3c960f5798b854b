#include "runtime/watermarks.hpp"

#include <algorithm>

namespace ojfa::core {

int Watermarks::operator[](int block) const {
    const auto holds = [block](const End& span) { return block < span.stop; };
    return std::find_if(spans_.begin(), spans_.end(), holds)->mark;
}

std::vector<Watermarks::Span> Watermarks::spans(int depth) const {
    std::vector<Span> result;
    int first = 0;
    for (const End& span : spans_) {
        if (first >= depth) break;
        result.push_back({first, std::min(span.stop, depth), span.mark});
        first = span.stop;
    }
    return result;
}

void Watermarks::raise_to(int mark, int depth) {
    const auto deeper =
        std::find_if(spans_.begin(), spans_.end(), [depth](const End& span) { return span.stop > depth; });
    if (deeper != spans_.end() && deeper->mark == mark) {
        spans_.erase(spans_.begin(), deeper);
    } else if (deeper == spans_.begin()) {
        spans_.insert(spans_.begin(), {depth, mark});
    } else {
        *(deeper - 1) = {depth, mark};
        spans_.erase(spans_.begin(), deeper - 1);
    }
}

void Watermarks::lower_to(int mark) {
    const auto lower =
        std::find_if(spans_.begin(), spans_.end(), [mark](const End& span) { return span.mark < mark; });
    if (lower == spans_.begin()) return;
    *(lower - 1) = {(lower - 1)->stop, mark};
    spans_.erase(spans_.begin(), lower - 1);
}

}  // namespace ojfa::core
