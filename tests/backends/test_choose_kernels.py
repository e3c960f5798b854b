"""The kernels that choose against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from elements import DTYPES, macros
from kernels_on_cpu import CpuKernels
from tolerances import CONFIDENCE

from ojfa_export.decoding.head_output import ExitCheck, HeadRequest
from ojfa_export.decoding.sampling import GREEDY, Sampling

SOURCES = ("words.cuh", "choose.cuh", "choose.cu", "sample.cu", "exit_check.cu")
THREADS, BESIDE_THREADS, MOST_RANK = 512, 128, 128
# A thread block of a thousand fibers takes its time; tests/gpu/test_gpu_choose.py has more cases.
SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_k=40), Sampling(2.0, top_k=50, top_p=0.5)]


@pytest.fixture(scope="module")
def kernels(driver, tmp_path_factory):
    return CpuKernels("choose.cpp", SOURCES, macros("fp16"), tmp_path_factory.mktemp("choose"))


@pytest.fixture(scope="module")
def of_bf16(driver, tmp_path_factory):
    return CpuKernels("choose.cpp", SOURCES, macros("bf16"), tmp_path_factory.mktemp("of_bf16"))


@pytest.fixture
def mailbox(driver):
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.cuda.mailbox import Mailbox

    return Mailbox(the_device())


class Logits:
    """Takes the place of a `DeviceArray`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.ascontiguousarray(array, np.float32)
        self.pointer = self.array.ctypes.data

    def __len__(self) -> int:
        return len(self.array)


def confidences64(logits):
    """As `decoding.confidence.confidence` defines them, in float64 throughout."""
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    p = np.exp(below) / np.exp(below).sum(axis=1, keepdims=True)
    ranked = np.sort(p, axis=1)
    margin = ranked[:, -1] - (ranked[:, -2] if p.shape[1] > 1 else 0)
    entropy = np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
    return {"top": ranked[:, -1], "margin": margin, "entropy": entropy}


def assert_choices(choices, logits):
    assert choices.likeliest() == logits.argmax(axis=1).tolist()
    for measure, expected in confidences64(logits).items():
        np.testing.assert_allclose(choices.confidence(measure), expected, atol=CONFIDENCE, rtol=0)


def assert_drawn(token, logits, sampling, draw):
    """The host's token, but where the draw lies at the border of two."""
    shares = np.cumsum(sampling.probabilities(logits))
    low, high = shares[token - 1] if token else 0.0, shares[token]
    assert low - 1e-5 <= draw <= high + 1e-5
    if token != sampling.pick(logits, draw):
        assert min(abs(draw - low), abs(draw - high)) < 1e-5


def choose(kernels, mailbox, logits, how):
    from ojfa_export.backends.cuda.choosing import Chooser
    from ojfa_export.backends.cuda.mailbox import HeadArguments

    asked = HeadArguments.of(how)
    mailbox.leave(how)
    Chooser(kernels, mailbox, logits.shape[1]).choose(Logits(logits), asked)
    return mailbox.expect(len(logits))


@pytest.mark.parametrize(("vocabulary", "scale"), [(1, 3.0), (31, 0.01), (700, 3.0), (700, 200.0)])
def test_tokens_and_confidence(kernels, mailbox, rng, vocabulary, scale):
    logits = (scale * rng.normal(size=(2, vocabulary))).astype(np.float32)
    choices = choose(kernels, mailbox, logits, HeadRequest())
    assert_choices(choices, logits)
    assert choices.tokens() == choices.likeliest()


def test_ties_go_to_the_lowest_token(kernels, mailbox, rng):
    logits = rng.integers(-3, 4, size=(2, 700)).astype(np.float32)
    choices = choose(kernels, mailbox, logits, HeadRequest())
    assert choices.tokens() == logits.argmax(axis=1).tolist()
    assert not any(choices.confidence("margin"))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampled_tokens_are_those_of_the_host(kernels, mailbox, rng, sampling):
    logits = (3 * rng.normal(size=(4, 300))).astype(np.float32)
    logits[1] = np.round(logits[1])  # with many ties
    logits[2] = logits[2, 0]  # nothing else
    logits[3, 1:] -= 100 * (rng.random(299) < 0.9)  # most in the lowest bin
    draws = rng.random(4).tolist()
    choices = choose(kernels, mailbox, logits, HeadRequest(sampling, draws))
    for row, token in enumerate(choices.tokens()):
        assert_drawn(token, logits[row], sampling, draws[row])
    assert_choices(choices, logits)


def test_each_row_is_drawn_in_its_own_way(kernels, mailbox, rng):
    """Beside rows whose token is the likeliest; top-k beyond the vocabulary is none."""
    samplings = [*SAMPLINGS, GREEDY, Sampling(0.9, top_k=10**9)]
    logits = (3 * rng.normal(size=(len(samplings), 300))).astype(np.float32)
    draws = rng.random(len(samplings)).tolist()
    choices = choose(kernels, mailbox, logits, HeadRequest(draws=draws, samplings=samplings))
    for row, (token, sampling) in enumerate(zip(choices.tokens(), samplings, strict=True)):
        if sampling is GREEDY:
            assert token == logits[row].argmax()
        else:
            assert_drawn(token, logits[row], sampling, draws[row])
    assert_choices(choices, logits)


