// What a backend is: it runs the engines of a bundle. Backends of a vendor's library are shared libraries of
// their own, loaded by `load_backend` after a handshake of versions.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"
#include "runtime/choice.hpp"
#include "span.hpp"

namespace ojfa::core {

// Where hidden states lie: fp32 rows of the model's hidden size, one behind the other. On the CPU a pointer,
// on a device an address there.
using Address = std::uintptr_t;

// Memory that a cache has given, until this object ends.
class Memory {
 public:
    virtual ~Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    Address address() const { return address_; }

 protected:
    Memory() = default;
    Address address_ = 0;
};

// Called between pieces of work; throws where the session was cancelled.
using Interruption = std::function<void()>;

// Tokens of some sequences that run together.
struct Rows {
    int first, count;                 // sequences [first, first + count)
    int tokens;                       // of each; 1 where there are several sequences
    Span<const std::int32_t> starts;  // [count] position of each one's first token here
    bool long_context;                // whether LongRoPE's long factors apply
};

// The keys and values of one session's sequences, with a stream of their own where the backend has streams.
// Used by one thread at a time. What it computes is in order; results on the host are there when a call
// returns.
class Cache {
 public:
    virtual ~Cache() = default;
    Cache() = default;
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;

    // Memory for hidden states [rows, H].
    virtual std::unique_ptr<Memory> allocate(std::size_t rows) = 0;

    // Copies hidden states of this many rows.
    virtual void copy(Address from, Address to, std::size_t rows) = 0;

    // Embeds tokens [rows, tokens] from their positions on: [rows, tokens, H], valid until the next call of
    // this or of run_blocks.
    virtual Address embed(Span<const std::int32_t> token_ids, const Rows& rows) = 0;

    // Runs blocks [first, stop) on new tokens [rows, tokens, H], each appending its keys and values at their
    // positions; what lay there is overwritten. The result is valid until the next call of this or of embed.
    virtual Address run_blocks(int first, int stop, Address hidden, const Rows& rows) = 0;

    // Copies hidden states [rows, tokens, H] to where later ones find them: `kept` [sequences, capacity, H],
    // at their sequences and positions.
    virtual void keep(Address kept, std::size_t capacity, Address hidden, const Rows& rows) = 0;

    // Logits [count, V] of the head after so many blocks, of hidden states [count, H].
    virtual void logits(Address hidden, int count, int blocks_run, float* logits) = 0;

    // Begins to choose tokens by that head.
    virtual std::unique_ptr<Choices> choose(Address hidden, int count, int blocks_run,
                                            const Choosing& how) = 0;

    // As embed, of the tokens that the last `choose` chooses, one of each row, which may not be known yet.
    // They follow the tokens of the pass that it chose by.
    virtual Address embed_chosen(const Rows& rows) = 0;
};

// `Cache::keep` by copies of rows of this many bytes.
inline void keep_by_copies(Cache& cache, Address kept, std::size_t capacity, Address hidden, const Rows& rows,
                           std::size_t row_bytes) {
    const auto tokens = static_cast<std::size_t>(rows.tokens);
    for (std::size_t i = 0; i < static_cast<std::size_t>(rows.count); ++i) {
        const std::size_t sequence = static_cast<std::size_t>(rows.first) + i;
        const std::size_t place = sequence * capacity + static_cast<std::size_t>(rows.starts[i]);
        cache.copy(hidden + i * tokens * row_bytes, kept + place * row_bytes, tokens);
    }
}

// Takes the weights of some blocks from their files as these are read to be checked.
class Loading {
 public:
    virtual ~Loading() = default;
    Loading() = default;
    Loading(const Loading&) = delete;
    Loading& operator=(const Loading&) = delete;

    // As core::Receive.
    virtual std::unique_ptr<Receiver> receive(const std::string& name) = 0;

    // All files were whole, and given whole.
    virtual void end() = 0;
};

// An opened model. Used by any number of threads.
class Engines {
 public:
    virtual ~Engines() = default;
    Engines() = default;
    Engines(const Engines&) = delete;
    Engines& operator=(const Engines&) = delete;

    // Loads the embedding and the first blocks.
    virtual void load_blocks(int depth) = 0;

    // Begins to load them from files that are about to be read; null where that saves nothing.
    virtual std::unique_ptr<Loading> begin_loading(int /*depth*/) { return nullptr; }

    // A cache for this many sequences of at most this many tokens. It may outlive a call, not this object.
    virtual std::unique_ptr<Cache> new_cache(int batch_size, int capacity, Interruption interruption) = 0;

    // Bytes on the device that weights and caches hold now.
    virtual std::uint64_t memory() const = 0;

    // What it runs on, as JSON.
    virtual std::string describe() const = 0;
};

struct OpenOptions {
    int device = 0;
    std::uint64_t memory_limit = 0;  // bytes; 0: none
};

// Raised whenever anything above, or what is passed through it, changes.
constexpr std::uint32_t BACKEND_INTERFACE = 3;

// What a backend's shared library says of itself, by the function `ojfa_backend_entry`. The fields up to
// `version` never change their place.
struct BackendEntry {
    std::uint32_t interface;  // BACKEND_INTERFACE when it was built
    const char* name;
    const char* version;  // of the library, as OJFA_VERSION
    std::unique_ptr<Engines> (*open)(const Bundle& bundle, const OpenOptions& options);
};

// A backend by name: "reference", which is part of this library, or one in a shared library, which is looked
// for at `library`, or beside this library and then where the linker looks. Throws Failure where it isn't
// there, can't be loaded, or is of another version.
const BackendEntry& load_backend(const std::string& name, const std::string& library);

}  // namespace ojfa::core
