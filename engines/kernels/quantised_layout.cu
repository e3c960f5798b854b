// Quantised matrices brought into the layout of their products (numbers.cuh), once when they are loaded, and
// from there back to elements, where a library multiplies with them.
#include "numbers.cuh"

#if HALF && WEIGHT_BITS
namespace quantised {
constexpr int LAYOUT_THREADS = 256;

// A matrix as a bundle has it, MatMulNBits' layout: numbers [rows, columns], scales [rows, groups], zero
// points [rows, groups] of whole bytes in a row, or none.
struct Stored {
    const unsigned char* numbers;
    const float* scales;
    const unsigned char* zero_points;
    int rows, columns;

    __device__ __forceinline__ int groups() const { return columns / WEIGHT_GROUP; }

    __device__ __forceinline__ static unsigned take(const unsigned char* row, int at) {
        return WEIGHT_BITS == 8 ? row[at] : row[at / 2] >> at % 2 * 4 & 15u;
    }
    __device__ __forceinline__ unsigned number(int row, int column) const {
        if (row >= rows || column >= columns) return 0;
        return take(numbers + static_cast<long long>(row) * columns * WEIGHT_BITS / 8, column);
    }
    // Zero beyond the matrix.
    __device__ __forceinline__ unsigned scale(int row, int group) const {
        if (row >= rows || group >= groups()) return 0;
        const unsigned bits = __float_as_uint(scales[static_cast<long long>(row) * groups() + group]);
#if WEIGHT_FLOAT
        return bits;
#else
        constexpr unsigned LAST = (1u << WEIGHT_BITS) - 1, MIDDLE = 1u << (WEIGHT_BITS - 1);
        const int row_bytes = (groups() * WEIGHT_BITS + 7) / 8;
        const unsigned zero =
            zero_points ? take(zero_points + static_cast<long long>(row) * row_bytes, group) : MIDDLE;
        return (bits + MIDDLE & ~LAST) | zero;
#endif
    }
};

// Which row of a matrix a tile's is. Where gates are multiplied with what is beside them, tiles have eight of
// each.
__device__ __forceinline__ int row_of(int tile, int row, int rows, bool paired) {
    if (!paired) return tile * TILE_ROWS + row;
    const int half = TILE_ROWS / 2, feature = tile * half + row % half;
    return feature >= rows / 2 ? rows : row < half ? feature : rows / 2 + feature;
}

// Grid (any). Writes all of a matrix of `tiles` tiles, numbers and scales.
extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS)
    lay_out_quantised(unsigned* out, const unsigned char* numbers, const float* scales,
                      const unsigned char* zero_points, int rows, int columns, int tiles, int paired) {
    const Stored stored{numbers, scales, zero_points, rows, columns};
    const int steps = steps_of(columns);
    const long long number_words = static_cast<long long>(tiles) * steps * STEP_WORDS;
    const long long all = number_words + static_cast<long long>(tiles) * steps * SCALE_WORDS;
    const long long stride = static_cast<long long>(gridDim.x) * LAYOUT_THREADS;
    for (long long i = static_cast<long long>(blockIdx.x) * LAYOUT_THREADS + threadIdx.x; i < all;
         i += stride) {
        if (i < number_words) {
            const int tile = i / (static_cast<long long>(steps) * STEP_WORDS), step = i / STEP_WORDS % steps;
            const int at = i % STEP_WORDS, lane = at / 4 % LANES, word = at / (4 * LANES) * 4 + at % 4;
            const int column = step * STEP + column_of(word / WORDS, lane);
            const int first = row_of(tile, lane / 4, rows, paired),
                      second = row_of(tile, lane / 4 + 8, rows, paired);
            unsigned bits = 0;
#if WEIGHT_BITS == 4
            for (int j = 0; j < 4; ++j) {
                const int place = j % 2 * 16 + j / 2 * 8;
                bits |= stored.number(first, column + j) << place | stored.number(second, column + j)
                                                                        << (place + 4);
            }
#else
            for (int j = 0; j < 4; ++j) bits |= stored.number(word % 2 ? second : first, column + j) << 8 * j;
#endif
            out[i] = bits;
        } else {
            const long long at = i - number_words;
            const int tile = at / (static_cast<long long>(steps) * SCALE_WORDS),
                      step = at / SCALE_WORDS % steps;
            const int place = at % TILE_ROWS,
                      group =
                          (step * STEP + at % SCALE_WORDS / TILE_ROWS * (STEP / STEP_GROUPS)) / WEIGHT_GROUP;
            out[i] = stored.scale(row_of(tile, place % 2 * 8 + place / 2, rows, paired), group);
        }
    }
}

// Grid (any). elements [rows, columns] of a matrix in the layout, rounded once; `order` names the column of
// each that lies there, where they lie in another order.
extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS)
    dequantise(Element* elements, const unsigned* matrix, const int* order, int rows, int columns, int tiles,
               int paired) {
    wait_for_previous();
    let_next_start();
    const int steps = steps_of(columns);
    const unsigned* scales = matrix + static_cast<long long>(tiles) * steps * STEP_WORDS;
    const int all = tiles * steps * (PRODUCTS / 2) * LANES;
    const int stride = gridDim.x * LAYOUT_THREADS;
    for (int i = blockIdx.x * LAYOUT_THREADS + threadIdx.x; i < all; i += stride) {
        const int lane = i % LANES, two = i / LANES % (PRODUCTS / 2);
        const int step_of_all = i / (LANES * (PRODUCTS / 2));
        const int tile = step_of_all / steps, column = step_of_all % steps * STEP + column_of(two * 2, lane);
        if (column >= columns) continue;
        const Scale scale = scale_from(
            reinterpret_cast<const uint2*>(scales + static_cast<long long>(step_of_all) * SCALE_WORDS +
                                           two * 2 / PRODUCTS_OF_GROUP * TILE_ROWS)[lane / 4]);
        unsigned numbers[2][4], words[2 * WORDS];
#pragma unroll
        for (int j = 0; j < 2 * WORDS; ++j) {
            const int word = two * 2 * WORDS + j;
            words[j] = matrix[static_cast<long long>(step_of_all) * STEP_WORDS +
                              (word / 4 * LANES + lane) * 4 + word % 4];
        }
        unpack(numbers[0], words, scale);
        unpack(numbers[1], words + WORDS, scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_of(tile, half * 8 + lane / 4, rows, paired);
            if (row >= rows) continue;
            Element* to = elements + static_cast<long long>(row) * columns;
            float values[8];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                values[j] =
                    to_float(element_of(numbers[j / 4][j % 4 / 2 * 2 + half], j % 2)) * scale.scale[half];
            if (order) {
                for (int j = 0; j < 8; ++j) store(to + order[column + j], values[j]);
            } else {
                *reinterpret_cast<uint4*>(to + column) = {
                    pack(values[0], values[1]), pack(values[2], values[3]), pack(values[4], values[5]),
                    pack(values[6], values[7])};
            }
        }
    }
}
}  // namespace quantised
#endif
