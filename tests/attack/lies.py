"""Consistent lies: bundles that contradict themselves, every digest made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .bundles import DESCRIBED_ONLY, READ_WHOLE, SUBJECTS, Case, Rng, copy_subject
from .digests import edit_manifest, redigest
from .graph_lies import EXTERNAL_DATA
from .hostile_tokenizers import spoil_tokenizer
from .judge import Must

COUNT = 260
Fields = dict[str, Any]

ENGINES_ONLY = "the engines of ONNX Runtime are run by Python alone"
GRAPHS_ONLY = "the portable graphs are run by C++'s reference backend; Python runs engines"
TEXT_ONLY = "C++ takes token ids: it reads no tokenizer"
SHORTCUT_ONLY = "shortcut.safetensors is what exit heads were made from; C++ doesn't read it"


def make(number: int, rng: Rng, directory: Path) -> Case:
    """A bundle with one lie; the kinds take turns."""
    subject = SUBJECTS[rng.integers(len(SUBJECTS))]
    bundle = copy_subject(subject, directory)
    case = Case(subject, bundle, "")
    what = LIES[number % len(LIES)](case, rng)
    case.what = f"{subject}: {what}"
    return case


def _other(value: int, rng: Rng) -> int:
    choices = {value + 1, 2 * value, max(1, value // 2), value + 64, 1, 2**31 - 1} - {value}
    return sorted(choices)[rng.integers(len(choices))]


def _shape(case: Case, rng: Rng) -> str:
    """A size in the manifest that the graphs contradict."""
    names = ["hidden_size", "vocab_size", "heads", "kv_heads", "head_dim", "intermediate_size"]
    name, said = names[rng.integers(len(names))], []

    def change(fields: Fields) -> None:
        spec = fields["model"]["spec"]
        old, spec[name] = spec[name], _other(spec[name], rng)
        said.append(f"{name} {old} became {spec[name]}")

    edit_manifest(case.bundle, change)
    case.must = Must.NAME
    return said[0]


def _heads_for_features(case: Case, rng: Rng) -> str:
    """Twice the heads of half the features: all products stay as they are."""
    half = bool(rng.integers(2))

    def change(fields: Fields) -> None:
        spec = fields["model"]["spec"]
        for name, up in (("heads", half), ("kv_heads", half), ("head_dim", not half)):
            spec[name] = spec[name] * 2 if up else max(1, spec[name] // 2)

    edit_manifest(case.bundle, change)
    case.must = Must.NAME
    return "heads, kv_heads and head_dim, their products kept"


def _part(case: Case, rng: Rng) -> str:
    """Another norm, activation, window, scale, ... than the graphs compute."""
    others: list[tuple[str, list[Any]]] = [
        ("family", ["llama", "gpt2", "phi3", "mamba", ""]),
        ("norm_epsilon", [0.5, 0.0, -1.0, 1e30]),
        ("norm", ["rms", "layer"]),
        ("activation", ["silu", "gelu", "gelu_tanh", "relu"]),
        ("gated", [True, False]),
        ("tied_head", [True, False]),
        ("window", [1, 3, None, 2**31 - 1]),
        ("rotary_dim", [0, 2, 8, 15, -2, 64]),
        ("rotary_switch", [1, 5, None, 2**31 - 1]),
        ("attention_scales", [[9.0] * 4, [0.0] * 4, [0.25] * 3, []]),
        ("max_positions", [1, 4, 2**31 - 1]),
        ("eos_token_ids", [[2], [], [-1], [320], [2**31 - 1] * 3]),
        ("blocks", [1, 3, 5, 65537, 2**31 - 1]),
    ]
    name, values = others[rng.integers(len(others))]
    value = values[rng.integers(len(values))]

    def change(fields: Fields) -> None:
        fields["model"]["spec"][name] = value

    edit_manifest(case.bundle, change)
    case.another = name in ("eos_token_ids", "max_positions")
    return f"{name} became {value!r:.40}"


def _rotary(case: Case, rng: Rng) -> str:
    files = ["graphs/block_00.bin", "graphs/embed.bin", "tokenizer.json", "graphs/rotary.bin"]
    file, offset = files[rng.integers(4)], [0, 4, 64, 1 << 40, 2**63 - 1][rng.integers(5)]
    swap = rng.random() < 0.3

    def change(fields: Fields) -> None:
        tables = fields["rotary"]
        if tables is None:  # learned positions
            piece = {"file": "graphs/embed.bin", "offset": 0, "shape": [64, 4]}
            fields["rotary"] = {"cos": piece, "sin": piece}
        elif swap:
            tables["cos"], tables["sin"] = tables["sin"], tables["cos"]
        else:
            tables["cos"].update(file=file, offset=offset)

    edit_manifest(case.bundle, change)
    return "rotary tables swapped" if swap else f"rotary cosines at {offset} of {file}"


def _exchange_engines(case: Case, rng: Rng) -> str:
    one, other = _two_graphs(rng)

    def change(fields: Fields) -> None:
        files = fields["engines"][0]["files"]
        files[one], files[other] = files[other], files[one]

    edit_manifest(case.bundle, change)
    case.one_runtime = ENGINES_ONLY
    return f"engines of {one} and {other} exchanged"


def _exchange_graphs(case: Case, rng: Rng) -> str:
    one, other = _two_graphs(rng)

    def change(fields: Fields) -> None:
        named = {graph["name"]: graph for graph in fields["graphs"]}
        for key in ("file", "weights"):
            named[one][key], named[other][key] = named[other][key], named[one][key]

    edit_manifest(case.bundle, change)
    case.one_runtime = GRAPHS_ONLY
    return f"graphs of {one} and {other} exchanged"


def _two_graphs(rng: Rng) -> tuple[str, str]:
    names = ["embed", "block_00", "block_01", "block_03", "exit_head", "final_head"]
    one, other = rng.choice(len(names), 2, replace=False)
    return names[one], names[other]


def _golden(case: Case, rng: Rng) -> str:
    """Golden tokens removed, or such as the engines can't give."""
    how = ["removed", "emptied", "changed", "of ids beyond", "of no exit", "too many"][
        rng.integers(6)
    ]

    def change(fields: Fields) -> None:
        first = fields["golden"][0]
        if how == "removed":
            fields["golden"] = []
        elif how == "emptied":
            for golden in fields["golden"]:
                golden["token_ids"] = []
        elif how == "changed":
            first["token_ids"][0] = (first["token_ids"][0] + 1) % 320
        elif how == "of ids beyond":
            first["prompt_token_ids"][0] = [-1, 320, 2**31 - 1][rng.integers(3)]
        elif how == "of no exit":
            first["exit"] = [5, 2**31 - 1][rng.integers(2)]
        else:
            first["token_ids"] *= 4096

    edit_manifest(case.bundle, change)
    case.must = Must.NAME
    return f"golden tokens {how}"


