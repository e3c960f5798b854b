// Tokens and confidence from logits, on the device.
#include "choose.cuh"

constexpr int PARTS = LANES;

// Grid (PARTS, rows): each thread block takes a part of a row's logits, the last to finish answers.
extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose(const float* logits, int vocabulary, Desk* desk, Mail* mail, int measure, double threshold, int sampled) {
    const int part = blockIdx.x, row = blockIdx.y, each = (vocabulary + PARTS - 1) / PARTS;
    const int first = min(part * each, vocabulary), stop = min(first + each, vocabulary);
    logits += static_cast<long long>(row) * vocabulary;
    wait_for_previous();
    let_next_start();
    Summary seen = Summary::nothing(min(first + static_cast<int>(threadIdx.x), vocabulary - 1));
    for (int i = first + threadIdx.x; i < stop; i += CHOOSE_THREADS) seen.add(logits[i], i);
    seen = block_summary(seen);
    if (threadIdx.x == 0) desk->parts[row * PARTS + part] = seen;
    if (last_to_finish(&desk->finished, PARTS * gridDim.y))
        answer({desk, mail, measure, threshold, sampled}, gridDim.y, PARTS);
}

// kept [rows, capacity, features] at the tokens' sequences and positions = hidden [tokens, features].
// Grid (tokens).
extern "C" __global__ void keep(float* kept, const float* hidden, const int* positions, const int* sequences,
                                int capacity, int features) {
    wait_for_previous();
    let_next_start();
    const long long token = blockIdx.x, place = static_cast<long long>(sequences[token]) * capacity + positions[token];
    for (int i = threadIdx.x; i < features; i += blockDim.x)
        kept[place * features + i] = hidden[token * features + i];
}

// A pass that was begun ahead and called off is over: what comes next counts again.
extern "C" __global__ void go_on() {
    wait_for_previous();
    called_off = 0;
    __threadfence();  // the next kernel asks before it waits; it starts when this one has ended
}