def check_exit(kernels, mailbox, head, hidden, how, blocks, kept=None, *, beside=False):
    """Launches the exit's check as `heads.ExitHead` does; its logits."""
    from ojfa_export.backends.cuda.choosing import Chooser
    from ojfa_export.backends.cuda.kernels import integer, number, pointer
    from ojfa_export.backends.cuda.mailbox import HeadArguments

    project, bias, vocabulary, vocabulary_bias, rank = head
    rows, features = hidden.shape
    outputs, columns = vocabulary.shape
    logits = np.full((rows, outputs), np.nan, np.float32)
    parts = np.zeros((blocks, rows, MOST_RANK), np.uint64)
    asked = HeadArguments.of(how)
    mailbox.leave(how)
    keeping = (None, None, None, 0)
    if kept is not None:
        positions, sequences = np.array([3, 1], np.int32), np.array([1, 0], np.int32)
        keeping = kept.ctypes.data, positions.ctypes.data, sequences.ctypes.data, kept.shape[1]
    for _ in range(2):  # the second finds what the first has left
        kernels.launch(
            f"exit_check{'_beside' * beside}_{rows}",
            (blocks, 1, 1),
            (BESIDE_THREADS if beside else THREADS, 1, 1),
            (
                pointer(logits.ctypes.data),
                pointer(hidden.ctypes.data),
                pointer(project.ctypes.data),
                pointer(bias.ctypes.data),
                pointer(vocabulary.ctypes.data),
                pointer(None if vocabulary_bias is None else vocabulary_bias.ctypes.data),
                pointer(parts.ctypes.data),
                *map(integer, (features, rank, columns, outputs)),
                number(1e-5),
                *map(pointer, keeping[:3]),
                integer(keeping[3]),
                *mailbox.asked(asked),
            ),
        )
        Chooser(kernels, mailbox, outputs).sample(Logits(logits), asked)
        choices = mailbox.expect(rows)
        choices.answers()
        mailbox.leave(how)
    return choices, logits


@pytest.mark.parametrize(
    ("rows", "features", "rank", "outputs", "blocks", "precision"),
    [
        *[(1, 32, 9, 70, 3, "fp16"), (2, 160, 42, 90, 3, "fp16")],
        *[(1, 384, 128, 1100, 2, "fp16"), (2, 64, 1, 2, 3, "fp16"), (2, 160, 42, 90, 3, "bf16")],
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_exit_check(
    request, mailbox, rng, beside, rows, features, rank, outputs, blocks, precision
):
    """More tiles than thread blocks and fewer, more outputs than threads, ranks to the largest."""
    kernels = request.getfixturevalue({"fp16": "kernels", "bf16": "of_bf16"}[precision])
    element = DTYPES[precision]
    wide = 16 // np.dtype(element).itemsize
    columns = -(-rank // wide) * wide
    project = rng.normal(size=(rank, features)).astype(np.float32)
    bias = rng.normal(size=rank).astype(np.float32)
    vocabulary = np.zeros((outputs, columns), element)
    vocabulary[:, :rank] = rng.normal(size=(outputs, rank))
    vocabulary_bias = rng.normal(size=outputs).astype(np.float32) if rows == 2 else None
    hidden = rng.normal(size=(rows, features)).astype(np.float32)
    z = hidden.astype(np.float64) @ project.T + bias
    z /= np.sqrt((z**2).mean(axis=1, keepdims=True) + 1e-5)
    exact = z @ vocabulary[:, :rank].astype(np.float64).T
    if vocabulary_bias is not None:
        exact = exact + vocabulary_bias
    head = project, bias, vocabulary, vocabulary_bias, rank
    draws = rng.random(rows).tolist()
    kept = np.zeros((2, 5, features), np.float32)
    sampling = Sampling(1.5, top_k=30)
    choices, logits = check_exit(
        kernels, mailbox, head, hidden, HeadRequest(sampling, draws), blocks, kept, beside=beside
    )
    np.testing.assert_allclose(logits, exact, atol=1e-4, rtol=1e-4)
    assert_choices(choices, logits)
    for row, token in enumerate(choices.tokens()):
        assert_drawn(token, logits[row], sampling, draws[row])
    for row, (sequence, position) in enumerate([(1, 3), (0, 1)][:rows]):
        np.testing.assert_array_equal(kept[sequence, position], hidden[row])
        kept[sequence, position] = 0
    assert not kept.any()
    assert not kernels.library.was_called_off()
    least = min(choices.confidence("top"))
    for threshold, off in ((least * 1.01, 0), (least, 1)):
        stop = ExitCheck("top", threshold, range(1))
        how = HeadRequest(GREEDY, (), stop)
        check_exit(kernels, mailbox, head, hidden, how, blocks, beside=beside)
        assert kernels.library.was_called_off() == off
    ctypes.c_int.in_dll(kernels.library, "called_off").value = 0
