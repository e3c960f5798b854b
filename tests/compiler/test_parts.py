"""Engines for a finished bundle, and the stages alone."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import Steps, contents, interrupt_at

from ojfa_export.backends.onnxruntime import build as build_module
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import MANIFEST, graph_names
from ojfa_export.bundle.shortcut_file import load as load_shortcut
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.kept import read_state
from ojfa_export.compiler.parts import calibrate_only, export_only
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.errors import (
    BundleError,
    CheckpointError,
    OjfaError,
    UsageError,
    VerificationError,
)
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.model import load
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.verify import verify_bundle

Options = Callable[..., Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.ojfa"))


def test_engines_are_rebuilt_in_place(bundle: Path, tiny_bundle: Path) -> None:
    weights = bundle / "graphs" / "block_00.bin"
    inode = weights.stat().st_ino
    result = add_engines(bundle, "onnxruntime", SILENT)
    checks = result.pop("checks")
    assert result == {"bundle": str(bundle), "backend": "onnxruntime", "engines": 7}
    assert checks > 4  # of each block, at least
    assert weights.stat().st_ino == inode  # linked, not copied
    assert weights.stat().st_nlink == 1
    assert contents(bundle) == contents(tiny_bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["copy.ojfa"]
    checks = verify_bundle(bundle, None, "onnxruntime", SILENT)
    assert checks
    assert all(check.passed for check in checks)


def test_engines_of_other_backends_are_kept(bundle: Path) -> None:
    opened = Bundle(bundle).manifest
    other = opened.engines[0].model_copy(update={"backend": "other"})
    changed = opened.model_copy(update={"engines": (other, *opened.engines)})
    (bundle / MANIFEST).write_text(changed.to_json())
    add_engines(bundle, "onnxruntime", SILENT)
    assert Bundle(bundle).engines("other").files == other.files
    assert [each.backend for each in Bundle(bundle).manifest.engines] == ["other", "onnxruntime"]


def test_engines_for_a_bundle_without_any(bundle: Path, tiny_bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    files = {k: v for k, v in manifest.files.items() if not k.startswith("engines/")}
    shutil.rmtree(bundle / "engines")
    changed = manifest.model_copy(update={"engines": (), "files": files})
    (bundle / MANIFEST).write_text(changed.to_json())
    with pytest.raises(BundleError, match="it has: none"):
        load(bundle)
    add_engines(bundle, "onnxruntime", SILENT)
    assert contents(bundle) == contents(tiny_bundle)


def test_interrupted_engines_leave_the_bundle(bundle: Path, tiny_bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        add_engines(bundle, "onnxruntime", interrupt_at(3))
    assert contents(bundle) == contents(tiny_bundle)
    add_engines(bundle, "onnxruntime", SILENT)
    assert contents(bundle) == contents(tiny_bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["copy.ojfa"]


def test_interrupted_engines_are_found_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is known by its directory's inode, which linking the bundle must not change."""
    module = importlib.import_module("ojfa_export.compiler.add_engines")
    right, opened = module._link, []

    def held(source: Path, target: Path, backend: Any) -> None:
        opened.append(os.open(target, os.O_RDONLY))  # the inode can't be used for another one
        right(source, target, backend)

    monkeypatch.setattr(module, "_link", held)
    with pytest.raises(KeyboardInterrupt):
        add_engines(bundle, "onnxruntime", interrupt_at(3))
    work = bundle.with_name("copy.ojfa.onnxruntime.partial")
    state = read_state(work / "state.json")
    assert state is not None
    assert state.inode == (work / "bundle").stat().st_ino == os.fstat(opened[0]).st_ino
    os.close(opened[0])


