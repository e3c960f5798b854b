// Matrix-vector products for the few tokens of a decode step, with norm, activation and residual
// in the same pass. Bound by the memory that holds the weights [outputs, inputs]: a warp takes
// several rows, the tokens' inputs lie in shared memory.
#include "activation.cuh"
#include "common.cuh"
#include "instructions.cuh"

constexpr int LINEAR_THREADS = 512;
constexpr int LINEAR_WARPS = LINEAR_THREADS / LANES;
// 16-byte loads of a thread that are in flight, and rows of a warp's task: two where one row of a matrix that
// takes hidden states doesn't need them all (bench/NOTES.md).
constexpr int LOADS = 16;
constexpr int ROWS = HEADS * HEAD_DIM > LANES * WIDE * LOADS / 2 ? 1 : 2;

// Features that several tokens may have to be normalised together: more than two are, in small models.
constexpr int MOST_TOGETHER = 2 * LINEAR_THREADS;

// Weights of a warp's rows that are on their way together: LOADS loads of a thread.
template <int COUNT>
struct Step {
    static constexpr int CHUNKS = LOADS / COUNT;  // of each row
    Chunk weights[CHUNKS][COUNT];

    // From a chunk of each row on; zeros beyond the row.
    __device__ __forceinline__ void load(const Element* const (&rows)[COUNT], int chunk, int chunks) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
            for (int row = 0; row < COUNT; ++row) {
                const int at = chunk + LANES * i;
                weights[i][row] = load_once(rows[row] + at * WIDE, at < chunks);
            }
    }
};

template <int TOKENS, int COUNT>
struct Sums {
    float values[COUNT][TOKENS] = {};

    __device__ __forceinline__ void add(const Step<COUNT>& step, const Element* inputs, int columns, int chunk) {
        const int last = columns / WIDE - 1;
#pragma unroll
        for (int i = 0; i < Step<COUNT>::CHUNKS; ++i)
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                // Of several tokens, what is beyond the row is worth leaving out.
                if (TOKENS > 2 && chunk - static_cast<int>(threadIdx.x) % LANES + LANES * i > last) continue;
                const Chunk input = load(inputs + token * columns + min(chunk + LANES * i, last) * WIDE);
#pragma unroll
                for (int row = 0; row < COUNT; ++row)
#pragma unroll
                    for (int j = 0; j < WIDE; ++j)
                        values[row][token] += to_float(step.weights[i][row].values[j]) * to_float(input.values[j]);
            }
    }

    __device__ __forceinline__ void reduce() {
#pragma unroll
        for (int row = 0; row < COUNT; ++row)
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) values[row][token] = lanes_sum(values[row][token]);
    }
};

// This lane's part of the products of COUNT rows with the inputs in shared memory. `step` holds the rows' first
// weights.
template <int TOKENS, int COUNT>
__device__ __forceinline__ Sums<TOKENS, COUNT> dot_rows(Step<COUNT>& step, const Element* const (&rows)[COUNT],
                                                        const Element* inputs, int columns) {
    const int chunks = columns / WIDE, lane = threadIdx.x % LANES;
    Sums<TOKENS, COUNT> sums;
    for (int first = 0;;) {
        sums.add(step, inputs, columns, first + lane);
        first += LANES * Step<COUNT>::CHUNKS;
        if (first >= chunks) return sums;
        step.load(rows, first + lane, chunks);
    }
}

// Shared memory: the inputs [tokens, columns], then what a norm needs of them, fp32: the hidden
// states of a token [columns] and the norm's weight [columns].
template <int TOKENS>
__device__ __forceinline__ float* norm_memory(int columns) {
    return reinterpret_cast<float*>(shared_memory + sizeof(Element) * TOKENS * columns);
}

// The norm's weight into shared memory; it does not depend on the kernel before. A thread writes
// and reads the same places, so that no barrier is needed.
template <int TOKENS>
__device__ void stage_norm_weight(const float* weight, int width, int columns) {
    float* kept = norm_memory<TOKENS>(columns) + columns;
    if (weight)
        for (int i = threadIdx.x; i < width; i += LINEAR_THREADS) kept[i] = weight[i];
}

// Normalised inputs, rounded to the type of the matrix, into shared memory. Without weight: x / rms.
// `width` is the number of features that the mean is over; those from there to `columns` are zero.
template <int TOKENS>
__device__ void stage_normed(const float* hidden, const float* weight, const float* bias, float epsilon,
                             int width, int columns) {
    Element* inputs = reinterpret_cast<Element*>(shared_memory);
    float* raw = norm_memory<TOKENS>(columns);
    const float* kept = raw + columns;
    for (int token = 0; token < TOKENS; ++token) {
        float mean = 0.0f, square = 0.0f;
#pragma unroll 8
        for (int i = threadIdx.x; i < width; i += LINEAR_THREADS) {
            const float x = hidden[token * width + i];
            raw[i] = x;
            mean += x;
            square += x * x;
        }
#if NORM_LAYER
        if (weight) {
            mean = block_sum(mean) / width;
            square = 0.0f;
            for (int i = threadIdx.x; i < width; i += LINEAR_THREADS) square += (raw[i] - mean) * (raw[i] - mean);
        } else {
            mean = 0.0f;
        }
#else
        mean = 0.0f;
#endif
        const float scale = 1.0f / sqrtf(block_sum(square) / width + epsilon);
        for (int i = threadIdx.x; i < columns; i += LINEAR_THREADS) {
            float y = i < width ? (raw[i] - mean) * scale : 0.0f;
            if (weight) y *= kept[i];
            if (bias) y += bias[i];
            store(inputs + token * columns + i, y);
        }
    }
    __syncthreads();
}

