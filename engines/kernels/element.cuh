// The number that matrices and the cache are stored as: float, or one of 16 bits that tensor cores multiply.
// What is different between those two stands here: conversions, and the product of tiles.
//
// No header of the CUDA toolkit is needed.
#pragma once

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;  // the upper half of a float
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// By a move: of shifted whole numbers the compiler widens all that is loaded at once, more than registers hold.
__device__ __forceinline__ float to_float(Bfloat x) {
    float y;
    asm("mov.b32 %0, {%1, %2};" : "=f"(y) : "h"(static_cast<unsigned short>(0)), "h"(x.bits));
    return y;
}

// Rounds to the nearest, to even where two are as near.
__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(Half* at, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(at->bits) : "f"(x));
}
__device__ __forceinline__ void store(Bfloat* at, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(at->bits) : "f"(x));
}

#if BFLOAT
typedef Bfloat Element;
#define PACK "cvt.rn.bf16x2.f32"
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define ADD_PRODUCT "fma.rn.bf16x2"
#elif HALF
typedef Half Element;
#define PACK "cvt.rn.f16x2.f32"
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define ADD_PRODUCT "fma.rn.f16x2"
#else
typedef float Element;
#endif

#if (WEIGHT_FLOAT || FP8_CACHE) && !BFLOAT
// Two e4m3 numbers as fp16, which holds all of them: compute capability 8.9.
__device__ __forceinline__ unsigned from_float8(unsigned short two) {
    unsigned words;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(words) : "h"(two));
    return words;
}
#endif

#if HALF
// Two numbers rounded to elements, the first in the lower half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned words;
    asm(PACK " %0, %1, %2;" : "=r"(words) : "f"(high), "f"(low));
    return words;
}

// sums [16, 8] += a [16, 16] b [16, 8], a and b elements.
__device__ __forceinline__ void multiply_half(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm(MULTIPLY " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x & mask | above: of two constants, the compiler makes two instructions.
__device__ __forceinline__ unsigned and_or(unsigned x, unsigned mask, unsigned above) {
    unsigned word;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(word) : "r"(x), "r"(mask), "r"(above));
    return word;
}

// Bytes of a word, four of them by four bits each; where the highest of these is set, a byte's sign in all bits.
template <unsigned SELECTED>
__device__ __forceinline__ unsigned select_bytes(unsigned word) {
    unsigned bytes;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "n"(SELECTED));
    return bytes;
}

// Of two elements in a word each: x * y + z.
__device__ __forceinline__ unsigned add_product(unsigned x, unsigned y, unsigned z) {
    unsigned words;
    asm(ADD_PRODUCT " %0, %1, %2, %3;" : "=r"(words) : "r"(x), "r"(y), "r"(z));
    return words;
}
#endif

#if FP8_CACHE
// An e4m3 number. The largest is 448, which larger ones become.
struct Fp8 {
    unsigned char bits;
};

__device__ __forceinline__ void store(Fp8* at, float x) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    at->bits = static_cast<unsigned char>(pair);
}
#endif
