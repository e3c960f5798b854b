"""The attention kernels against float64; neither TensorRT nor prepared cases are needed."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import VARIANTS, Example, Variant

from ojfa_export.backends.tensorrt.attention import STEP_QUERIES, Chunks, step_launch

pytestmark = pytest.mark.gpu

WHOLE_MODELS = {
    "llama2-7b": Variant(32, 32, 128, 128, 0),
    "llama3-8b": Variant(32, 8, 128, 128, 0),
    "phi3-mini": Variant(32, 32, 96, 96, 2047),
    "gpt2-xl": Variant(25, 25, 64, 0, 0),
}
EVERY = {**VARIANTS, **WHOLE_MODELS}


class Compiled:
    """A variant's kernels on the GPU."""

    def __init__(self, variant: Variant) -> None:
        from ojfa_export.backends.cuda.arrays import DeviceArrays
        from ojfa_export.backends.cuda.device import the_device
        from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels
        from ojfa_export.backends.tensorrt.attention import Attention, Scratch

        self.variant, self.device = variant, the_device()
        self.device.make_current()
        # The other kernels would take most of the time.
        chip, sources = self.device.compute_capability, ("attention.cu", "prompt.cu")
        code = compile_kernels(variant.definitions(), chip, sources)
        self.arrays = DeviceArrays(self.device)
        geometry = variant.geometry
        kernels = Kernels(self.device, code)
        self.attention, self.appending = (
            Attention(kernels, geometry, self.device.multiprocessors, most_new)
            for most_new in (1, STEP_QUERIES)
        )
        self.scratch = lambda tokens: Scratch(self.device, self.arrays, geometry, tokens)

    def run(self, example, work):
        """Runs work(operands) and compares."""
        held = {name: self.arrays.asarray(array) for name, array in example.arrays().items()}
        work(example.operands({name: array.pointer for name, array in held.items()}))
        out, keys, values = (np.asarray(held[name]) for name in ("out", "keys", "values"))
        example.check(out, keys, values)


@pytest.fixture(
    scope="module",
    params=[
        # Compiling takes seconds: by one process each.
        pytest.param(name, marks=pytest.mark.xdist_group(f"gpu-attention-{name}"))
        for name in EVERY
    ],
)
def compiled(request):
    return Compiled(EVERY[request.param])


@pytest.mark.parametrize(
    "pasts", [[0], [15], [127], [128], [2047], [5, 130, 640], [33 * i for i in range(16)]]
)
def test_one_token_of_each_sequence(compiled, rng, pasts):
    example = Example(compiled.variant, rng, pasts, 1, capacity=max(pasts) + 3)
    scratch = compiled.scratch(len(pasts))

    def work(operands):
        for _ in range(3):  # the later ones find what the first has left
            compiled.attention.run(operands, scratch, len(pasts), (Chunks(len(pasts), 1),))

    compiled.run(example, work)


@pytest.mark.parametrize(("past", "tokens"), [(0, 2), (150, 9), (700, 40)])
def test_consecutive_tokens_by_split_keys(compiled, rng, past, tokens):
    example = Example(compiled.variant, rng, [past], tokens, capacity=800)
    scratch = compiled.scratch(tokens)
    launches = (Chunks(1, tokens),)
    compiled.run(
        example, lambda operands: compiled.attention.run(operands, scratch, tokens, launches)
    )


@pytest.mark.parametrize("past", [0, 63, 150, 188, 189, 575, 700])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
def test_tokens_that_attention_appends(compiled, rng, past, tokens):
    example = Example(compiled.variant, rng, [past], tokens, capacity=800)
    scratch = compiled.scratch(tokens)

    def work(operands):
        for _ in range(3):
            compiled.appending.run(operands, scratch, tokens, (Chunks(1, tokens),))

    compiled.run(example, work)


