"""Every tolerance of the tests, with its reason. A looser value needs a better reason."""

# Logits of fp32 graphs against transformers in fp32: the project's promise to its users.
LOGITS_FP32 = 1e-4
# One block's output against transformers in fp32, relative to the largest value: a few hundred
# fp32 roundings (1e-7 each) in another order of summation.
BLOCK_FP32_RELATIVE = 1e-5
# An engine of a block in fp16 against float64 on its fp16 weights, relative to the largest value:
# inputs and outputs of products rounded to 11 bits (5e-4 each), three products in a row.
BLOCK_FP16_RELATIVE = 5e-3
# The same in bf16, rounded to 8 bits (4e-3 each).
BLOCK_BF16_RELATIVE = 4e-2
# Logits of quantised engines, relative to the largest: what products multiply is rounded to 8 bits
# in groups (1/254 of the largest of each), through four blocks and a head: up to 5.4e-2 from
# float64 was measured. Other roundings of fp32, of a pass with other tokens beside it, flip some
# of those to the next number, so that two passes differ by as much at most.
LOGITS_INT8_RELATIVE = 1e-1
# A fit's loss against the optimum found another way, both float64, relative: the shortcut is
# rounded to fp32 (6e-8), which moves the loss by its square at the optimum and by 1e-6 at most
# where a mean is a thousand times what varies.
FIT_LOSS_RELATIVE = 1e-6
# Streamed float64 moments against two-pass ones, relative to the largest entry: 1e3 roundings.
MOMENTS_RELATIVE = 1e-12
# The folded head in float64 against norm(jump) W^T in float64, relative to the largest logit.
FOLD_FLOAT64_RELATIVE = 1e-12
# The same with the folded head in fp32: sums of up to a few hundred products, 6e-8 each, taken in
# another order, relative to the largest logit.
FOLD_FP32_RELATIVE = 1e-5
# A jump applied in fp32 against float64, relative to the largest output: fp32 rounding (6e-8) of
# h * scale, enlarged by means up to a hundred standard deviations.
JUMP_FP32_RELATIVE = 1e-4
# Mean surprisal from fp32 logits against float64: fp32's rounding of logits of about 10, 1e-6.
SURPRISAL_NATS = 1e-5
# Each log probability of a vocabulary in fp32 against float64, relative to the largest: a dozen
# products of 6e-8 each, whose sum may be a few times smaller than they are (5e-7 was seen).
LOG_PROBS_FP32_RELATIVE = 3e-6
# The streamed reference against the same transformers code with all weights loaded: the same
# operations in the same order; only the memory alignment of weights, hence the kernels, may differ.
REFERENCE_FP32 = 1e-5
# Loss of the demo checkpoint in nats/token, calibration code against all held-out files: the two
# texts share most files (0.006 was measured); a checkpoint that lacks one block is off by 0.17.
HELD_OUT_LOSS_NATS = 0.05
# Logits of fp16 graphs against transformers in fp32, relative to the largest: weights and
# activations rounded to 11 bits (5e-4), through four blocks; measured 3e-3.
LOGITS_FP16_RELATIVE = 2e-2
# The same in bf16, rounded to 8 bits (4e-3).
LOGITS_BF16_RELATIVE = 1.5e-1
# A sampling probability in NumPy's float64 against plain Python's: sums of a few dozen roundings.
PROBABILITY = 1e-12
# The same from fp32 logits through transformers' processors in fp32: roundings (6e-8) of logits up
# to 20, which a softmax turns into shares of as much, and of their penalties and temperature.
PROBABILITY_FP32 = 1e-5
# Loss of the multi-domain checkpoints in nats/token, an eighth of a domain's held-out text against
# all its held-out files: a sample of some 30 windows whose losses differ by 0.5 (0.115 measured).
MULTIDOMAIN_LOSS_NATS = 0.18
# Rotary tables against transformers' own, both fp32: frequencies (relative error 1e-7) times
# positions of a few hundred radians at most, in cosines and sines of at most 1.5.
ROTARY_FP32 = 1e-4
# A confidence in fp32 with float64 sums against float64: fp32's rounding of a logit of the size of
# those that have a part in it (up to 16 below the largest), 1e-6, times log V at most.
CONFIDENCE = 1e-5
# Logits of the likeliest tokens that may be ranked either way: two fp32 sums in different orders
# of summation, each within LOGITS_FP32 of the exact one.
NEAR_TIE = 2 * LOGITS_FP32
# A binomial tail in float64 against exact rationals: cumulative sums of at most 1e3 logarithms of
# size 1e2..1e3, rounded at 1e-16 each.
P_VALUE_RELATIVE = 1e-9
# A confidence of the stored vectors on another processor: logits within LOGITS_FP32 of each other,
# through a softmax, whose derivative is 1 at most.
CONFIDENCE_OF_VECTORS = LOGITS_FP32
# Attention's kernels against float64, relative to the largest number: fp16 queries, weights and
# values (5e-4 each; a weight's error is that of its score, up to 8, times 5e-4); fp32 with
# products of two parts of 11 bits each (2^-22) and 2^x by the hardware's approximation (2^-22).
ATTENTION_FP16_RELATIVE = 1e-2
ATTENTION_FP32_RELATIVE = 1e-5
# The same in bf16: eight times fp16's.
ATTENTION_BF16_RELATIVE = 8e-2
# Rounding to three bits of fraction: half of the last one's step.
FP8_E4M3_RELATIVE = 2.0**-4
# Through some blocks with keys and values of fp8, to the logits: those near the middle of two
# numbers may be rounded to the other one.
FP8_CACHE_HIDDEN_RELATIVE = 5e-2
# Noise in logits that tells a near tie from a fault, relative to the largest: what the two
# runtimes' logits may differ by, LOGITS_FP32, where the largest are 3 to 4.
NOISE_RELATIVE = 3e-5
# A logit with penalties in fp32 against float64: a bias, a quotient and two differences of numbers
# up to 30, each rounded at 6e-8.
PENALISED_LOGIT_RELATIVE = 1e-6
# A probability from fp32 logits divided by a temperature, in float64 after that.
PROBABILITY_FP32 = 1e-6
# A log probability of fp32 logits: both sides sum in float64; where the logits were computed in
# another batch they differ by fp32's rounding of a logit of 10, 1e-6, a few times.
LOGPROB = 1e-5
# A jump's torch module in float64 against NumPy's float64, relative to the largest output: sums of
# up to a hundred products, 1e-16 each, in another order.
TORCH_FLOAT64_RELATIVE = 1e-12
# A gradient taken in pieces against one taken whole, both fp32, relative to the largest entry: a
# few hundred roundings (6e-8 each) in another order of summation.
TORCH_GRADIENT_RELATIVE = 1e-5
# A mean KL divergence in fp32 against float64, nats: of each of the 320 tokens a product with a
# difference of log probabilities up to 20, rounded at 6e-8 each.
KL_FP32 = 1e-4
# Mean and deviation of features after a batch norm whose epsilon is 1e-5, where their variance is
# 0.05 and more (1e-4), and whose scale and shift are rounded to fp32.
NORMED_STATISTICS = 1e-3
# A block of transformers in float64 against NumPy, relative to the largest value: its norms round
# to fp32 and its rotations are fp32 (6e-8 each), through attention and an MLP.
BLOCK_RELATIVE = 1e-5
# A draft layer in float64 against torch's, whose rotations are fp32: cosines and sines of angles up
# to 10, off by 1e-7 each, through attention and an MLP; relative to the largest value.
DRAFT_ROTATIONS = 1e-5
# Logits of a draft layer's engines against float64 on the model's fp32 states, relative to the
# largest: those states are off by a few hundred roundings (LOGITS_FP32), and a layer follows.
DRAFT_FP32_RELATIVE = 1e-4
# The same in fp16: states, weights and activations rounded to 11 bits (5e-4), through the model's
# blocks (LOGITS_FP16_RELATIVE) and then the layer.
DRAFT_FP16_RELATIVE = 5e-2
# The same in bf16, rounded to 8 bits (4e-3): eight times fp16's.
DRAFT_BF16_RELATIVE = 4e-1
# Correlation of logits of 20 random tokens with those of the unquantised weights, tiny models of
# random weights: of 300 texts the least was 0.866 (int4; half of them below 0.94), 0.9989 (int8).
QUANTISED_CORRELATION = {"int4": 0.8, "int8": 0.998}
# Logits and confidences of two kernels that make them from the same states, a head's and a check's:
# what lies between their products is rounded in one and not in the other, fp16 by 5e-4, bf16 by
# 4e-3 of it: on an H200 confidences in bf16 were up to 5.4e-3 apart.
TWO_KERNELS = {"fp32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2}
# A factor of the inverse of second moments, found in float64 and rounded to fp32 (6e-8), against
# NumPy's in float64, relative to the largest entry: damped, their condition is below 1e6.
INPUT_FACTOR_RELATIVE = 2e-7

# Weights of GGUF's Q4_1 in the same groups with fractional zero points, in steps: an offset is off
# by half of a 119th of the largest of its output's, which is half a step of the largest group; that
# may be a few times another group's. Hidden states of a model of such weights, relative to their
# norm: as they come out of four to six blocks.
Q4_1_STEPS = 0.02
Q4_1_BLOCKS = 0.002
