"""The attention kernels against float64; neither TensorRT nor prepared cases are needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from attention_cases import VARIANTS, Example, Variant
from tolerances import ATTENTION_FP16_RELATIVE, ATTENTION_FP32_RELATIVE

pytestmark = pytest.mark.gpu

WHOLE_MODELS = {
    "llama2-7b": Variant(32, 32, 128, 128, 0, half=True),
    "llama3-8b": Variant(32, 8, 128, 128, 0, half=True),
    "phi3-mini": Variant(32, 32, 96, 96, 2047, half=True),
    "gpt2-xl": Variant(25, 25, 64, 0, 0, half=True),
}
EVERY = {**VARIANTS, **WHOLE_MODELS}


@pytest.fixture(scope="module")
def codes():
    """Machine code of every variant: compiled beside one another, as each takes seconds."""
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.cuda.kernels import compile_kernels

    chip = the_device().compute_capability
    with ThreadPoolExecutor() as pool:
        yield {
            name: pool.submit(compile_kernels, variant.definitions(), chip)
            for name, variant in EVERY.items()
        }


class Compiled:
    """A variant's kernels on the GPU."""

    def __init__(self, variant: Variant, code: bytes) -> None:
        from ojfa_export.backends.cuda.arrays import DeviceArrays
        from ojfa_export.backends.cuda.device import the_device
        from ojfa_export.backends.cuda.kernels import Kernels
        from ojfa_export.backends.tensorrt.attention import Attention, Scratch

        self.variant, self.device = variant, the_device()
        self.device.make_current()
        self.arrays = DeviceArrays(self.device)
        geometry = variant.geometry
        self.attention = Attention(
            Kernels(self.device, code), geometry, self.device.multiprocessors
        )
        self.scratch = lambda tokens: Scratch(self.device, self.arrays, geometry, tokens)

    def run(self, example, work):
        """Runs work(operands) and compares."""
        held = {name: self.arrays.asarray(array) for name, array in example.arrays().items()}
        work(example.operands({name: array.pointer for name, array in held.items()}))
        out, keys, values = (np.asarray(held[name]) for name in ("out", "keys", "values"))
        tolerance = ATTENTION_FP16_RELATIVE if self.variant.half else ATTENTION_FP32_RELATIVE
        example.check(out, keys, values, tolerance)


@pytest.fixture(scope="module", params=EVERY)
def compiled(request, codes):
    return Compiled(EVERY[request.param], codes[request.param].result())


@pytest.mark.parametrize(
    "pasts", [[0], [15], [127], [128], [2047], [5, 130, 640], [33 * i for i in range(16)]]
)
def test_one_token_of_each_sequence(compiled, rng, pasts):
    example = Example(compiled.variant, rng, pasts, 1, capacity=max(pasts) + 3)
    scratch = compiled.scratch(len(pasts))

    def work(operands):
        for _ in range(3):  # the later ones find what the first has left
            compiled.attention.run(operands, scratch, len(pasts), together=True)

    compiled.run(example, work)


@pytest.mark.parametrize(("past", "tokens"), [(0, 2), (150, 9), (700, 40)])
def test_consecutive_tokens_by_split_keys(compiled, rng, past, tokens):
    example = Example(compiled.variant, rng, [past], tokens, capacity=800)
    scratch = compiled.scratch(tokens)
    compiled.run(example, lambda operands: compiled.attention.step(operands, scratch, 1, tokens))


@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 70), (37, 33), (130, 300)])
def test_a_prompt(compiled, rng, past, tokens):
    example = Example(compiled.variant, rng, [past], tokens, capacity=450)
    compiled.run(example, lambda operands: compiled.attention.prompt(operands, tokens))


def test_one_recording_serves_every_position(compiled, rng):
    past, steps = 120, 20
    variant, device = compiled.variant, compiled.device
    example = Example(variant, rng, [past, past - 100], 1, capacity=past + steps)
    scratch = compiled.scratch(2)
    held = {name: compiled.arrays.asarray(array) for name, array in example.arrays().items()}
    operands = example.operands({name: array.pointer for name, array in held.items()})

    def work():
        compiled.attention.run(operands, scratch, 2, together=True)

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
        tolerance = ATTENTION_FP16_RELATIVE if variant.half else ATTENTION_FP32_RELATIVE
        example.check(out, keys, values, tolerance)
        example.keys, example.values = keys, values
        example.positions = example.positions + np.int32(1)
