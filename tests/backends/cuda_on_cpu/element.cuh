// The stored number, in place of engines/kernels/element.cuh: fp16 is the compiler's, bf16 is made here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

template <class To, class From>
To bits_as(From x) {
    To y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

struct Bfloat {
    std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline void store(float* at, float x) { *at = x; }
inline float to_float(Bfloat x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }

// Rounds to 8 bits, to the nearest, to even where two are as near.
inline void store(Bfloat* at, float x) {
    const auto bits = bits_as<std::uint32_t>(x);
    at->bits = std::isnan(x) ? 0x7fff : static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if BFLOAT
typedef Bfloat Element;
#elif HALF
typedef _Float16 Half;
typedef Half Element;
inline float to_float(Half x) { return static_cast<float>(x); }
inline void store(Half* at, float x) { *at = static_cast<Half>(x); }
#else
typedef float Element;
#endif
