// Quantised matrices: how they lie on the device, and their numbers as they come to the tensor cores, whole
// numbers less a zero point or 8-bit floats, exact in 16 bits.
//
// Kernels are compiled for WEIGHT_BITS, 4 or 8, of a number, WEIGHT_FLOAT, whether it is a float (e4m3), and
// WEIGHT_GROUP, the columns that share a scale and a zero point. Both are one word: the scale, fp32, whose
// last WEIGHT_BITS bits are the zero point. So a scale has 20 bits, or 16: what fp16 and bf16 hold is exact.
// Floats have no zero point, and their scales all bits.
//
// Matrices lie in tiles of TILE_ROWS rows, and those in steps of STEP columns. A step's numbers are as its
// products of tiles take them, WORDS words of a lane each, four words of a lane together: what a warp loads
// is whole lines. Behind the numbers of all tiles come the scales of all, words of rows 0, 8, 1, 9, .. of a
// step's groups.
#pragma once
#include "float8.cuh"

#if HALF && WEIGHT_BITS
namespace quantised {
constexpr int TILE_ROWS = 16;
constexpr int STEP = 128;
constexpr int PRODUCTS = STEP / 16;  // of a step
constexpr int PRODUCTS_OF_GROUP = WEIGHT_GROUP < STEP ? WEIGHT_GROUP / 16 : PRODUCTS;
constexpr int STEP_GROUPS = PRODUCTS / PRODUCTS_OF_GROUP;
constexpr int WORDS = WEIGHT_BITS / 4;
constexpr int STEP_WORDS = PRODUCTS * WORDS * LANES;
constexpr int NUMBER_BYTES = STEP_WORDS * 4;
constexpr int LOADS = NUMBER_BYTES / (16 * LANES);  // of a lane, of 16 bytes
constexpr int SCALE_WORDS = STEP_GROUPS * TILE_ROWS;
constexpr int SCALE_BYTES = SCALE_WORDS * 4;

// The first of the four columns of a step that a lane has of a product: of two rows, `lane` / 4 and that + 8.
// Columns go to products so that two products' inputs are neighbours.
__device__ __forceinline__ int column_of(int product, int lane) {
    return product / 2 * 32 + lane % 4 * 8 + product % 2 * 4;
}

// One of two elements in a word.
__device__ __forceinline__ Element element_of(unsigned pair, int which) {
    const unsigned short bits = pair >> 16 * which;
    return *reinterpret_cast<const Element*>(&bits);
}

__device__ __forceinline__ int steps_of(int columns) {
    return (columns + STEP - 1) / STEP;
}

// Of two rows, `row` and `row` + 8 of a tile, which a lane has numbers of.
struct Scale {
    float scale[2];
    unsigned less[2];  // what `unpack` adds to numbers
};

__device__ __forceinline__ float scale_of(unsigned word) {
    return __uint_as_float(word & ~((1u << WEIGHT_BITS) - 1));
}

__device__ __forceinline__ unsigned twice(unsigned bits) {
    return bits | bits << 16;
}

#if WEIGHT_FLOAT
__device__ __forceinline__ Scale scale_from(uint2 words) {
    return {{__uint_as_float(words.x), __uint_as_float(words.y)}, {}};
}

// Eight numbers as a product takes them: four columns of the first row, then of the second.
__device__ __forceinline__ void unpack(unsigned (&left)[4], const unsigned* words, const Scale&) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
        left[row] = two_floats<0>(words[row]), left[2 + row] = two_floats<1>(words[row]);
}
#elif WEIGHT_BITS == 4
#if BFLOAT
constexpr unsigned ONES = 0x3f803f80u;
constexpr unsigned ABOVE = 0x43004300u;  // 128 and, in its last bits, a number that is added
constexpr unsigned BELOW = 0xc300u;      // -128, and so less

__device__ __forceinline__ Scale scale_from(uint2 words) {
    return {{scale_of(words.x), scale_of(words.y)},
            {twice(BELOW | (words.x & 15u)), twice(BELOW | (words.y & 15u))}};
}
#else
constexpr unsigned ONES = 0x3c003c00u, SIXTEENTHS = 0x2c002c00u;
constexpr unsigned ABOVE = 0x64006400u;  // 1024 and, in its last bits, a number that is added
constexpr unsigned BELOW = 0xe400u,
                   LOW = 0xd400u;  // -1024, and so less; -64, and sixteenths of the last bits less

__device__ __forceinline__ Scale scale_from(uint2 words) {
    return {{scale_of(words.x), scale_of(words.y)},
            {twice(BELOW | (words.x & 15u)), twice(LOW | (words.y & 15u) << 4)}};
}
#endif

// Eight numbers, less the zero point, as a product takes them. Of a word the even places are of the first
// row, columns 0, 2 and, in the upper half, 1, 3; the odd ones are of the second.
__device__ __forceinline__ void unpack(unsigned (&left)[4], const unsigned* words, const Scale& of) {
    const unsigned word = words[0], late = word >> 8;
    left[0] = add_product(and_or(word, 0x000f000fu, ABOVE), ONES, of.less[0]);
    left[2] = add_product(and_or(late, 0x000f000fu, ABOVE), ONES, of.less[0]);
#if BFLOAT
    left[1] = add_product(and_or(word >> 4, 0x000f000fu, ABOVE), ONES, of.less[1]);
    left[3] = add_product(and_or(late >> 4, 0x000f000fu, ABOVE), ONES, of.less[1]);
#else
    // Numbers stay where they are: sixteen times too high.
    left[1] = add_product(and_or(word, 0x00f000f0u, ABOVE), SIXTEENTHS, of.less[1]);
    left[3] = add_product(and_or(late, 0x00f000f0u, ABOVE), SIXTEENTHS, of.less[1]);
#endif
}
#elif BFLOAT
__device__ __forceinline__ Scale scale_from(uint2 words) {
    constexpr unsigned WHOLE = 0x4b000000u;  // 2^23 and, in its last bits, a number that is added
    return {{scale_of(words.x), scale_of(words.y)}, {WHOLE | (words.x & 255u), WHOLE | (words.y & 255u)}};
}

// As below, by fp32: of 8 bits bf16 has none to add to.
__device__ __forceinline__ void unpack(unsigned (&left)[4], const unsigned* words, const Scale& of) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i % 2, first = i / 2 * 2;
        const float less = __uint_as_float(of.less[row]);
        const auto number = [&](int which) {
            return __uint_as_float(__byte_perm(words[row], 0x4b000000u, 0x7440u | which)) - less;
        };
        left[i] = pack(number(first), number(first + 1));
    }
}
#else
constexpr unsigned ONES = 0x3c003c00u;
constexpr unsigned BELOW = 0xe400u;  // -1024, and so less

__device__ __forceinline__ Scale scale_from(uint2 words) {
    return {{scale_of(words.x), scale_of(words.y)},
            {twice(BELOW | (words.x & 255u)), twice(BELOW | (words.y & 255u))}};
}

// Eight numbers, less the zero point, as a product takes them: four columns of the first row, then of the
// second.
__device__ __forceinline__ void unpack(unsigned (&left)[4], const unsigned* words, const Scale& of) {
#pragma unroll
    for (int i = 0; i < 4; ++i)  // 1024 and, in its last bits, the number
        left[i] =
            add_product(__byte_perm(words[i % 2], 0x64u, i < 2 ? 0x4140u : 0x4342u), ONES, of.less[i % 2]);
}
#endif
}  // namespace quantised
#endif