def _not_finite(case: Case, rng: Rng) -> str:
    """NaN or infinity in weights: everywhere, or in one place that may not matter."""
    path = _weights(case, rng)
    values = np.fromfile(path, np.float32)
    bad = [np.nan, np.inf, -np.inf][rng.integers(3)]
    everywhere = bool(rng.integers(2))
    if everywhere:
        values[::7] = bad
    else:
        values[rng.integers(len(values))] = bad
    values.tofile(path)
    redigest(case.bundle)
    case.must = Must.NAME if everywhere else Must.ANY
    case.another = not everywhere
    case.one_runtime = "" if everywhere else READ_WHOLE
    return f"{path.name}: {bad} {'everywhere' if everywhere else 'in one place'}"


def _other_weights(case: Case, rng: Rng) -> str:
    """Weights of another model; or a file cut or grown."""
    path = _weights(case, rng)
    data = path.read_bytes()
    how = ["one value", "cut", "grown", "empty"][rng.integers(4)]
    if how == "one value":
        values = np.frombuffer(data, np.float32).copy()
        values[rng.integers(len(values))] += 1
        data = values.tobytes()
        case.another = True
    elif how == "cut":
        data = data[: int(rng.integers(1, len(data)))]
    elif how == "grown":
        data += rng.bytes(4)
    else:
        data = b""
    path.write_bytes(data)
    redigest(case.bundle)
    return f"{path.name}: {how}"


def _weights(case: Case, rng: Rng) -> Path:
    paths = sorted((case.bundle / "graphs").glob("*.bin"))
    return paths[rng.integers(len(paths))]


def _shortcut(case: Case, rng: Rng) -> str:
    """A shortcut that isn't the one in the exit head."""
    names = ["rank", "fitted_at", "parameters", "kind", "residual", "gates"]
    name = names[rng.integers(len(names))]
    values = {"kind": ["ojfa", "residual", "x"], "residual": [True, False]}
    values["gates"] = [None, [0.0, 0.0, 0.0], [1.0], [-1e308] * 3]  # type: ignore[list-item]
    value = (values.get(name) or [1, 4, 9, 2**62])[rng.integers(2)]

    def change(fields: Fields) -> None:
        fields["shortcut"][name] = value

    edit_manifest(case.bundle, change)
    return f"shortcut {name} became {value}"


def _shortcut_file(case: Case, rng: Rng) -> str:
    path = case.bundle / "shortcut.safetensors"
    data = bytearray(path.read_bytes())
    how = ["a length of 2^63", "another value", "cut", "no header"][rng.integers(4)]
    if how == "a length of 2^63":
        data[:8] = (2**63).to_bytes(8, "little")
    elif how == "another value":
        data[-4:] = np.float32([1.5, np.nan][rng.integers(2)]).tobytes()
    elif how == "cut":
        del data[int(rng.integers(len(data))) :]
    else:
        data[8:] = b"x" * (len(data) - 8)
    path.write_bytes(data)
    redigest(case.bundle)
    case.one_runtime = SHORTCUT_ONLY
    return f"shortcut.safetensors: {how}"


