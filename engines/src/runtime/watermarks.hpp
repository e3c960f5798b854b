// How many tokens of one sequence each block has processed.
#pragma once

#include <vector>

namespace ojfa::core {

// Marks of all blocks, non-increasing with depth. Blocks in a row mostly have the same mark, so that they are
// kept as a few spans: what a pass does per span it need not do per block.
class Watermarks {
 public:
    struct Span {
        int first, stop;  // blocks [first, stop)
        int mark;
    };

    explicit Watermarks(int blocks) : spans_{{blocks, 0}} {}

    int operator[](int block) const;

    // Blocks 0 .. depth-1 in runs of equal marks.
    std::vector<Span> spans(int depth) const;

    // Whether the first blocks all have this mark.
    bool all_at(int mark, int depth) const { return spans_[0].mark == mark && spans_[0].stop >= depth; }

    // Raises the first blocks to a mark that none of all blocks exceeds.
    void raise_to(int mark, int depth);

    // Lowers every mark that is higher.
    void lower_to(int mark);

 private:
    struct End {
        int stop, mark;
    };
    std::vector<End> spans_;
};

}  // namespace ojfa::core
