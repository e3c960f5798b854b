// Floats of 8 bits as elements: weights', and those of a cache. OCP's e4m3: a sign, four bits of exponent, three of
// fraction.
#pragma once
#include "instructions.cuh"

#if WEIGHT_FLOAT || FP8_CACHE
// Two floats of a word, the lower ones or the upper.
template <int HALF_OF_WORD>
__device__ __forceinline__ unsigned two_floats(unsigned word) {
#if BFLOAT
    // A number's sign in the nine upper bits of a half, then exponent and fraction where bf16 has them; its
    // exponent counts from 2^-7, bf16's from 2^-127.
    constexpr unsigned UP = 0x7b807b80u;  // 2^120
    constexpr unsigned SPREAD = HALF_OF_WORD ? 0xb3a2 : 0x9180;
    return add_product(select_bytes<SPREAD>(word) << 4 & 0x87f087f0u, UP, 0u);
#else
    return from_float8(static_cast<unsigned short>(word >> 16 * HALF_OF_WORD));
#endif
}
#endif