def _policy(case: Case, rng: Rng) -> str:
    changes: list[tuple[str, Any]] = [
        ("auto", {"exits": [1, 2], "measure": "top", "thresholds": [0.5]}),
        ("auto", {"exits": [3, 1], "measure": "top", "thresholds": [0.5, 0.5]}),
        ("auto", {"exits": [1, 9], "measure": "top", "thresholds": [0.5, 0.5]}),
        ("auto", {"exits": [-1], "measure": "margin", "thresholds": [-5.0]}),
        ("auto", {"exits": [1], "measure": "entropy", "thresholds": [1e308]}),
        ("auto", {"exits": [], "measure": "top", "thresholds": []}),
        ("auto", {"exits": [1], "measure": "mood", "thresholds": [0.5]}),
        ("auto", None),
        ("default", None),
        ("promise", {"limits": {}, "policy": None}),
    ]
    name, value = changes[rng.integers(len(changes))]

    def change(fields: Fields) -> None:
        fields[name] = value

    edit_manifest(case.bundle, change)
    case.another = True
    return f"{name} became {value}"


def _tokenizer(case: Case, rng: Rng) -> str:
    what = spoil_tokenizer(case.bundle / "tokenizer.json", rng)
    redigest(case.bundle)
    case.another, case.one_runtime = True, TEXT_ONLY
    return what


def _bytes_of_a_graph(case: Case, rng: Rng) -> str:
    """A graph or engine with a byte changed, cut, or without a byte."""
    folder = ["graphs", "engines/onnxruntime"][rng.integers(2)]
    paths = sorted((case.bundle / folder).glob("*.onnx"))
    path = paths[rng.integers(len(paths))]
    data = bytearray(path.read_bytes())
    at = int(rng.integers(len(data)))
    how = ["changed", "cut", "empty"][rng.choice(3, p=[0.7, 0.2, 0.1])]
    if how == "changed":
        data[at] ^= int(rng.integers(1, 256))
    else:
        del data[at if how == "cut" else 0 :]
    path.write_bytes(data)
    redigest(case.bundle)
    case.one_runtime = GRAPHS_ONLY if folder == "graphs" else ENGINES_ONLY
    case.another = folder == "graphs" or how == "changed"
    return f"{folder}/{path.name}: {how} at byte {at}"


def _layout(case: Case, rng: Rng) -> str:
    """Cache, precision, opset, weights and ports that the files don't bear out."""
    changes: list[tuple[str, Callable[[Fields], Any]]] = [
        ("cache of 2^30 tokens", lambda f: f["cache"].update(max_length=2**30)),
        ("cache of 2^30 sequences", lambda f: f["cache"].update(max_batch_size=2**30)),
        ("precision fp16", lambda f: f.update(precision="fp16")),
        ("opset 99", lambda f: f.update(opset=99)),
        ("a graph without weights", lambda f: f["graphs"][1].update(weights=[])),
        ("a graph without inputs", lambda f: f["graphs"][1].update(inputs=[])),
        ("engines twice", lambda f: f["engines"].append(f["engines"][0])),
        ("no engines", lambda f: f.update(engines=[])),
        ("engines of TensorRT", lambda f: f["engines"][0].update(backend="tensorrt")),
        (
            "engines of another version",
            lambda f: f["engines"][0]["built_with"].update(onnxruntime="0.1"),
        ),
        ("cache axes", lambda f: f["cache"].update(axes=["position"])),
        ("an engine file that is a weight", _engine_is_weight),
    ]
    what, change = changes[rng.integers(len(changes))]
    edit_manifest(case.bundle, lambda fields: change(fields) and None)
    case.another = "cache" in what
    case.one_runtime = ENGINES_ONLY if "engine" in what else ""
    if "inputs" in what or "axes" in what:
        case.one_runtime = DESCRIBED_ONLY
    return what


def _engine_is_weight(fields: Fields) -> None:
    fields["engines"][0]["files"]["block_01"] = "graphs/block_01.bin"


def _external_data(case: Case, rng: Rng) -> str:
    """A graph or engine whose tensors lie where they mustn't."""
    engine = bool(rng.integers(2))
    folder = case.bundle / ("engines/onnxruntime" if engine else "graphs")
    what, must = EXTERNAL_DATA[rng.integers(len(EXTERNAL_DATA))](folder, case.bundle, rng)
    redigest(case.bundle)
    case.must = must
    case.one_runtime = ENGINES_ONLY if engine else ""
    return f"{'engine' if engine else 'graph'} {what}"


LIES: tuple[Callable[[Case, Rng], str], ...] = (
    _shape,
    _external_data,
    _part,
    _rotary,
    _exchange_engines,
    _golden,
    _not_finite,
    _tokenizer,
    _shape,
    _external_data,
    _part,
    _other_weights,
    _bytes_of_a_graph,
    _policy,
    _layout,
    _exchange_graphs,
    _heads_for_features,
    _shortcut,
    _shortcut_file,
)