def test_engines_that_compute_something_else_are_refused(
    bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block with another epsilon, say: the first check that fails names it."""
    right = build_module.build_engine

    def with_another_epsilon(spec: ModelSpec, graph: Path, engine: Path) -> None:
        other = spec.model_copy(update={"norm_epsilon": 0.5})
        right(other if graph.stem == "block_02" else spec, graph, engine)

    monkeypatch.setattr(build_module, "build_engine", with_another_epsilon)
    with pytest.raises(VerificationError, match="the first: float64 block_02: hidden") as caught:
        add_engines(bundle, "onnxruntime", SILENT)
    assert "nothing was written" in str(caught.value.hint)
    assert contents(bundle) == contents(tiny_bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["copy.ojfa"]


def test_engines_for_a_bundle_that_is_replaced_meanwhile(
    bundle: Path, options: Options, tmp_path: Path
) -> None:
    other = build(options(output=tmp_path / "other", rank=2)).bundle

    def replace(step: int) -> None:
        if step == 3:
            bundle.rename(tmp_path / "old")
            other.rename(bundle)

    with pytest.raises(OjfaError, match="was replaced or removed while engines") as caught:
        add_engines(bundle, "onnxruntime", Steps(replace))
    assert caught.value.hint
    assert load_shortcut(bundle / "shortcut.safetensors")[0].rank == 2


def test_engines_leave_a_resumable_build_alone(options: Options, tiny_bundle: Path) -> None:
    asked = options()
    shutil.copytree(tiny_bundle, asked.output)
    with pytest.raises(KeyboardInterrupt):
        build(options(overwrite=True), interrupt_at(20))
    add_engines(asked.output, "onnxruntime", SILENT)
    assert [r.resumed for r in build(options(overwrite=True)).stages][:2] == [True, True]


def test_damaged_bundle_or_unknown_backend(bundle: Path) -> None:
    with pytest.raises(UsageError, match="backend 'none' is not known"):
        add_engines(bundle, "none", SILENT)
    (bundle / "graphs" / "embed.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"embed\.bin has 0 bytes"):
        add_engines(bundle, "onnxruntime", SILENT)


def test_verify_finds_wrong_golden_tokens(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    assert manifest.golden
    first = manifest.golden[0]
    wrong = first.model_copy(update={"token_ids": ((first.token_ids[0] + 1) % 320,)})
    changed = manifest.model_copy(update={"golden": (wrong,)})
    (bundle / MANIFEST).write_text(changed.to_json())
    assert not all(c.passed for c in verify_bundle(bundle, None, "onnxruntime", SILENT))


def test_golden_tokens_are_the_models_own(tiny_bundle: Path) -> None:
    model = load(tiny_bundle)
    golden = model.manifest.golden
    assert golden
    for each in golden:
        session = model.session()
        logits = session.advance(list(each.prompt_token_ids), each.exit)[0]
        for token in each.token_ids:
            assert int(np.argmax(logits)) == token
            logits = session.advance([token], each.exit)[0]


@pytest.mark.parametrize("length", [1, 3, 16])
def test_golden_tokens_fit_a_short_cache(options: Options, length: int) -> None:
    result = build(options(max_cache_length=length))
    golden = Bundle(result.bundle).manifest.golden
    assert golden  # also where there is room for one token alone, or none that leads clearly
    for each in golden:  # the last token needs no room
        assert len(each.prompt_token_ids) + len(each.token_ids) <= length + 1
    assert all(c.passed for c in verify_bundle(result.bundle, None, "onnxruntime", SILENT))


def test_verify_against_another_checkpoint(tiny_bundle: Path, tmp_path: Path) -> None:
    from tiny_models import make_checkpoint

    other = make_checkpoint("llama-gqa", tmp_path / "other", seed=99)
    with pytest.raises(CheckpointError, match="was not built from"):
        verify_bundle(tiny_bundle, str(other), "onnxruntime", SILENT)


def test_calibrate_alone_gives_the_bundles_shortcut(
    options: Options, tiny_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "jump.safetensors"
    result = calibrate_only(options(output=output), SILENT, report=tmp_path / "report")
    assert output.read_bytes() == (tiny_bundle / "shortcut.safetensors").read_bytes()
    assert result["shortcut"] == str(output)
    assert result["rank"] == 8
    json.dumps(result)
    ours, theirs = (path / "report.json" for path in (tmp_path / "report", tiny_bundle / "report"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jump.safetensors", "report"]
    with pytest.raises(UsageError, match="exists already"):
        calibrate_only(options(output=output), SILENT)


def test_calibrate_and_build_of_one_name_share_no_work(options: Options, tiny_bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate_only(options(), interrupt_at(15))
    build(options())
    assert contents(options().output) == contents(tiny_bundle)


def test_interrupted_calibration_goes_on(
    options: Options, tiny_bundle: Path, tmp_path: Path
) -> None:
    asked = options(output=tmp_path / "jump")
    with pytest.raises(KeyboardInterrupt):
        calibrate_only(asked, interrupt_at(15))
    assert not asked.output.exists()
    again = Steps()
    calibrate_only(asked, again)
    assert not any("exporting" in task or "engines" in task for task in again.tasks)
    assert asked.output.read_bytes() == (tiny_bundle / "shortcut.safetensors").read_bytes()


def test_calibrate_does_not_replace_a_directory(options: Options, tmp_path: Path) -> None:
    (tmp_path / "out.ojfa").mkdir()
    with pytest.raises(UsageError, match="exists and is no file"):
        calibrate_only(options(overwrite=True), SILENT)


def test_export_alone_gives_the_bundles_graphs(
    options: Options, tiny_bundle: Path, tmp_path: Path
) -> None:
    shortcut = tiny_bundle / "shortcut.safetensors"
    for jump, names in (
        ((), [name for name in graph_names(4) if name != "exit_head"]),
        ((shortcut,), graph_names(4)),
    ):
        output = tmp_path / f"graphs{len(names)}"
        result = export_only(options(output=output), jump, SILENT)
        assert sorted(result["graphs"]) == sorted(names)
        assert {path.stem for path in output.glob("*.onnx")} == set(names)
        for path in output.iterdir():
            assert path.read_bytes() == (tiny_bundle / "graphs" / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_export_refuses_another_models_shortcut(
    options: Options, tiny_bundle: Path, tmp_path: Path
) -> None:
    jump, _ = load_shortcut(tiny_bundle / "shortcut.safetensors")
    from ojfa_export.bundle.shortcut_file import save

    save(jump, tmp_path / "other", "0" * 64)
    with pytest.raises(CheckpointError, match="a shortcut of another model") as caught:
        export_only(options(), [tmp_path / "other"], SILENT)
    assert "calibrate" in str(caught.value.hint)
    with pytest.raises(OjfaError, match="can't be read as a shortcut"):
        export_only(options(), [tmp_path / "none"], SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_interrupted_export_leaves_nothing(options: Options, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_only(options(), (), interrupt_at(2))
    assert list(tmp_path.iterdir()) == []


def test_plan_writes_nothing(options: Options, tmp_path: Path) -> None:
    document = plan(options())
    assert list(tmp_path.iterdir()) == []
    assert document["graphs"] == graph_names(4)
    assert document["settings"]["rank"] == 8
    assert document["spec"]["kv_heads"] == 2
    assert document["scratch_bytes"] == 4 * document["calibration_tokens"] * 64 * 5
    json.dumps(document)
