"""Bundles whose digests are right and that are wrong: refused, or found by `verify`.

Each is a stored bundle with a manifest, graph or weight file changed and all digests made anew.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundle_copy import BundleCopy
from hostile import change_a_value

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.onnx_file import read_onnx
from ojfa_export.errors import BackendError, BundleError, OjfaError
from ojfa_export.graphs.weights import references
from ojfa_export.runtime.model import Model, load
from ojfa_export.system.progress import Silent
from ojfa_export.verify.verify import verify_bundle

VECTORS = Path(__file__).parents[2] / "engines" / "tests" / "vectors"
NAMES = ("llama", "gpt2", "phi3")
CASES = 150
Fields = dict[str, Any]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], BundleCopy]:
    return lambda name: BundleCopy(VECTORS / f"{name}.ojfa", tmp_path / f"{name}.ojfa")


def tokens(model: Model) -> list[int]:
    """What it writes at both depths that are golden, of a prompt that isn't."""
    session, found = model.session(1, 12), []
    pending = [5, 6, 7]
    for _ in range(6):
        pending = [int(session.advance(pending, model.blocks)[0].argmax())]
        found += pending
    return found


def is_found(directory: Path) -> bool:
    """Whether a bundle is refused, or doesn't pass `verify`; nothing but OjfaError may come."""
    try:
        return not all(
            each.passed for each in verify_bundle(directory, None, "onnxruntime", Silent())
        )
    except OjfaError:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_stored_bundles_tell_the_truth(name: str) -> None:
    assert not is_found(VECTORS / f"{name}.ojfa")


@pytest.mark.parametrize("name", NAMES)
def test_random_lies_of_a_manifest_are_found_or_harmless(
    name: str, copied: Callable[[str], BundleCopy], rng: np.random.Generator
) -> None:
    expected = tokens(load(VECTORS / f"{name}.ojfa"))
    for _ in range(CASES // len(NAMES)):
        copy, done = copied(name), ""

        def change(fields: Fields) -> None:
            nonlocal done
            part = "model" if rng.random() < 0.5 else ""  # the spec, more often than digests
            done = change_a_value(fields[part] if part else fields, rng)

        copy.edit_manifest(change, resign=True)
        print(done)  # shown where the test fails
        if not is_found(copy.directory):
            assert tokens(load(copy.directory)) == expected
        shutil.rmtree(copy.directory)


# What says how large a model is; each by another value that divides as well.
SIZES = {
    "hidden_size": 64,
    "vocab_size": 321,
    "heads": 8,
    "kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "gated": False,
    "norm": "layer",
    "qk_norm": "head",
}


@pytest.mark.parametrize("field", SIZES)
def test_size_that_contradicts_the_graphs(field: str, copied: Callable[[str], BundleCopy]) -> None:
    copy = copied("llama")
    copy.edit_manifest(
        lambda fields: fields["model"]["spec"].update({field: SIZES[field]}), resign=True
    )
    with pytest.raises(BundleError, match=r"\.onnx contradicts manifest\.json"):
        Bundle(copy.directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "llama"),
        ("activation", "relu"),
        ("window", None),
        ("window", 23),
        ("windowed", [True, False, True, True]),
        ("rotated", [True, False, True, True]),
        ("norms", "after"),
        ("parallel", True),
        ("attention_softcap", 50.0),
        ("logit_softcap", 30.0),
        ("norm_epsilon", 1e-3),
        ("attention_scales", [0.25, 0.25, 0.25, 0.125]),
        ("max_positions", 4096),
    ],
)
def test_what_no_shape_tells_is_found_by_verify(
    field: str, value: Any, copied: Callable[[str], BundleCopy]
) -> None:
    copy = copied("phi3")
    copy.edit_manifest(lambda fields: fields["model"]["spec"].update({field: value}), resign=True)
    Bundle(copy.directory)
    failed = [
        c for c in verify_bundle(copy.directory, None, "onnxruntime", Silent()) if not c.passed
    ]
    assert failed[0].name == "model as its config says"


