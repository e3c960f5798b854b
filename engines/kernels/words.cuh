// What thread blocks, and the host, tell one another while a kernel runs.
#pragma once
#include "common.cuh"

// Four bytes and the number of the answer that they belong to, written and read as one: whoever waits
// for them looks until they are there, and no barrier, fence or other sign is needed.
typedef unsigned long long Word;

__device__ inline Word word(unsigned bits, unsigned answer) {
    return static_cast<Word>(answer) << 32 | bits;
}
__device__ inline Word word(int value, unsigned answer) {
    return word(static_cast<unsigned>(value), answer);
}
__device__ inline Word word(float value, unsigned answer) {
    return word(__float_as_uint(value), answer);
}
__device__ inline unsigned bits_of(Word word) {
    return static_cast<unsigned>(word);
}
__device__ inline float float_of(Word word) {
    return __uint_as_float(bits_of(word));
}
__device__ inline bool belongs_to(Word word, unsigned answer) {
    return word >> 32 == answer;
}
