// Sequences and their watermarks, and the one pass that everything else is made of; see
// ojfa_export/runtime/sequences.py, whose decisions these are.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "backend/backend.hpp"
#include "runtime/watermarks.hpp"

namespace ojfa::core {

using TokenRows = std::vector<Span<const std::int32_t>>;  // new tokens of each sequence
using Wanted = std::vector<char>;                         // whether each sequence is

// Hidden states [rows, tokens, H] of neighbouring sequences.
struct States {
    Address address = 0;
    int tokens = 0;
};

class Sequences {
 public:
    // `keep_final` is whether to keep what comes out of the last block.
    Sequences(const ModelSpec& spec, Engines& engines, int batch_size, int max_length, bool keep_final,
              Interruption interruption);
    virtual ~Sequences() = default;
    Sequences(const Sequences&) = delete;
    Sequences& operator=(const Sequences&) = delete;

    const ModelSpec& spec() const { return spec_; }
    int batch_size() const { return static_cast<int>(tokens_.size()); }
    int max_length() const { return max_length_; }
    int length(int row) const { return static_cast<int>(tokens_[static_cast<std::size_t>(row)].size()); }
    const std::vector<std::int32_t>& tokens(int row) const { return tokens_[static_cast<std::size_t>(row)]; }
    int watermark(int block, int row) const { return marks_[static_cast<std::size_t>(row)][block]; }

    // Drops a sequence's tokens after the first `length`. Throws Failure for a row that isn't there, or more
    // tokens than it has.
    virtual void rewind(int length, int row);

    // Throws Failure where tokens are not the model's, have no room, or are not of each sequence.
    void check(const TokenRows& tokens) const;

 protected:
    struct Group {
        int first, stop;  // sequences [first, stop)
    };

    // Takes tokens that were checked, which then wait before the first block.
    void append(const TokenRows& tokens);
    // Sequences that can run together: those whose one token waits before the same block.
    std::vector<Group> groups(const Wanted& wanted, int depth) const;
    // Runs the first blocks on all that waits before them: hidden states of the group's newest tokens.
    States deepen(Group group, int depth, const Wanted& wanted);
    // Runs the first blocks, which must have processed every token, on one more of each sequence: those of
    // the newest choice, wherever the backend has them. The sequences don't show it before `take_ahead`.
    Address run_ahead(int depth);
    // Takes the tokens of the last `run_ahead`, nothing having been done since.
    void take_ahead(const TokenRows& tokens);
    bool long_context(int row) const;

    Cache& cache() { return *cache_; }
    Address row_of(Address address, std::size_t rows) const { return address + rows * row_bytes_; }
    // Of the last block's kept hidden states.
    Address final_state(int row, int position) const;
    void check_interruption() const { interruption_(); }

 private:
    std::optional<int> entry(int row, int depth) const;
    void resize(int row, int length);
    States embed(Group group, const std::vector<std::int32_t>& starts);
    States waiting(int depth, Group group, const std::vector<std::int32_t>& starts, int count, States newer);
    void keep(int depth, const Rows& rows, Address states);
    Address kept_row(const Memory& kept, int row, int position) const;
    Address joined(std::size_t rows);

    const ModelSpec& spec_;
    const int max_length_;
    const std::size_t row_bytes_;
    const bool keep_final_;
    Interruption interruption_;
    std::unique_ptr<Cache> cache_;
    std::vector<std::vector<std::int32_t>> tokens_;
    std::vector<Watermarks> marks_;
    // Hidden states that came out of so many blocks, [sequences, max_length, H]: they wait for the next
    // block. Those of all blocks wait for nothing, and are kept only where asked.
    std::map<int, std::unique_ptr<Memory>> kept_;
    // The last pass of one token of each of some sequences, whose result lies where it was computed.
    struct Newest {
        int depth = 0;  // 0: there is none
        Group group{};
        std::vector<std::int32_t> starts;
        Address address = 0;
    } newest_, ran_ahead_;
    std::unique_ptr<Memory> joined_;
    std::size_t joined_rows_ = 0;
};

}  // namespace ojfa::core
