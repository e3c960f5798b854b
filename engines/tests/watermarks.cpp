#include "runtime/watermarks.hpp"

#include "fixtures.hpp"

using ojfa::core::Watermarks;

// Against a plain list of marks, through random raises and drops.
TEST(Watermarks, LikeAPlainList) {
    std::mt19937 random = fixtures::random_numbers();
    for (int trial = 0; trial < 50; ++trial) {
        const int blocks = 1 + static_cast<int>(random() % 8);
        Watermarks marks(blocks);
        std::vector<int> plain(static_cast<std::size_t>(blocks), 0);
        for (int step = 0; step < 60; ++step) {
            const int depth = 1 + static_cast<int>(random() % static_cast<unsigned>(blocks));
            if (random() % 3) {
                const int mark = plain[0] + static_cast<int>(random() % 3);
                marks.raise_to(mark, depth);
                std::fill_n(plain.begin(), depth, mark);
            } else {
                const int mark = static_cast<int>(random() % static_cast<unsigned>(plain[0] + 1));
                marks.lower_to(mark);
                for (int& each : plain) each = std::min(each, mark);
            }
            for (int block = 0; block < blocks; ++block)
                ASSERT_EQ(marks[block], plain[static_cast<std::size_t>(block)]);
            int next = 0;
            for (const auto& span : marks.spans(depth)) {
                ASSERT_EQ(span.first, next);
                ASSERT_LT(span.first, span.stop);
                for (int block = span.first; block < span.stop; ++block) ASSERT_EQ(marks[block], span.mark);
                next = span.stop;
            }
            ASSERT_EQ(next, depth);
            const bool level = plain[static_cast<std::size_t>(depth) - 1] == plain[0];
            ASSERT_EQ(marks.all_at(plain[0], depth), level);
        }
    }
}