def test_graphs_described_by_the_lie_as_well(copied: Callable[[str], BundleCopy]) -> None:
    """Sizes changed wherever the manifest has them: the graphs themselves say other ones."""
    copy = copied("llama")

    def change(fields: Fields) -> None:
        fields["model"]["spec"]["vocab_size"] = 321
        for graph in fields["graphs"]:
            for port in (*graph["inputs"], *graph["outputs"]):
                port["shape"] = [321 if each == 320 else each for each in port["shape"]]

    copy.edit_manifest(change, resign=True)
    with pytest.raises(BundleError, match=r"graphs/embed\.onnx contradicts .*\[320, 32\]"):
        Bundle(copy.directory)


def test_engines_exchanged_between_blocks(copied: Callable[[str], BundleCopy]) -> None:
    copy = copied("llama")

    def change(fields: Fields) -> None:
        files = fields["engines"][0]["files"]
        files["block_00"], files["block_01"] = files["block_01"], files["block_00"]

    copy.edit_manifest(change, resign=True)
    with pytest.raises(BundleError, match="is none of its graph's weights"):
        Bundle(copy.directory)


def test_graphs_exchanged_between_blocks(copied: Callable[[str], BundleCopy]) -> None:
    copy = copied("llama")

    def change(fields: Fields) -> None:
        one, other = fields["graphs"][1:3]
        one["file"], other["file"] = other["file"], one["file"]

    copy.edit_manifest(change, resign=True)
    with pytest.raises(BundleError, match="it is not the file of 'block_00'"):
        Bundle(copy.directory)


@pytest.mark.parametrize("table", ["cos", "sin"])
def test_rotary_table_in_another_file(table: str, copied: Callable[[str], BundleCopy]) -> None:
    copy = copied("llama")
    copy.edit_manifest(
        lambda fields: fields["rotary"][table].update(file="graphs/embed.bin"), resign=True
    )
    with pytest.raises(BundleError, match=f"rotary_{table}_table is elsewhere"):
        Bundle(copy.directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(value: float, copied: Callable[[str], BundleCopy]) -> None:
    copy = copied("llama")
    path = copy.own("graphs/embed.bin")
    np.full(320 * 32, value, np.float32).tofile(path)
    copy.sign("graphs/embed.bin")
    assert is_found(copy.directory)
    model = load(copy.directory)
    for arguments in ({}, {"temperature": 0.7}, {"exit": 2}):
        with pytest.raises(BackendError, match="logits that are no numbers"):
            model.generate("def", **arguments)


def test_weights_exchanged_between_blocks_are_found_by_verify(
    copied: Callable[[str], BundleCopy],
) -> None:
    copy = copied("llama")
    one, other = (copy.own(f"graphs/block_0{i}.bin") for i in (0, 1))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    copy.sign("graphs/block_00.bin", "graphs/block_01.bin")
    checks = verify_bundle(copy.directory, None, "onnxruntime", Silent())
    assert any(not each.passed for each in checks if each.name.startswith("golden"))


# Where a tensor may not be.
OUTSIDE = [
    "../../outside.bin",
    "../graphs/embed.bin",
    "/etc/hostname",
    "other.bin",
    "",
    ".",
    "./embed.bin",
]


@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("file", ["graphs/embed.onnx", "engines/onnxruntime/embed.onnx"])
def test_tensor_outside_the_bundle(
    location: str, file: str, copied: Callable[[str], BundleCopy]
) -> None:
    copy = copied("llama")
    outside = copy.directory.parent / "outside.bin"
    outside.write_bytes((copy.directory / "graphs" / "embed.bin").read_bytes())
    _set_external(copy, file, location=location)
    with pytest.raises(BundleError, match=re.escape(repr(location))):
        Bundle(copy.directory)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"offset": "64"}, "reaches beyond 'embed.bin'"),
        ({"offset": str(2**62)}, "reaches beyond 'embed.bin'"),
        ({"offset": "-64"}, "has offset '-64'"),
        ({"offset": str(2**64)}, "has offset"),
        ({"length": "1"}, "has 40960 bytes and length 1"),
        ({"length": "x"}, "has length 'x'"),
    ],
)
def test_tensor_beyond_its_file(
    entries: dict[str, str], match: str, copied: Callable[[str], BundleCopy]
) -> None:
    copy = copied("llama")
    _set_external(copy, "graphs/embed.onnx", **entries)
    with pytest.raises(BundleError, match=match):
        Bundle(copy.directory)


