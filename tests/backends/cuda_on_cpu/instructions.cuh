// What engines/kernels/instructions.cuh and element.cuh have in assembly, by its description in the PTX manual.
#pragma once
#include "common.cuh"

// A copy happens as late as it may, so that a read that doesn't wait for it reads NaN.
template <int BYTES>
void copy_async(void* to, const void* from, bool valid) {
    this_fiber().copies.push_back({to, from, BYTES, valid});
}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* at) { return static_cast<SharedAddress>(at); }

inline void copy_wide_if(bool wanted, SharedAddress to, const void* from, bool valid = true) {
    if (wanted) copy_async<16>(to, from, valid);
}

inline void copies_end() {
    this_fiber().on_their_way.push_back(std::move(this_fiber().copies));
    this_fiber().copies.clear();
}

template <int PENDING>
void copies_wait() {
    auto& groups = this_fiber().on_their_way;
    for (; groups.size() > PENDING; groups.pop_front())
        for (const Copy& copy : groups.front())
            if (copy.valid)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
}

inline void prefetch(const void*) {}
constexpr float LOG2_E = 1.44269504f;
inline float power_of_2(float x) { return std::exp2(x); }

#if HALF
inline unsigned pack(float low, float high) {
    const auto bits = [](float x) {
        Element rounded;
        store(&rounded, x);
        return bits_as<std::uint16_t>(rounded);
    };
    return bits(low) | static_cast<unsigned>(bits(high)) << 16;
}

inline unsigned and_or(unsigned x, unsigned mask, unsigned above) { return (x & mask) | above; }

template <unsigned SELECTED>
unsigned select_bytes(unsigned word) {
    unsigned bytes = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned how = SELECTED >> 4 * i & 15, byte = how & 4 ? 0 : word >> 8 * (how & 3) & 255;
        bytes |= (how & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return bytes;
}

inline unsigned from_float8(unsigned short two) {
    const auto number = [](unsigned code) { return (code & 127) == 127 ? NAN : fp8_value(code); };
    return pack(number(two & 255), number(two >> 8));
}

inline unsigned add_product(unsigned x, unsigned y, unsigned z) {
    const auto number = [](unsigned words, int i) {
        return to_float(bits_as<Element>(static_cast<std::uint16_t>(words >> 16 * i)));
    };
    return pack(number(x, 0) * number(y, 0) + number(z, 0), number(x, 1) * number(y, 1) + number(z, 1));
}

template <bool TRANSPOSED>
void load_matrices(unsigned (&words)[4], const void* row) {
    static const void* rows[1024];
    const unsigned thread = threadIdx.x, lane = thread % LANES;
    rows[thread] = row;
    __syncwarp();
    for (int matrix = 0; matrix < 4; ++matrix) {
        std::uint16_t two[2];
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned here = lane / 4, there = lane % 4 * 2 + i;
            const auto* from = rows[thread - lane + matrix * 8 + (TRANSPOSED ? there : here)];
            two[i] = static_cast<const std::uint16_t*>(from)[TRANSPOSED ? here : there];
        }
        words[matrix] = two[0] | static_cast<unsigned>(two[1]) << 16;
    }
    __syncwarp();
}

inline unsigned transpose(unsigned words) {
    static unsigned values[1024];
    const unsigned thread = threadIdx.x, lane = thread % LANES;
    values[thread] = words;
    __syncwarp();
    unsigned result = 0;
    for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = lane % 4 * 2 + i, column = lane / 4;
        result |= (values[thread - lane + row * 4 + column / 2] >> 16 * (column % 2) & 0xffff) << 16 * i;
    }
    __syncwarp();
    return result;
}
#endif

// sums [16, 8] += a [16, depth] b [depth, 8] of a warp; the operands are told by lane and place.
template <class A, class B>
void multiply_tiles(float (&sums)[4], int depth, A a_of, B b_of) {
    const int lane = threadIdx.x % LANES;
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0.0;
        for (int k = 0; k < depth; ++k) sum += static_cast<double>(a_of(row, k)) * b_of(k, column);
        sums[i] = static_cast<float>(sums[i] + sum);
    }
    __syncwarp();
}

// What a lane of this warp has put there for the others to read.
inline float* lane_values(int lane) {
    static float values[1024][12];
    return values[threadIdx.x / LANES * LANES + lane];
}

#if HALF
inline void multiply_half(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    float* own = lane_values(threadIdx.x % LANES);
    const auto unpack = [](unsigned word, int i) {
        return to_float(bits_as<Element>(static_cast<std::uint16_t>(word >> 16 * i)));
    };
    for (int i = 0; i < 8; ++i) own[i] = unpack(a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) own[8 + i] = unpack(b[i / 2], i % 2);
    multiply_tiles(
        sums, 16,
        [](int row, int k) { return lane_values(row % 8 * 4 + k % 8 / 2)[row / 8 * 2 + k / 8 * 4 + k % 2]; },
        [](int k, int column) { return lane_values(column * 4 + k % 8 / 2)[8 + k / 8 * 2 + k % 2]; });
}
#endif

inline void multiply_tf32(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
    float* own = lane_values(threadIdx.x % LANES);
    const auto kept = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
    for (int i = 0; i < 4; ++i) own[i] = kept(a[i]);
    for (int i = 0; i < 2; ++i) own[4 + i] = kept(b[i]);
    multiply_tiles(
        sums, 8, [](int row, int k) { return lane_values(row % 8 * 4 + k % 4)[row / 8 + k / 4 * 2]; },
        [](int k, int column) { return lane_values(column * 4 + k % 4)[4 + k / 4]; });
}
