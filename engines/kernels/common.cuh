// What every kernel shares: the stored number type, 16-byte loads, reductions.
//
// A program is compiled for one model (NVRTC for Python, nvcc for C++) with
//   HALF           1 where matrices and the cache are of 16 bits, 0 for fp32;  BFLOAT 1 where those are bf16
//   FP8_CACHE      1 where the cache is of fp8 (e4m3) all the same
//   HEAD_DIM, HEADS, KV_HEADS, ROTARY_DIM, WINDOW (0: all keys)
//   WINDOWS_DIFFER 1 where some blocks see all keys: theirs are kernels of another name;  SOFTCAP of scores,
//                  a float's bits, 0 for none
//   UNROTATED      1 where some blocks rotate nothing: their attention is given no cosines
//   NORM_LAYER     1 LayerNorm, 0 RMSNorm
//   ACTIVATION     0 SiLU, 1 GELU, 2 GELU by tanh, 3 ReLU;  GATED 1 for act(gate) * up
//   SMALL          1 where hidden states have few features: steps of one token are the tensor cores' too
#pragma once
#include "element.cuh"

// Elements of one 16-byte load.
constexpr int WIDE = 16 / sizeof(Element);
constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;

struct alignas(16) Chunk {
    Element values[WIDE];
};

// A load of weights: each is read once, so that it need not stay in the first-level cache. Zeros where not
// valid, without a branch, so that loads before and after are on their way together.
__device__ __forceinline__ Chunk load_once(const Element* at, bool valid) {
    union {
        uint4 words;
        Chunk chunk;
    } loaded;
    asm volatile(
        "{.reg .pred valid;\n setp.ne.u32 valid, %5, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n mov.u32 %2, 0;\n "
        "mov.u32 %3, 0;\n @valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(loaded.words.x), "=&r"(loaded.words.y), "=&r"(loaded.words.z), "=&r"(loaded.words.w)
        : "l"(at), "r"(static_cast<unsigned>(valid)));
    return loaded.chunk;
}

__device__ __forceinline__ Chunk load(const Element* at) { return *reinterpret_cast<const Chunk*>(at); }

template <int WIDTH = LANES>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int offset = WIDTH / 2; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

// Sum over a thread block of at most 1024 threads; every thread gets it.
__device__ inline float block_sum(float x) {
    __shared__ float sums[LANES];
    x = lanes_sum(x);
    __syncthreads();  // the sums of a call before may still be read
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = x;
    __syncthreads();
    return lanes_sum(threadIdx.x % LANES < blockDim.x / LANES ? sums[threadIdx.x % LANES] : 0.0f);
}

// Where the launch allows it, a kernel starts while the one before it ends: what does not depend
// on that one's results comes before this call.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What the kernel before has written, after `wait_for_previous`, where thread blocks of that one may have
// read what was there before, on this multiprocessor: its first-level cache may still have that.
template <class T>
__device__ __forceinline__ T fresh(const T* at) {
    return __ldcg(at);
}

// Words that other thread blocks, or the host, look at while a kernel runs; not from the first-level
// cache, which may be older.
__device__ __forceinline__ unsigned long long load_word(const unsigned long long* at) {
    unsigned long long value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ void store_word(unsigned long long* at, unsigned long long value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

__device__ __forceinline__ void store_word_for_host(unsigned long long* at, unsigned long long value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// Set by an exit's check where the pass that was begun ahead of it is not wanted: its kernels return.
// One for the whole program, so that all kernels are compiled together.
__device__ int called_off;

// To be asked after `wait_for_previous`, and before anything is written that counts.
__device__ __forceinline__ bool is_called_off() {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(&called_off) : "memory");
    return value;
}