// Sums of several numbers over a thread block; every thread gets them.
template <int COUNT>
__device__ void block_sums(float (&values)[COUNT]) {
    __shared__ float sums[COUNT][LINEAR_WARPS];
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = lanes_sum(values[i]);
    __syncthreads();  // the sums of a call before may still be read
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (lane == 0) sums[i][threadIdx.x / LANES] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = lanes_sum(lane < LINEAR_WARPS ? sums[i][lane] : 0.0f);
}

// As `stage_normed` for several tokens of few features: all are loaded at once, and their sums meet at the
// same barriers.
template <int TOKENS>
__device__ void stage_normed_together(const float* hidden, const float* weight, const float* bias, float epsilon,
                                      int width, int columns) {
    constexpr int EACH = MOST_TOGETHER / LINEAR_THREADS;  // features of a thread
    Element* inputs = reinterpret_cast<Element*>(shared_memory);
    const float* kept = norm_memory<TOKENS>(columns) + columns;
    float values[TOKENS][EACH], means[TOKENS] = {}, squares[TOKENS] = {};
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int at = threadIdx.x + i * LINEAR_THREADS;
            const float x = at < width ? fresh(hidden + token * width + at) : 0.0f;
            values[token][i] = x;
            means[token] += x;
            squares[token] += x * x;
        }
#if NORM_LAYER
    if (weight) {
        block_sums(means);
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            means[token] /= width;
            squares[token] = 0.0f;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if (threadIdx.x + i * LINEAR_THREADS < width) values[token][i] -= means[token];
                squares[token] += values[token][i] * values[token][i];
            }
        }
    }
#endif
    block_sums(squares);
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        const float scale = 1.0f / sqrtf(squares[token] / width + epsilon);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int at = threadIdx.x + i * LINEAR_THREADS;
            if (at >= columns) continue;
            float y = at < width ? values[token][i] * scale : 0.0f;
            if (weight) y *= at < width ? kept[at] : 0.0f;
            if (bias && at < width) y += bias[at];
            store(inputs + token * columns + at, y);
        }
    }
    __syncthreads();
}

// Normalised inputs of one token after the other, or of several together.
template <int TOKENS>
__device__ void stage_inputs(const float* hidden, const float* weight, const float* bias, float epsilon, int width,
                             int columns) {
    if constexpr (TOKENS > 2)
        stage_normed_together<TOKENS>(hidden, weight, bias, epsilon, width, columns);
    else
        stage_normed<TOKENS>(hidden, weight, bias, epsilon, width, columns);
}

template <int TOKENS>
__device__ void stage(const Element* x, int columns) {
    Chunk* inputs = reinterpret_cast<Chunk*>(shared_memory);
    const Chunk* from = reinterpret_cast<const Chunk*>(x);
    for (int i = threadIdx.x; i < TOKENS * columns / WIDE; i += blockDim.x) inputs[i] = from[i];
    __syncthreads();
}

// Calls use(task, sums) for every task of `COUNT` rows, those of this warp; row_of(task, i) names a
// task's rows. before() does what can be done while the kernel before still runs; prepare() brings
// the inputs into shared memory. A task's first weights are on their way while the inputs come, or while the
// sums of the task before are added up.
template <int TOKENS, int COUNT, class RowOf, class Before, class Prepare, class Use>
__device__ __forceinline__ void each_task(const Element* matrix, int columns, int tasks, RowOf row_of,
                                          Before before, Prepare prepare, Use use) {
    const int first = blockIdx.x * LINEAR_WARPS + threadIdx.x / LANES, all = gridDim.x * LINEAR_WARPS;
    const Element* rows[COUNT];
    Step<COUNT> step;
    const auto begin = [&](int task) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) rows[i] = matrix + static_cast<long long>(row_of(task, i)) * columns;
        step.load(rows, threadIdx.x % LANES, columns / WIDE);
    };
    before();
    if (first < tasks) begin(first);
    wait_for_previous();
    let_next_start();
    const bool not_wanted = __any_sync(ALL, is_called_off());  // comes while the inputs do
    prepare();
    if (not_wanted) return;
    const Element* inputs = reinterpret_cast<const Element*>(shared_memory);
    for (int task = first; task < tasks; task += all) {
        Sums<TOKENS, COUNT> sums = dot_rows<TOKENS, COUNT>(step, rows, inputs, columns);
        if (task + all < tasks) begin(task + all);
        sums.reduce();
        use(task, sums);
    }
}

