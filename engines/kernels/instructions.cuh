// The instructions of compute capability 8.0 that attention and the exit's check are made of, which CUDA
// C++ has no words for without the toolkit's headers; those that differ by the stored number's type are in
// element.cuh. Nothing else of attention is in assembly.
#pragma once
#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels need a GPU of compute capability 8.0 or later"
#endif

extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ __forceinline__ unsigned shared_address(const void* at) {
    unsigned long long address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(at));
    return static_cast<unsigned>(address);
}

// Copies 4, 8 or 16 bytes to shared memory while the computation goes on; zeros where not valid.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(valid ? BYTES : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(valid ? BYTES : 0), "n"(BYTES)
                     : "memory");
}

// Copies 16 bytes likewise, where that is wanted, without a branch: many of them stand together. The address
// is of 32 bits, so that what is added to it costs nothing.
using SharedAddress = unsigned;
__device__ __forceinline__ void copy_wide_if(bool wanted, SharedAddress to, const void* from,
                                             bool valid = true) {
    asm volatile(
        "{.reg .pred wanted;\n setp.ne.u32 wanted, %3, 0;\n @wanted cp.async.cg.shared.global [%0], [%1], "
        "16, %2;}" ::"r"(to),
        "l"(from), "r"(valid ? 16 : 0), "r"(static_cast<unsigned>(wanted))
        : "memory");
}

// Ends a group of copies; empty ones count.
__device__ __forceinline__ void copies_end() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups, except for so many of the latest.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void prefetch(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x, with 0 for -infinity.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four 8x8 matrices of 16-bit numbers. Each lane names a row (lane i the row i % 8 of matrix i / 8) and gets,
// of every matrix, row lane / 4, columns 2 (lane % 4) and the next; of the transposed ones with TRANSPOSED.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// An 8x8 matrix of 16-bit numbers, a lane's part as load_matrices gives it, transposed.
__device__ __forceinline__ unsigned transpose(unsigned words) {
    unsigned result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(words));
    return result;
}

// sums [16, 8] += a [16, 8] b [8, 8], a and b fp32 of which the first 10 bits of the fraction count.
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
