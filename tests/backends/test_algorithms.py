"""Ways to make products that were measured when engines were built: which is taken for what."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def algorithms(driver):
    """The module, on the stand-in for the GPU."""
    from ojfa_export.backends.tensorrt import algorithms

    return algorithms


def test_the_next_larger_number_of_tokens_decides(algorithms):
    from ojfa_export.backends.cuda.cublas import Algorithm, Product

    half, single = np.dtype(np.float16), np.dtype(np.float32)
    kept = {}
    choices = []
    for number, (tokens, result) in enumerate(
        (tokens, result) for tokens in algorithms.TOKENS for result in ("fp16", "fp32")
    ):
        way = Algorithm((1 + number, *[0] * 7))
        kept[tokens, result] = way.hex()
        choices.append(
            algorithms.Choice(
                tokens=tokens,
                outputs=48,
                columns=16,
                result=result,
                algorithm=way.hex(),
                us=1.0,
                recommended_us=2.0,
            )
        )
    whole = algorithms.Choices(cublas=130100, precision="fp16", choices=tuple(choices))
    read = algorithms.Choices.model_validate_json(whole.model_dump_json())
    choose = algorithms.ChosenAlgorithms(read)
    for tokens, expected in ((17, 32), (32, 32), (33, 64), (700, 1024), (2048, 2048)):
        for result, dtype in (("fp16", half), ("fp32", single)):
            found = choose(Product(tokens, 48, 16, half, dtype, bias=False))
            assert found.hex() == kept[expected, result]
    assert choose(Product(2049, 48, 16, half, half, bias=False)) is None
    assert choose(Product(32, 47, 16, half, half, bias=False)) is None
    assert choose(Product(32, 48, 16, single, single, bias=False)) is None


@pytest.mark.parametrize("text", ["xyz", "00"])
def test_a_damaged_way_is_refused(algorithms, text):
    choice = algorithms.Choice(
        tokens=32, outputs=1, columns=1, result="fp16", algorithm=text, us=1.0, recommended_us=1.0
    )
    choices = algorithms.Choices(cublas=1, precision="fp16", choices=(choice,))
    with pytest.raises(ValueError, match=r"hexadecimal|Buffer size"):
        algorithms.ChosenAlgorithms(choices)


def test_kernels_of_another_version_are_refused(driver, tmp_path):
    """Their parameters are others."""
    from ojfa_export.backends.tensorrt.plan import INTERFACE, GraphPlan, read_plan
    from ojfa_export.errors import BundleError

    (tmp_path / "kernels.cubin").write_bytes(b"")
    path = tmp_path / "embed.json"
    for interface in (INTERFACE, INTERFACE - 1):
        plan = GraphPlan(
            precision="fp32",
            engines={},
            kernels={"fp32": "kernels.cubin"},
            interface=interface,
            weights={},
            activation_bytes=0,
        )
        path.write_text(plan.model_dump_json())
        if interface == INTERFACE:
            assert read_plan(path) == plan
    with pytest.raises(BundleError, match="of another version") as caught:
        read_plan(path)
    assert "rebuild the engines" in caught.value.hint
