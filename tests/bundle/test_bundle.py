"""What makes a directory a bundle, beyond its digests: manifests here have a correct one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_copy import BundleCopy

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.entries import TensorSlice
from ojfa_export.bundle.manifest import FORMAT_VERSION, manifest_digest, read_manifest
from ojfa_export.bundle.names import MANIFEST, graph_names
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BundleError
from ojfa_export.runtime.model import Model, load

Fields = dict[str, Any]


def refused(directory: Path, match: str) -> BundleError:
    with pytest.raises(BundleError, match=match) as caught:
        Bundle(directory)
    assert str(directory) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_bundle_describes_what_is_in_it(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    manifest = bundle.manifest
    names = graph_names(4)
    assert [graph.name for graph in manifest.graphs] == names
    assert set(bundle.engines("onnxruntime").files) == set(names)
    assert manifest.shortcut.rank == 8
    assert manifest.cache.max_length == 64
    assert manifest.rotary is not None
    cos, sin = bundle.tensor(manifest.rotary.cos), bundle.tensor(manifest.rotary.sin)
    np.testing.assert_allclose(cos**2 + sin**2, np.ones((64, 8)), atol=1e-6)
    stored = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert stored == {*manifest.files, MANIFEST}


def test_manifest_digest_is_of_the_canonical_rest(tiny_bundle: Path) -> None:
    fields = json.loads((tiny_bundle / MANIFEST).read_text())
    digest = fields["digest"]
    assert manifest_digest(fields) == digest
    assert manifest_digest(dict(reversed(fields.items()))) == digest
    assert manifest_digest({**fields, "opset": 18}) != digest
    assert read_manifest(tiny_bundle).to_json() == (tiny_bundle / MANIFEST).read_text()


def _set(path: str, value: Any) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        *owners, last = path.split("/")
        node: Any = fields
        for owner in owners:
            node = node[int(owner) if isinstance(node, list) else owner]
        node[int(last) if isinstance(node, list) else last] = value

    return change


@pytest.mark.parametrize(
    "path",
    ["golden/0/token_ids/0", "golden/0/exit", "cache/max_length", "cache/max_batch_size", "opset"],
)
def test_number_that_no_file_digest_protects(copy: BundleCopy, path: str) -> None:
    copy.edit_manifest(_set(path, 7), resign=False)
    refused(copy.directory, "manifest.json was altered: its own digest differs")


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("unknown", 1, "unknown: Extra inputs"),
        ("cache/unknown", 1, "cache.unknown: Extra inputs"),
        ("graphs/0/unknown", None, r"graphs.0.unknown: Extra inputs"),
        ("model/spec/window", 0, "model.spec.window"),
        ("model/sha256", "0" * 63, "model.sha256"),
        ("cache/max_length", 0, "cache.max_length"),
        ("golden", None, "golden"),
        ("precision", "fp8", "precision"),
        ("built/time", "yesterday", "built.time"),
        ("files/tokenizer.json/size", -1, "files.tokenizer.json.size"),
        ("format_version", 0, "format_version"),
        ("format_version", "1", "format_version"),
        ("format", "other", "does not say format 'ojfa-bundle'"),
        ("graphs/0/weights/0", "graphs/other.bin", "'graphs/other.bin' without its digest"),
        ("rotary/cos/file", "graphs/other.bin", "'graphs/other.bin' without its digest"),
        ("engines/0/files/embed", "../embed.onnx", "'../embed.onnx' without its digest"),
        ("model/spec/blocks", 5, "attention_scales: there must be one for each block"),
        ("model/spec/blocks", 2**31, "model.spec.blocks: 2147483648 is above 65536"),
        ("model/spec/hidden_size", 2**31, "model.spec.hidden_size: above"),
        ("model/spec/rotary_dim", 15, "rotary_dim: it must be even"),
        ("model/spec/rotated", [True], "spec.rotated: there must be one for each block, or none"),
        (
            "model/spec/rotated_second",
            [True] * 3,
            "spec.rotated_second: there must be one for each",
        ),
        ("model/spec/rotated_second", [True] * 4, r"must be \[128 or more"),
        ("model/spec/logit_softcap", 0, "model.spec.logit_softcap"),
        ("model/spec/attention_softcap", -1.0, "model.spec.attention_softcap"),
        ("model/spec/kv_heads", 3, "kv_heads: they must divide"),
        ("cache/max_length", 2**31, "cache.max_length"),
        ("golden", [], "golden: Tuple should have at least 1 item"),
        ("golden/0/token_ids", [], "golden.0.token_ids: Tuple should have at least 1 item"),
        ("golden/0/prompt_token_ids/0", -1, "golden.0.prompt_token_ids.0"),
        ("golden/0/token_ids/0", 10**6, "golden tokens are outside the model"),
        ("golden/0/exit", 5, "golden tokens are outside the model"),
        ("engines/0/files", {}, "onnxruntime engines other than"),
        ("graphs", [], "graphs other than"),
        ("rotary", None, "rotary tables must be there"),
        ("rotary/cos/shape", [7], r"rotary tables \[7\] must be"),
        ("rotary/sin/shape", [64, 1], r"rotary tables \[64, 1\] must be"),
        ("cache/max_length", 65, r"must be \[65 or more"),
        ("auto", {"exits": [1], "measure": "hope", "thresholds": [0.5]}, "auto.measure"),
        ("auto", {"exits": [1], "measure": "top", "thresholds": []}, "1 exits and 0 thresholds"),
        ("auto", {"exits": [4], "measure": "top", "thresholds": [0.5]}, "1..3"),
    ],
)
def test_manifest_that_breaks_the_contract(
    copy: BundleCopy, path: str, value: Any, match: str
) -> None:
    copy.edit_manifest(_set(path, value), resign=True)
    refused(copy.directory, match)


def test_bundles_from_before_there_were_policies_stay_readable(copy: BundleCopy) -> None:
    copy.edit_manifest(lambda fields: fields.pop("auto"), resign=True)
    assert Bundle(copy.directory).manifest.auto is None


def test_policies_survive(copy: BundleCopy) -> None:
    policy = {"exits": [1, 3], "measure": "entropy", "thresholds": [-0.5, -1.5]}
    copy.edit_manifest(_set("auto", policy), resign=True)
    assert Bundle(copy.directory).manifest.auto == ExitPolicy.model_validate(policy)
    copy.edit_manifest(_set("auto/thresholds/1", -9.5), resign=False)
    refused(copy.directory, "manifest.json was altered: its own digest differs")


def test_newer_version_is_said_to_be_newer(copy: BundleCopy) -> None:
    # Its fields and its digest are unknown here: the version must be looked at first.
    def change(fields: Fields) -> None:
        fields.update(format_version=FORMAT_VERSION + 1, novelty=[])
        del fields["digest"]

    copy.edit_manifest(change, resign=False)
    error = refused(copy.directory, f"version {FORMAT_VERSION + 1}; this ojfa-export reads")
    assert "upgrade" in str(error.hint)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"ojfa-bundle"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "ojfa-bundle", "format_version": 1}',
        b'{"format": "ojfa-bundle", "n": ' + b"1" * 5000 + b"}",
        b"\0" * 100,
    ],
    ids=lambda text: text[:12].hex(),
)
def test_manifest_that_is_no_manifest(copy: BundleCopy, text: bytes) -> None:
    copy.own(MANIFEST).write_bytes(text)
    refused(copy.directory, "damaged|altered")


def test_directory_without_manifest(copy: BundleCopy) -> None:
    (copy.directory / MANIFEST).unlink()
    refused(copy.directory, "has no manifest.json")
    refused(copy.directory / "none", "no such directory")
    (copy.directory / MANIFEST).mkdir()
    refused(copy.directory, "manifest.json is damaged")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../outside",
        "graphs/../../outside",
        "graphs/../tokenizer.json",
        "..",
        ".",
        "",
        "./tokenizer.json",
        "graphs//embed.bin",
        "graphs\\embed.bin",
        "..\\outside",
        "a\0b/..",
    ],
)
def test_path_that_leaves_the_bundle(copy: BundleCopy, name: str) -> None:
    outside = copy.directory.with_name("outside")
    outside.write_text("secret")

    def change(fields: Fields) -> None:
        fields["files"][name] = fields["files"]["tokenizer.json"]

    copy.edit_manifest(change, resign=True)
    error = refused(copy.directory, "names a path that leaves the bundle")
    assert repr(name) in error.message


@pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_special_file_in_place_of_the_manifest(
    copy: BundleCopy, kind: Callable[[Path], None]
) -> None:
    (copy.directory / MANIFEST).unlink()
    kind(copy.directory / MANIFEST)
    refused(copy.directory, r"manifest\.json is damaged: .* is no plain file")


def test_manifest_without_end(copy: BundleCopy) -> None:
    os.truncate(copy.own(MANIFEST), 1 << 40)  # a hole: it takes no space
    refused(copy.directory, "has 1099511627776 bytes, more than the 67108864")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_manifest_with_what_is_no_number(copy: BundleCopy, number: str) -> None:
    path = copy.own(MANIFEST)
    path.write_text(
        path.read_text().replace('"norm_epsilon": ', f'"norm_epsilon": {number}, "x": ')
    )
    refused(copy.directory, f"{number} is no number that can be held")


def test_missing_file(copy: BundleCopy) -> None:
    (copy.directory / "graphs" / "block_02.bin").unlink()
    refused(copy.directory, r"lacks file 'graphs/block_02\.bin'")


@pytest.mark.parametrize("name", ["extra", "graphs/.hidden", "engines/new/embed.onnx"])
def test_extra_file(copy: BundleCopy, name: str) -> None:
    path = copy.directory / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    refused(copy.directory, f"holds '{re.escape(name)}', which its manifest does not name")


def test_renamed_file(copy: BundleCopy) -> None:
    path = copy.directory / "tokenizer.json"
    path.rename(path.with_name("Tokenizer.json"))
    refused(copy.directory, "lacks file 'tokenizer.json'")


def test_symbolic_link_to_the_same_bytes(copy: BundleCopy, tiny_bundle: Path) -> None:
    path = copy.directory / "graphs" / "embed.bin"
    path.unlink()
    path.symlink_to(tiny_bundle / "graphs" / "embed.bin")
    refused(copy.directory, "embed.bin is a symbolic link")


def test_symbolic_link_to_a_directory(copy: BundleCopy, tiny_bundle: Path) -> None:
    (copy.directory / "graphs").rename(copy.directory.with_name("moved"))
    (copy.directory / "graphs").symlink_to(tiny_bundle / "graphs", target_is_directory=True)
    refused(copy.directory, "graphs is a symbolic link")


def test_symbolic_link_in_place_of_the_manifest(copy: BundleCopy, tiny_bundle: Path) -> None:
    (copy.directory / MANIFEST).unlink()
    (copy.directory / MANIFEST).symlink_to(tiny_bundle / MANIFEST)
    refused(copy.directory, "manifest.json is a symbolic link")


def test_dangling_link_and_pipe(copy: BundleCopy) -> None:
    path = copy.directory / "report" / "link"
    path.symlink_to("nowhere")
    refused(copy.directory, "link is a symbolic link")
    path.unlink()
    os.mkfifo(path)
    refused(copy.directory, "special file")


def test_same_size_other_bytes_and_other_size(copy: BundleCopy) -> None:
    path = copy.own("shortcut.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(copy.directory, "shortcut.safetensors was altered: its SHA-256 differs")
    path.write_bytes(data + b"\0")
    refused(copy.directory, f"has {len(data) + 1} bytes, its manifest says {len(data)}")


def test_backend_without_engines(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"'tensorrt' \(it has: onnxruntime\)"):
        Bundle(tiny_bundle).engines("tensorrt")


@pytest.mark.parametrize(("offset", "shape"), [(1 << 40, (4,)), (0, (2**62, 2**62)), (0, (10**9,))])
def test_tensor_beyond_its_file(tiny_bundle: Path, offset: int, shape: tuple[int, ...]) -> None:
    location = TensorSlice(file="graphs/rotary.bin", offset=offset, shape=shape)
    with pytest.raises(BundleError, match="beyond the file"):
        Bundle(tiny_bundle).tensor(location)


def test_damaged_tokenizer_with_correct_digests(copy: BundleCopy) -> None:
    from ojfa_export.system.digest import sha256_file

    path = copy.own("tokenizer.json")
    path.write_text('{"version": "1.0"}')
    entry = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    copy.edit_manifest(_set("files/tokenizer.json", entry), resign=True)
    with pytest.raises(BundleError, match=r"tokenizer\.json can't be read") as caught:
        Model(Bundle(copy.directory))
    assert caught.value.hint


def test_load_takes_a_string(tiny_bundle: Path) -> None:
    assert load(str(tiny_bundle)).blocks == 4
    with pytest.raises(BundleError, match="no such directory"):
        load("no-such-bundle")
