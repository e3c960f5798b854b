"""Builds killed, interrupted, repeated or run twice: a bundle is there whole or not at all."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import STEPS, Steps, contents, interrupt_at

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import MANIFEST
from ojfa_export.compiler import pipeline, stages, work
from ojfa_export.compiler.pipeline import build
from ojfa_export.errors import OjfaError, UsageError

Options = Callable[..., Any]
Run = Callable[..., Any]


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def assert_unfinished(output: Path) -> None:
    assert sorted(path.name for path in output.parent.iterdir()) == [partial(output).name]


def test_processes_give_the_same_bytes(
    tiny_bundle: Path, options: Options, build_in_process: Run
) -> None:
    ours = contents(tiny_bundle)
    for seed in ("0", "4242"):
        asked = options(output=options().output.parent / seed / "out.ojfa")
        process = build_in_process(asked, PYTHONHASHSEED=seed)
        assert process.returncode == 0, process.stderr
        assert contents(asked.output) == ours


def test_named_fields_are_all_that_differs(tiny_bundle: Path, options: Options) -> None:
    build(options())
    one, other = (
        json.loads((bundle / MANIFEST).read_text()) for bundle in (tiny_bundle, options().output)
    )
    assert one["built"].pop("time") != other["built"].pop("time")
    assert one["built"].pop("host") == other["built"].pop("host")
    assert one.pop("digest") != other.pop("digest")
    # What depends on how fast the machine is.
    assert one.pop("default")["full_ms_per_token"] > 0
    assert other.pop("default")["exit"] == "full"
    assert one == other


# While building engines, while running text, and when all but verifying is done.
@pytest.mark.parametrize("step", [8, 14, STEPS - 1])
def test_killed_build_goes_on(
    step: int, tiny_bundle: Path, options: Options, build_in_process: Run
) -> None:
    asked = options()
    process = build_in_process(asked, stop=step)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert_unfinished(asked.output)
    result = build(asked)
    ends = {"export": 6, "engines": 12, "calibrate": 33, "statistics": 38}
    finished = [name for name, end in ends.items() if step >= end]
    assert [record.name for record in result.stages if record.resumed] == finished
    assert contents(asked.output) == contents(tiny_bundle)
    assert not partial(asked.output).exists()


def test_interrupted_anywhere_goes_on(
    tiny_bundle: Path, options: Options, rng: np.random.Generator
) -> None:
    asked = options()
    for step in sorted(rng.choice(STEPS, 2, replace=False).tolist()):
        shutil.rmtree(partial(asked.output), ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            build(asked, interrupt_at(step))
        assert_unfinished(asked.output)
        build(asked)
        assert contents(asked.output) == contents(tiny_bundle), step
        shutil.rmtree(asked.output)


def test_interrupted_again_and_again(tiny_bundle: Path, options: Options) -> None:
    asked = options()
    for step in (3, 4, 3, 7, 10, 4):
        with pytest.raises(KeyboardInterrupt):
            build(asked, interrupt_at(step))
        assert_unfinished(asked.output)
    build(asked)
    assert contents(asked.output) == contents(tiny_bundle)


def test_finished_stages_are_not_done_again(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(asked)
    assert_unfinished(asked.output)
    bundle = partial(asked.output) / "bundle"
    times = {p.relative_to(bundle): p.stat().st_mtime_ns for p in bundle.rglob("*") if p.is_file()}
    assert len(times) > 20
    again = Steps()
    result = build(asked, again)
    kept = "export, engines, text, calibrate, statistics, exits"
    assert again.tasks == [f"kept of an earlier run: {kept}"]
    assert [record.resumed for record in result.stages] == [True, True, True, True, True, False]
    assert times == {name: (asked.output / name).stat().st_mtime_ns for name in times}


def test_exported_graphs_are_not_exported_again(options: Options) -> None:
    asked = options()
    with pytest.raises(KeyboardInterrupt):
        build(asked, interrupt_at(3))
    first = partial(asked.output) / "bundle" / "graphs" / "block_01.bin"
    time = first.stat().st_mtime_ns
    build(asked)
    assert (asked.output / "graphs" / "block_01.bin").stat().st_mtime_ns == time


def test_other_checkpoint_starts_anew(options: Options, tmp_path: Path) -> None:
    from tiny_models import make_checkpoint

    with pytest.raises(KeyboardInterrupt):
        build(options(), interrupt_at(20))
    other = make_checkpoint("llama-gqa", tmp_path / "checkpoint", seed=12)
    result = build(options(checkpoint=str(other)))
    assert not any(record.resumed for record in result.stages)


def test_files_cut_short_are_no_part_of_the_bundle(tiny_bundle: Path, options: Options) -> None:
    asked = options()
    with pytest.raises(KeyboardInterrupt):
        build(asked, interrupt_at(14))
    for name in ("graphs/embed.onnx.partial", ".shortcut.safetensors.x1.partial"):
        (partial(asked.output) / "bundle" / name).write_bytes(b"half")
    build(asked)
    assert contents(asked.output) == contents(tiny_bundle)


def test_two_builds_at_once(tiny_bundle: Path, options: Options) -> None:
    asked = options()

    def build_too(step: int) -> None:
        if step in (0, 9, 20):
            with pytest.raises(OjfaError, match=r"out\.ojfa is being built by another") as caught:
                build(asked)
            assert caught.value.hint

    build(asked, Steps(build_too))
    assert contents(asked.output) == contents(tiny_bundle)


def test_lock_of_a_build_that_has_just_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other build's directory is removed between opening its lock and taking hold of it.
    asked = work.Work(tmp_path / "out", "fingerprint")
    monkeypatch.setattr(fcntl, "flock", lambda *_: shutil.rmtree(asked.directory))
    with pytest.raises(OjfaError, match="being built by another process"), asked.open():
        pass


def test_failure_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    asked = work.Work(tmp_path / "out", "fingerprint")

    def fail() -> None:
        raise OjfaError("can't")

    with pytest.raises(OjfaError), asked.open():
        fail()
    assert list(tmp_path.iterdir()) == []
    with asked.open():
        (asked.bundle / "begun").touch()
    with pytest.raises(OjfaError), asked.open():
        fail()
    assert (asked.bundle / "begun").exists()


def test_existing_output_is_refused(options: Options, tmp_path: Path) -> None:
    output = tmp_path / "out.ojfa"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    for overwrite, match in ((False, "exists already"), (True, r"holds no manifest\.json")):
        with pytest.raises(UsageError, match=match) as caught:
            build(options(overwrite=overwrite))
        assert caught.value.hint
    assert (output / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ojfa"]


def test_existing_file_or_link_is_refused(options: Options, tmp_path: Path) -> None:
    (tmp_path / "out.ojfa").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        build(options(overwrite=True))
    (tmp_path / "out.ojfa").unlink()
    (tmp_path / "out.ojfa").symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists already"):
        build(options())


def test_overwrite_replaces(tiny_bundle: Path, options: Options) -> None:
    asked = options()
    build(options(rank=2))
    (asked.output / "extra").touch()
    build(options(overwrite=True))
    assert contents(asked.output) == contents(tiny_bundle)
    assert not partial(asked.output).exists()


def test_interrupted_overwrite_keeps_the_old_bundle(options: Options) -> None:
    build(options(rank=2))
    before = contents(options().output)
    with pytest.raises(KeyboardInterrupt):
        build(options(overwrite=True), interrupt_at(STEPS - 1))
    assert contents(options().output) == before


def test_output_that_comes_to_be_meanwhile_is_kept(options: Options) -> None:
    asked = options()

    def make_output(step: int) -> None:
        if step == STEPS - 1:
            asked.output.mkdir()
            (asked.output / "precious.txt").write_text("mine")

    with pytest.raises(UsageError, match="exists already"):
        build(asked, Steps(make_output))
    assert (asked.output / "precious.txt").read_text() == "mine"


def test_interrupted_after_publishing(
    tiny_bundle: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bundle has its name, what is left of the work is still there: it is no work to resume.
    asked, real = options(), shutil.rmtree

    def rmtree(path: Path, **arguments: Any) -> None:
        if asked.output.exists() and path == partial(asked.output):
            raise KeyboardInterrupt
        real(path, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work.shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            build(asked)
    assert contents(asked.output) == contents(tiny_bundle)
    result = build(options(overwrite=True))
    assert not any(record.resumed for record in result.stages)
    assert contents(asked.output) == contents(tiny_bundle)


def test_stages_record_time_and_memory(options: Options) -> None:
    result = build(options())
    assert [record.name for record in result.stages] == [
        "export", "engines", "text", "calibrate", "statistics", "exits", "verify"
    ]  # fmt: skip
    assert all(record.seconds >= 0 for record in result.stages)
    peaks = [record.peak_memory_bytes for record in result.stages]
    assert peaks == sorted(peaks)
    assert peaks[0] > 10_000_000
    document = result.to_json()
    assert (document["blocks"], document["rank"]) == (4, 8)
    assert 1 <= document["fitted_at"] <= 3
    assert str(result.bundle) in result.summary()


def test_verified_build(options: Options) -> None:
    result = build(options(skip_verification=False))
    assert len(result.report.checks) > 10
    assert all(check.passed for check in result.report.checks)
    Bundle(result.bundle)


def test_failed_verification_leaves_no_bundle(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ojfa_export.errors import VerificationError

    real = stages.Exporter.final_head

    def wrong(self: stages.Exporter) -> None:
        real(self)
        path = self.directory / "final_head.bin"
        data = np.fromfile(path, np.float32)
        data[data.size // 2 :] += 1
        data.tofile(path)

    monkeypatch.setattr(stages.Exporter, "final_head", wrong)
    with pytest.raises(VerificationError, match="checks failed against transformers") as caught:
        build(options(skip_verification=False))
    assert "nothing was written" in str(caught.value.hint)
    assert not options().output.exists()