@pytest.mark.parametrize("lengths", [[4, 8, 1, 3], [1, 137, 3, 90, 1, 8]])
def test_chunks_that_attention_appends(compiled, rng, lengths):
    """Also where others are too long for that: all are appended before."""
    pasts, tokens = [190, 0, 62, 511, 64, 17][: len(lengths)], sum(lengths)
    example = Example(compiled.variant, rng, pasts, 0, capacity=640, chunks=lengths)
    scratch = compiled.scratch(tokens)
    few, many = (
        [i for i, each in enumerate(lengths) if (each <= STEP_QUERIES) == wanted]
        for wanted in (True, False)
    )
    # One more without tokens, as numbers of chunks are rounded up.
    listed = np.concatenate([example.chunk_list(few), [[0, 0]]]).astype(np.int32)
    lists = compiled.arrays.asarray(listed), compiled.arrays.asarray(example.chunk_list(many))
    launches = [Chunks(len(listed), STEP_QUERIES, lists[0].pointer)]
    if many:
        launches.append(Chunks(len(many), max(lengths), lists[1].pointer))

    def work(operands):
        for _ in range(3):
            compiled.appending.run(operands, scratch, tokens, tuple(launches))

    compiled.run(example, work)


def test_tokens_get_the_same_however_many_are_beside_them(compiled, rng):
    """Bit by bit, as long as no thread block takes more keys than the splits are made for."""
    past, tokens = 379, 8
    example = Example(compiled.variant, rng, [past], tokens, capacity=400)
    if step_launch(compiled.variant.geometry, Chunks(1, tokens), 132).grid[0] < 3:
        pytest.skip("too many heads for that")
    width = compiled.variant.width
    outs = []
    for each in (tokens, 1, 3):
        held = {name: compiled.arrays.asarray(one) for name, one in example.arrays().items()}
        for first in range(0, tokens, each):
            count = min(each, tokens - first)
            at = {name: array.pointer for name, array in held.items()}
            at["out"] += first * held["out"].nbytes // tokens
            at["qkv"] += first * width * 4
            at["positions"] += first * 4
            at["sequences"] += first * 4
            scratch = compiled.scratch(count)
            launches = (Chunks(1, count),)
            compiled.appending.run(example.operands(at), scratch, count, launches)
            compiled.device.synchronize()
        outs.append([np.asarray(held[name]) for name in ("out", "keys", "values")])
    for some in outs[1:]:
        for one, other in zip(some, outs[0], strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 70), (37, 33), (130, 300)])
def test_a_prompt(compiled, rng, past, tokens):
    example = Example(compiled.variant, rng, [past], tokens, capacity=450)

    def work(operands):
        compiled.attention.append(operands, tokens)
        compiled.attention.prompt(operands, Chunks(1, tokens))

    compiled.run(example, work)


def test_chunks_of_any_length_in_one_pass(compiled, rng):
    pasts, lengths = [70, 0, 200, 31, 64, 511], [1, 137, 3, 90, 1, 8]
    example = Example(compiled.variant, rng, pasts, 0, capacity=640, chunks=lengths)
    scratch, tokens = compiled.scratch(sum(lengths)), sum(lengths)
    lists = [compiled.arrays.asarray(example.chunk_list(which)) for which in ([0, 2, 4, 5], [1, 3])]
    launches = (Chunks(4, 8, lists[0].pointer), Chunks(2, 137, lists[1].pointer))

    def work(operands):
        for _ in range(3):
            compiled.attention.run(operands, scratch, tokens, launches)

    compiled.run(example, work)


def test_one_recording_serves_every_position(compiled, rng):
    past, steps = 120, 20
    variant, device = compiled.variant, compiled.device
    example = Example(variant, rng, [past, past - 100], 1, capacity=past + steps)
    scratch = compiled.scratch(2)
    held = {name: compiled.arrays.asarray(array) for name, array in example.arrays().items()}
    operands = example.operands({name: array.pointer for name, array in held.items()})

    def work():
        compiled.attention.run(operands, scratch, 2, (Chunks(2, 1),))

    work()
    graph = device.capture(work)
    for _ in range(steps):
        example.qkv = rng.normal(size=example.qkv.shape).astype(np.float32)
        for name in ("qkv", "positions"):
            array = getattr(example, name)
            device.upload(array, held[name].pointer)
            device.synchronize()
        graph.launch()
        out, keys, values = (np.asarray(held[name]) for name in ("out", "keys", "values"))
        example.check(out, keys, values)
        example.keys, example.values = example.from_pages(keys), example.from_pages(values)
        example.positions = example.positions + np.int32(1)