// out [TOKENS, outputs] fp32 = norm(hidden) matrix^T + bias
template <int TOKENS>
__device__ void norm_linear(float* out, const float* hidden, const float* norm_weight, const float* norm_bias,
                            float epsilon, int width, const Element* matrix, const float* bias, int columns,
                            int outputs) {
    constexpr int COUNT = ROWS;
    each_task<TOKENS, COUNT>(
        matrix, columns, (outputs + COUNT - 1) / COUNT,
        [=](int task, int i) { return min(task * COUNT + i, outputs - 1); },
        [=] { stage_norm_weight<TOKENS>(norm_weight, width, columns); },
        [=] { stage_inputs<TOKENS>(hidden, norm_weight, norm_bias, epsilon, width, columns); },
        [=](int task, const Sums<TOKENS, COUNT>& sums) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int token = 0; token < TOKENS; ++token) {
                    const int row = task * COUNT + i;
                    if (threadIdx.x % LANES == i * TOKENS + token && row < outputs)
                        out[token * outputs + row] = sums.values[i][token] + (bias ? bias[row] : 0.0f);
                }
        });
}

// inner [TOKENS, width_out] = act(norm(hidden) gate^T) * (norm(hidden) up^T), gate's rows before up's;
// without a gate act(norm(hidden) up^T)
template <int TOKENS>
__device__ void norm_up(Element* inner, const float* hidden, const float* norm_weight, const float* norm_bias,
                        float epsilon, const Element* matrix, const float* bias, int columns, int width_out) {
    constexpr int COUNT = GATED && ROWS == 1 ? 2 : ROWS, FEATURES = GATED ? COUNT / 2 : COUNT;
    each_task<TOKENS, COUNT>(
        matrix, columns, (width_out + FEATURES - 1) / FEATURES,
        [=](int task, int i) {
            const int feature = min(task * FEATURES + i % FEATURES, width_out - 1);
            return i < FEATURES ? feature : width_out + feature;
        },
        [=] { stage_norm_weight<TOKENS>(norm_weight, columns, columns); },
        [=] { stage_inputs<TOKENS>(hidden, norm_weight, norm_bias, epsilon, columns, columns); },
        [=](int task, const Sums<TOKENS, COUNT>& sums) {
#pragma unroll
            for (int i = 0; i < FEATURES; ++i)
#pragma unroll
                for (int token = 0; token < TOKENS; ++token) {
                    const int feature = task * FEATURES + i;
                    if (threadIdx.x % LANES != i * TOKENS + token || feature >= width_out) continue;
                    float y = activate(sums.values[i][token] + (bias ? bias[feature] : 0.0f));
                    if (GATED)
                        y *= sums.values[i + FEATURES * GATED][token] + (bias ? bias[width_out + feature] : 0.0f);
                    store(inner + token * width_out + feature, y);
                }
        });
}

// out [TOKENS, outputs] fp32 = residual + x matrix^T + bias; out may be the residual itself
template <int TOKENS>
__device__ void linear(float* out, const float* residual, const Element* x, const Element* matrix,
                       const float* bias, int columns, int outputs) {
    constexpr int COUNT = ROWS;
    each_task<TOKENS, COUNT>(
        matrix, columns, (outputs + COUNT - 1) / COUNT,
        [=](int task, int i) { return min(task * COUNT + i, outputs - 1); },
        [] {}, [=] { stage<TOKENS>(x, columns); },
        [=](int task, const Sums<TOKENS, COUNT>& sums) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int token = 0; token < TOKENS; ++token) {
                    const int row = task * COUNT + i, at = token * outputs + row;
                    if (threadIdx.x % LANES == i * TOKENS + token && row < outputs)
                        out[at] = sums.values[i][token] + (bias ? bias[row] : 0.0f) + (residual ? residual[at] : 0.0f);
                }
        });
}

#define FOR_TOKENS(TOKENS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, 1) norm_linear_##TOKENS(                       \
        float* out, const float* hidden, const float* norm_weight, const float* norm_bias, float epsilon,       \
        int width, const Element* matrix, const float* bias, int columns, int outputs) {                        \
        norm_linear<TOKENS>(out, hidden, norm_weight, norm_bias, epsilon, width, matrix, bias, columns,         \
                            outputs);                                                                           \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, 1) norm_up_##TOKENS(                           \
        Element* inner, const float* hidden, const float* norm_weight, const float* norm_bias, float epsilon,   \
        const Element* matrix, const float* bias, int columns, int width_out) {                                 \
        norm_up<TOKENS>(inner, hidden, norm_weight, norm_bias, epsilon, matrix, bias, columns, width_out);      \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, 1)                              \
        linear_##TOKENS(float* out, const float* residual, const Element* x, const Element* matrix,             \
                        const float* bias, int columns, int outputs) {                                          \
        linear<TOKENS>(out, residual, x, matrix, bias, columns, outputs);                                       \
    }

FOR_TOKENS(1)
FOR_TOKENS(2)
FOR_TOKENS(3)
FOR_TOKENS(4)
FOR_TOKENS(5)
FOR_TOKENS(6)
FOR_TOKENS(7)
FOR_TOKENS(8)
