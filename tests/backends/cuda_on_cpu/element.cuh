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

// By OCP's description: exponents have a bias of 7, and 0 that of 1 with no leading one.
inline float fp8_value(unsigned bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
    return bits >> 7 & 1 ? -size : size;
}

#if FP8_CACHE
struct Fp8 {
    unsigned char bits;
};

// The nearest of all, to even where two are as near; none is larger than 448.
inline void store(Fp8* at, float x) {
    unsigned best = 0;
    for (unsigned code = 1; code < 0x7f; ++code) {
        const float nearer = std::fabs(fp8_value(code) - std::fabs(x)) - std::fabs(fp8_value(best) - std::fabs(x));
        if (nearer < 0 || (nearer == 0 && code % 2 == 0)) best = code;
    }
    at->bits = std::isnan(x) ? 0x7f : static_cast<unsigned char>(best | (std::signbit(x) ? 0x80 : 0));
}
#endif
