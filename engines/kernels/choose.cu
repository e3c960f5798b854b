// Tokens and confidence from logits, on the device.
#include "choose.cuh"

constexpr int PARTS = LANES;

// Grid (PARTS, rows): each thread block takes a part of a row's logits, the last to finish answers.
extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose(const float* logits, int vocabulary, Desk* desk, Mail* mail, int measure, double threshold, int sampled) {
    __shared__ int sure;
    const int part = blockIdx.x, rows = gridDim.y, each = (vocabulary + PARTS - 1) / PARTS;
    const int first = min(part * each, vocabulary), stop = min(first + each, vocabulary);
    logits += static_cast<long long>(blockIdx.y) * vocabulary;
    wait_for_previous();
    let_next_start();
    const unsigned answer = fresh(&desk->answers) + 1;
    Summary summary = Summary::nothing(min(first + static_cast<int>(threadIdx.x), vocabulary - 1));
    for (int i = first + threadIdx.x; i < stop; i += CHOOSE_THREADS) summary.add(fresh(logits + i), i);
    summary = block_summary(summary);
    if (threadIdx.x == 0) {
        desk->parts[blockIdx.y * PARTS + part].tell(summary, answer);
        sure = 0;
    }
    if (!last_to_finish(&desk->finished, PARTS * rows)) return;
    const Asked asked{desk, mail, answer, measure, threshold, sampled};
    const int lane = threadIdx.x % LANES;
    for (int row = threadIdx.x / LANES; row < rows; row += CHOOSE_THREADS / LANES) {
        const Summary all = lanes_summary(desk->parts[row * PARTS + lane].await(answer));
        if (lane == 0 && asked.give(row, all)) atomicAdd(&sure, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) asked.end(sure == rows);
}

// kept [rows, capacity, features] at the tokens' sequences and positions = hidden [tokens, features].
// Grid (tokens).
extern "C" __global__ void keep(float* kept, const float* hidden, const int* positions, const int* sequences,
                                int capacity, int features) {
    let_next_start();  // to load weights
    wait_for_previous();
    keep_token(kept, hidden, positions, sequences, capacity, features, blockIdx.x, threadIdx.x, blockDim.x);
}

// hidden [tokens, features] = what was kept at the tokens' sequences and positions. Grid (tokens).
extern "C" __global__ void fetch(float* hidden, const float* kept, const int* positions, const int* sequences,
                                 int capacity, int features) {
    wait_for_previous();
    let_next_start();
    const int token = blockIdx.x;
    const long long place = static_cast<long long>(fresh(sequences + token)) * capacity + fresh(positions + token);
    for (int i = threadIdx.x; i < features; i += blockDim.x)
        hidden[static_cast<long long>(token) * features + i] = fresh(kept + place * features + i);
}

// A pass that was begun ahead and called off is over: what comes next counts again.
extern "C" __global__ void go_on() {
    wait_for_previous();
    let_next_start();
    called_off = 0;
}
