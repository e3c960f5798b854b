// CUDA C++ on a CPU, as much of it as the tested kernels use: it takes the place of
// engines/kernels/common.cuh. A thread block's threads are fibers of one thread, so that a kernel's
// indices, barriers and masks can be tested where there is no GPU; nothing here says how fast it is.
// Thread blocks run one after the other, or all at once, each in its own thread.
#pragma once
#undef _FORTIFY_SOURCE  // whose longjmp refuses to go to another stack
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "element.cuh"

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __launch_bounds__(...)
using std::max;
using std::min;

constexpr int WIDE = 16 / sizeof(Element);
constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int SHARED_BYTES = 227 << 10;

struct Dimensions {
    unsigned x, y, z;
};
inline thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;
alignas(128) inline thread_local unsigned char shared_memory[SHARED_BYTES];
inline thread_local int used_bytes;
inline thread_local bool beside_others;  // thread blocks in threads of their own

// Whether a kernel wrote beyond the shared memory that it was launched with.
inline bool overrun(int from) {
    return std::any_of(shared_memory + from, shared_memory + SHARED_BYTES, [](auto byte) { return byte != 0xff; });
}

// Where all of a group's threads meet; the last to come does something for all.
struct Meeting {
    unsigned size = 0, arrived = 0, round = 0;
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
};

constexpr int STACK_BYTES = 128 << 10;

struct Fiber {
    jmp_buf where;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};  // not filled with zeros
    bool begun = false, done = false;
    std::vector<Copy> copies;                // of the group that is being made
    std::deque<std::vector<Copy>> on_their_way;  // groups, oldest first
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    jmp_buf scheduler;
    unsigned running = 0;
    std::function<void()> kernel;
};
inline thread_local Block block;

inline Fiber& this_fiber() { return block.fibers[block.running]; }

// By jumps, as swapcontext asks the system for the signal mask each time, which took most of the tests' time.
inline void let_others_run() {
    if (_setjmp(this_fiber().where) == 0) _longjmp(block.scheduler, 1);
}

template <class Work>
void meet(Meeting& meeting, Work work) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == meeting.size) {
        work();
        meeting.arrived = 0, ++meeting.round;
    }
    while (meeting.round == round) let_others_run();
}
inline Meeting& this_warp() { return block.warps[threadIdx.x / LANES]; }

inline void fiber_main() {
    block.kernel();
    this_fiber().done = true;
    let_others_run();
}

// Lets the running thread of the block go on until it waits or ends.
inline void run_fiber() {
    Fiber& fiber = this_fiber();
    if (_setjmp(block.scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.where, 1);
    fiber.begun = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.get();
    start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
}

inline void run_block() {
    const unsigned threads = blockDim.x;
    std::memset(shared_memory, 0xff, used_bytes);  // NaN, whatever the type
    block.fibers.resize(threads);  // stacks of the block before are used again
    for (Fiber& fiber : block.fibers) {
        fiber.begun = fiber.done = false;
        fiber.copies.clear(), fiber.on_their_way.clear();
    }
    block.warps.assign((threads + LANES - 1) / LANES, Meeting{LANES});
    block.all = Meeting{threads};
    for (bool alive = true; alive;) {
        alive = false;
        for (block.running = 0; block.running < threads; ++block.running) {
            if (this_fiber().done) continue;
            alive = true;
            threadIdx = {block.running, 0, 0};
            run_fiber();
        }
    }
}

template <class... Types, std::size_t... Indices>
std::function<void()> with(void (*kernel)(Types...), void* const* arguments, std::index_sequence<Indices...>) {
    return [=] { kernel(*static_cast<Types*>(arguments[Indices])...); };
}

template <class... Types>
void launch(void (*kernel)(Types...), const unsigned* grid, unsigned threads, void* const* arguments,
            int shared_bytes) {
    std::memset(shared_memory, 0xff, SHARED_BYTES);
    used_bytes = shared_bytes;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {threads, 1, 1};
    block.kernel = with(kernel, arguments, std::index_sequence_for<Types...>());
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
}

// All thread blocks at once: for kernels whose thread blocks wait for one another.
template <class... Types>
void launch_together(void (*kernel)(Types...), const unsigned* grid, unsigned threads, void* const* arguments) {
    std::vector<std::thread> blocks;
    for (unsigned x = 0; x < grid[0]; ++x)
        blocks.emplace_back([=] {
            beside_others = true;
            gridDim = {grid[0], 1, 1}, blockDim = {threads, 1, 1}, blockIdx = {x, 0, 0};
            block.kernel = with(kernel, arguments, std::index_sequence_for<Types...>());
            run_block();
        });
    for (std::thread& each : blocks) each.join();
}

inline void __syncthreads() { meet(block.all, [] {}); }
inline bool __syncthreads_or(bool x) {
    static thread_local bool any;
    __syncthreads();
    any = false;
    __syncthreads();
    any = any || x;
    __syncthreads();
    return any;
}
inline void __syncwarp() { meet(this_warp(), [] {}); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void wait_for_previous() {}
inline void let_next_start() {}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    static thread_local T values[2][1024];
    const unsigned thread = threadIdx.x;
    T* here = values[this_warp().round % 2];  // who comes late reads what the next shuffle leaves alone
    here[thread] = x;
    __syncwarp();
    return here[thread / LANES * LANES + lane];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return __shfl_sync(ALL, x, threadIdx.x % LANES ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
    const int lane = threadIdx.x % LANES;
    return __shfl_sync(ALL, x, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    static thread_local bool values[2][1024];
    const unsigned thread = threadIdx.x;
    bool* here = values[this_warp().round % 2];
    here[thread] = x;
    __syncwarp();
    unsigned bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= static_cast<unsigned>(here[thread / LANES * LANES + lane]) << lane;
    return bits;
}
inline bool __any_sync(unsigned, bool x) { return __ballot_sync(ALL, x) != 0; }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }
template <class T>
T atomicAdd(T* at, T x) {
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}


template <int WIDTH = LANES>
float lanes_sum(float x) {
    for (int offset = WIDTH / 2; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

inline unsigned atomicInc(unsigned* at, unsigned limit) {
    const unsigned old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
}

inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selected) {
    const std::uint64_t both = static_cast<std::uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (selected >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }

inline float __expf(float x) { return std::exp(x); }

inline float block_sum(float x) {
    static thread_local float sums[LANES];
    x = lanes_sum(x);
    __syncthreads();
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = x;
    __syncthreads();
    return lanes_sum(threadIdx.x % LANES < blockDim.x / LANES ? sums[threadIdx.x % LANES] : 0.0f);
}

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct alignas(16) Chunk {
    Element values[WIDE];
};
inline Chunk load(const Element* at) { return *reinterpret_cast<const Chunk*>(at); }
inline Chunk load_once(const Element* at, bool valid) { return valid ? load(at) : Chunk{}; }

template <class T>
T fresh(const T* at) {
    return *at;
}

inline unsigned long long load_word(const unsigned long long* at) {
    if (beside_others) std::this_thread::yield();  // it may be asked for again and again
    let_others_run();
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}
inline void store_word(unsigned long long* at, unsigned long long value) {
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
inline void store_word_for_host(unsigned long long* at, unsigned long long value) { store_word(at, value); }

inline int called_off;
constexpr int HALF_CALLED_OFF = 2;  // comes between thread blocks
inline bool is_called_off() { return called_off == HALF_CALLED_OFF ? blockIdx.x % 2 : called_off; }
