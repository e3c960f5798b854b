"""Builds with other options after an interruption: what they don't change is not done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import STEPS, Steps, contents, interrupt_at

from ojfa_export.bundle.names import MANIFEST
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import save
from ojfa_export.compiler import inputs as inputs_module
from ojfa_export.compiler import pipeline
from ojfa_export.compiler.fingerprints import fingerprint, stage_keys
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.kept import names_below
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.compiler.work import Work
from ojfa_export.errors import OjfaError

Options = Callable[..., Any]
ALL = ("export", "engines", "text", "calibrate", "statistics", "exits", "verify")
AFTER_TEXT = ALL[3:]
WITH_PROMISE = ("statistics", "certification", *ALL[5:])
PROMISE = {"max_disagreement": 0.3, "confidence": 0.8}
# Each option with another value, and the stages that depend on it.
CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "precision": ({"precision": "fp16"}, ALL),
    "weights": ({"weights": "int8", "group_size": 16}, ALL),
    "group_size": ({"weights": "int4", "group_size": 16}, ALL),
    "cache": ({"cache": "fp8", "precision": "fp16", "backend": "another"}, ALL),
    "max_cache_length": ({"max_cache_length": 48}, ALL),
    "backend": ({"backend": "another"}, ALL[1:]),
    "calibration_tokens": ({"calibration_tokens": 2048}, ALL[2:]),
    "rank": ({"rank": 3}, AFTER_TEXT),
    "shortcut": ({"shortcut": "residual"}, AFTER_TEXT),
    "check_vocabulary": ({"check_vocabulary": 20}, ("check", *ALL[4:])),
    "draft_vocabulary": ({"draft_vocabulary": 0}, ()),  # without a draft layer
    "max_disagreement": ({"max_disagreement": 0.3}, WITH_PROMISE),
    "confidence": (PROMISE, WITH_PROMISE),
    "max_extra_surprisal": ({**PROMISE, "max_extra_surprisal": 0.5}, WITH_PROMISE),
    "self_text": ({**PROMISE, "self_text": "alone"}, ("self-text", *WITH_PROMISE)),
    "self_text_windows": (
        {**PROMISE, "self_text": "alone", "self_text_windows": 100},
        ("self-text", *WITH_PROMISE),
    ),
    "revision": ({"revision": "v2"}, ALL[-1:]),
    "max_batch_size": ({"max_batch_size": 2}, ALL[-1:]),
    "ignore_config_fields": ({"ignore_config_fields": ("initializer_range",)}, ALL[-1:]),
    "overwrite": ({"overwrite": True}, ()),
    "skip_verification": ({"skip_verification": False}, ()),
    "trust_remote_code": ({"trust_remote_code": True}, ()),
}
# Files are changed below.
BY_FILE = {"checkpoint", "output", "calibration_data", "recipe"}


def keys(options: Any) -> dict[str, str]:
    return stage_keys(Inputs(options))


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | other if one.get(name) != other.get(name)}


def test_every_option_is_looked_at() -> None:
    assert CHANGES.keys() | BY_FILE == {each.name for each in fields(BuildOptions)}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_what_depends_on_it(
    name: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ojfa_export import backends

    real = backends.load("onnxruntime")

    class Another:
        name = "another"
        beside_fp8_cache = ("fp16",)

        def versions(self) -> dict[str, str]:
            return real.versions()

        def with_cache(self, storage: str) -> NarrowCache:
            return NarrowCache()

    class NarrowCache(Another):
        def versions(self) -> dict[str, str]:
            return {**super().versions(), "cache": "fp8"}

    # Of a directory there is no revision.
    monkeypatch.setattr(inputs_module, "resolve", lambda checkpoint, _: Path(checkpoint))
    monkeypatch.setattr(backends, "load", lambda name: Another() if name == "another" else real)
    change, stages = CHANGES[name]
    assert changed(keys(options()), keys(options(**change))) == set(stages)
    same = fingerprint(Inputs(options())) == fingerprint(Inputs(options(**change)))
    assert same == (not stages)


def test_parts_of_a_promise_change_what_depends_on_them(options: Options) -> None:
    before = keys(options(**PROMISE))
    # The same windows are looked at, and something else is asked of them, of other exits maybe.
    for change in ({"confidence": 0.7}, {"max_disagreement": 0.4}, {"max_extra_surprisal": 0.5}):
        after = keys(options(**{**PROMISE, **change}))
        assert changed(before, after) == {"certification", "exits", "verify"}
    # What the model writes depends on no precision.
    writing = {**PROMISE, "self_text": "alone"}
    found = changed(keys(options(**writing)), keys(options(**writing, precision="fp16")))
    assert found == {*ALL, "certification"}


def test_files_change_what_depends_on_them(
    options: Options, tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    before = keys(options())
    assert not changed(before, keys(options(output=tmp_path / "other.ojfa")))
    other = tmp_path / "other.txt"
    other.write_text("# another text\n" + calibration_text.read_text())
    assert changed(before, keys(options(calibration_data=(other,)))) == set(ALL[2:])
    # A text that is longer where no window is taken from changes what the manifest says of it.
    longer = tmp_path / "longer" / calibration_text.name
    longer.parent.mkdir()
    longer.write_text(calibration_text.read_text() + "#")
    assert changed(before, keys(options(calibration_data=(longer,)))) == {"verify"}
    copy = tmp_path / "copy" / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, copy)
    assert not changed(before, keys(options(checkpoint=str(copy))))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert changed(before, keys(options(checkpoint=str(copy)))) == {"verify"}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert changed(before, keys(options(checkpoint=str(copy)))) == set(ALL)


def test_a_shortcut_is_told_by_its_content(
    options: Options, tmp_path: Path, rng: np.random.Generator
) -> None:
    inputs = Inputs(options())
    hidden, path = inputs.checkpoint.spec.hidden_size, tmp_path / "given.safetensors"

    def write() -> None:
        arrays = {
            name: rng.standard_normal(shape, np.float32)
            for name, shape in {
                "scale": (hidden,),
                "shift": (hidden,),
                "down": (hidden, 2),
                "up": (2, hidden),
            }.items()
        }
        save(Shortcut(**arrays, kind="ojfa", fitted_at=1), path, inputs.model_sha256)

    write()
    given = options(rank=None, shortcut=path)
    before = keys(given)
    assert keys(given) == before
    write()
    assert changed(before, keys(given)) == set(AFTER_TEXT)


# Interrupted when all but verifying is done, and while exits are measured.
@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("rank", STEPS - 1),
        ("rank", 30),
        ("precision", STEPS - 1),
        ("max_batch_size", 30),
        ("max_disagreement", STEPS - 1),
    ],
)
def test_another_build_goes_on(name: str, step: int, options: Options, tmp_path: Path) -> None:
    change, stages = CHANGES[name]
    with pytest.raises(KeyboardInterrupt):
        build(options(), interrupt_at(step))
    seen = Steps()
    result = build(options(**change), seen)
    had = [stage for stage in ("export", "engines", "text", "calibrate", "statistics") if
           step == STEPS - 1 or stage in ALL[:3]]  # fmt: skip
    kept = [stage for stage in had if stage not in stages]
    # Hidden states of the text are not kept after what needs them.
    if "calibrate" in had:
        kept = [stage for stage in kept if stage != "text"]
    assert [record.name for record in result.stages if record.resumed] == kept
    dropped = [stage for stage in had if stage not in kept]
    expected = f"kept of an earlier run: {', '.join(kept) or 'nothing'}"
    if dropped:
        expected += f"; not {', '.join(dropped)}, which another command had made"
    assert seen.tasks[0] == expected
    fresh = build(options(output=tmp_path / "fresh", **change))
    assert contents(result.bundle) == contents(fresh.bundle)


def test_again_and_again_with_other_options(
    tiny_bundle: Path, options: Options, rng: np.random.Generator
) -> None:
    changes: list[dict[str, Any]] = [{}, *(change for change, stages in CHANGES.values() if stages)]
    allowed = [c for c in changes if not {"backend", "self_text", "revision"} & c.keys()]
    for change in rng.permutation(np.array(allowed, object))[:6]:
        with suppress(KeyboardInterrupt):  # where much is reused, a build may come to its end
            asked = options(**{**change, "overwrite": True})
            build(asked, interrupt_at(int(rng.integers(1, STEPS - 1))))
    build(options(overwrite=True))
    assert contents(options().output) == contents(tiny_bundle)


def test_without_a_draft_layer_nothing_of_it_is_left(tmp_path: Path) -> None:
    def run(names: str, stop: str | None) -> Work:
        work = Work(tmp_path / "out", names, keys={name: f"key of {name}" for name in names})
        with work.open():
            for name in names:
                with work.stage(name) as needed:
                    if name == stop:
                        raise KeyboardInterrupt
                    if needed:
                        (work.bundle / "engines" / name).mkdir()
                        (work.bundle / "engines" / name / "file").write_text(name)
        return work

    with pytest.raises(KeyboardInterrupt):
        run("abcd", "d")
    work = run("acde", None)
    assert (work.finished, work.dropped) == (("a", "c", "d", "e"), ("b",))
    assert names_below(work.directory) == [f"bundle/engines/{name}/file" for name in "acde"]
    assert not (work.bundle / "engines" / "b").exists()


def test_files_of_an_interrupted_stage_are_its_own(tmp_path: Path) -> None:
    """They are kept for it, whatever is built in between, and removed where its key is another."""

    def open_work(**keys: str) -> Work:
        return Work(tmp_path / "out", json.dumps(keys), keys=keys)

    def interrupted(work: Work, name: str, file: str) -> None:
        with suppress(KeyboardInterrupt), work.open(), work.stage(name):
            (work.scratch / file).write_text("begun")
            raise KeyboardInterrupt

    interrupted(open_work(one="1", two="2"), "two", "of two")
    with open_work(one="another", two="2").open() as work:
        assert (work.scratch / "of two").exists()
        with work.stage("one") as needed:
            assert needed
            (work.scratch / "of one").write_text("done")
    with open_work(one="a third", two="2").open() as work:
        assert names_below(work.directory) == ["scratch/of two"]
    with open_work(one="a third", two="22").open() as work:
        assert names_below(work.directory) == []


def test_killed_while_other_work_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was left of it is not taken for work by a build of the same options."""
    first = Work(tmp_path / "out", "a", keys={"one": "1", "two": "2"})
    with suppress(KeyboardInterrupt), first.open():
        for name in ("one", "two"):
            with first.stage(name):
                (first.scratch / name).write_text(name)
        raise KeyboardInterrupt

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    second = Work(tmp_path / "out", "b", keys={"one": "1", "two": "another"})
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        second.open().__enter__()
    assert (second.scratch / "two").exists()
    third = Work(tmp_path / "out", "b", keys={"one": "1", "two": "another"})
    with third.open() as work:
        assert work.finished == ("one",)
        assert names_below(work.directory) == ["scratch/one"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": "x", "stages": {"a": 1}}'])
def test_damaged_state_is_no_work(content: str, tmp_path: Path) -> None:
    asked = Work(tmp_path / "out", "x")
    asked.bundle.mkdir(parents=True)
    (asked.bundle / "file").touch()
    (asked.directory / "state.json").write_text(content)
    with asked.open():
        assert (asked.finished, names_below(asked.directory)) == ((), [])


def test_work_without_keys_is_begun_anew(tmp_path: Path) -> None:
    with suppress(OjfaError), Work(tmp_path / "out", "a").open() as work:
        with work.stage("one"):
            (work.scratch / "one").touch()
        raise OjfaError("stopped")
    with Work(tmp_path / "out", "a").open() as work:
        assert work.finished == ("one",)
    with Work(tmp_path / "out", "b").open() as work:
        assert (work.finished, work.dropped) == ((), ("one",))
        assert names_below(work.directory) == []


def test_nothing_is_said_of_a_first_build(options: Options) -> None:
    seen = Steps()
    build(options(), seen)
    assert not [task for task in seen.tasks if task.startswith("kept")]
    assert MANIFEST in {path.name for path in options().output.iterdir()}
    assert pipeline.plan(options(output=options().output.with_name("b")))["stages"] == [*ALL]