@pytest.mark.parametrize("left_out", [("length",), ("offset",), ("offset", "length")])
def test_offset_and_length_may_be_left_out(
    left_out: tuple[str, ...], copied: Callable[[str], BundleCopy]
) -> None:
    copy = copied("llama")
    for file in ("graphs/embed.onnx", "engines/onnxruntime/embed.onnx"):
        _set_external(copy, file, **dict.fromkeys(left_out, ""))
    assert not is_found(copy.directory)


def _set_external(copy: BundleCopy, file: str, **entries: str) -> None:
    """Changes where the token embedding is; "" leaves an offset or length out."""
    path = copy.own(file)
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name == "token_embedding")
    now = {each.key: each.value for each in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in now.items():
        if value or key == "location":
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    copy.sign(file)


@pytest.mark.parametrize("name", NAMES)
def test_reader_of_graphs_agrees_with_onnx(name: str) -> None:
    for path in sorted((VECTORS / f"{name}.ojfa").rglob("*.onnx")):
        graph, model = read_onnx(path.read_bytes()), onnx.load(path, load_external_data=False)
        refs = references(model)
        assert {n: (t.location, t.offset, t.length, t.shape) for n, t in graph.tensors.items()} == {
            n: (r.location, r.offset, r.length, r.dims) for n, r in refs.items()
        }
        for found, ports in (
            (graph.inputs, model.graph.input),
            (graph.outputs, model.graph.output),
        ):
            assert [each.name for each in found] == [each.name for each in ports]
            for port, value in zip(found, ports, strict=True):
                kind = value.type.tensor_type
                assert port.dtype == onnx.TensorProto.DataType.Name(kind.elem_type).lower()
                assert list(port.shape) == [d.dim_param or d.dim_value for d in kind.shape.dim]


def test_reader_of_graphs_refuses_damage(rng: np.random.Generator) -> None:
    data = (VECTORS / "llama.ojfa" / "graphs" / "block_00.onnx").read_bytes()
    for _ in range(500):
        damaged = bytearray(data)
        for at in rng.integers(len(data), size=3):
            damaged[at] = int(rng.integers(256))
        with suppress(ValueError):  # nothing else
            read_onnx(bytes(damaged[: int(rng.integers(len(data)))]))


def test_reader_of_graphs_finds_tensors_that_are_hidden() -> None:
    external = onnx.TensorProto(name="t", data_type=1, dims=[1])
    external.data_location = onnx.TensorProto.EXTERNAL
    external.external_data.add(key="location", value="/etc/hostname")
    inner = onnx.GraphProto(name="inner")
    sparse = onnx.SparseTensorProto(values=external)
    for attribute in (
        onnx.AttributeProto(name="a", t=external),
        onnx.AttributeProto(name="a", tensors=[external]),
        onnx.AttributeProto(name="a", g=inner),
        onnx.AttributeProto(name="a", graphs=[inner]),
        onnx.AttributeProto(name="a", sparse_tensor=sparse),
    ):
        node = onnx.NodeProto(op_type="If", attribute=[attribute])
        graph = onnx.GraphProto(node=[node])
        with pytest.raises(ValueError, match="node"):
            read_onnx(onnx.ModelProto(graph=graph).SerializeToString())
    for model in (
        onnx.ModelProto(graph=onnx.GraphProto(sparse_initializer=[sparse])),
        onnx.ModelProto(functions=[onnx.FunctionProto(name="f")]),
    ):
        with pytest.raises(ValueError, match="it has"):
            read_onnx(model.SerializeToString())
