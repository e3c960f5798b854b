"""Killed before every call to the file system: the old directory or the new one is there, whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ojfa_export.compiler.work import Work
from ojfa_export.errors import OjfaError
from ojfa_export.system import publish

# The calls that change names, of which a directory that others see consists.
CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink")
FILES = ("manifest.json", "graphs/embed.onnx")

Action = Callable[[], None]


def cannot_exchange(one: Path, other: Path) -> bool:
    """A file system without that operation."""
    return False


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here; hundreds of directories would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=["exchange", "in turn"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Each of the two ways of replacing a directory."""
    if request.param == "in turn":
        monkeypatch.setattr(publish, "exchange", cannot_exchange)
    else:
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
        if not publish.exchange(tmp_path / "one", tmp_path / "other"):
            pytest.skip("names can't be exchanged on this file system")
        for name in ("one", "other"):
            (tmp_path / name).rmdir()
    return str(request.param)


def killed_before(call: int, action: Action) -> bool:
    """Does something in a process that is killed before its n-th call; says whether it was."""
    child = os.fork()
    if child == 0:
        try:
            calls = iter(range(call + 1))
            for owner, name in [*((os, name) for name in CALLS), (publish, "exchange")]:
                setattr(owner, name, _counted(getattr(owner, name), calls, call))
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _counted(real: Callable[..., Any], calls: Iterator[int], last: int) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    return call


def write(directory: Path, text: str) -> None:
    for name in FILES:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def text_of(directory: Path) -> str:
    """What is in every file of it."""
    found = {path for path in directory.rglob("*") if path.is_file()}
    assert found == {directory / name for name in FILES}
    texts = {path.read_text() for path in found}
    assert len(texts) == 1, "files of two directories are mixed"
    return texts.pop()


def build(target: Path, text: str) -> None:
    """What a build does, but for the work; finished work is published as it is."""
    with Work(target, text).open() as work:
        with work.stage("all") as needed:
            if needed:
                write(work.bundle, text)
        work.publish()


def every_kill(tmp_path: Path, run: Callable[[Path], None]) -> Iterator[Path]:
    """Kills `run` before each of its calls; gives the directory that is replaced each time."""
    call, killed = 0, True
    while killed:
        target = tmp_path / f"at {call}" / "out.ojfa"
        write(target, "old")
        killed = killed_before(call, lambda target=target: run(target))  # type: ignore[misc]
        yield target
        shutil.rmtree(target.parent)
        call += 1
    print(call, "calls")
    assert call > 15


@pytest.mark.usefixtures("way")
def test_kill_at_every_call_of_a_build(tmp_path: Path) -> None:
    for target in every_kill(tmp_path, lambda target: build(target, "new")):
        publish.recover(target)
        assert text_of(target) in ("old", "new")
        build(target, "new")
        assert text_of(target) == "new"
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("way")
def test_kill_at_every_call_and_work_removed_by_hand(tmp_path: Path) -> None:
    for target in every_kill(tmp_path, lambda target: build(target, "new")):
        shutil.rmtree(f"{target}.partial", ignore_errors=True)
        publish.recover(target)
        assert text_of(target) in ("old", "new")


@pytest.mark.usefixtures("way")
def test_kill_at_every_call_and_another_build(tmp_path: Path) -> None:
    """What was replaced must not be taken for finished work, nor the other way round."""
    for target in every_kill(tmp_path, lambda target: build(target, "new")):
        build(target, "newer")
        assert text_of(target) == "newer"
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("way")
def test_killed_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    for target in every_kill(tmp_path, lambda target: build(target, "new")):
        killed_before(int(rng.integers(30)), lambda target=target: build(target, "new"))  # type: ignore[misc]
        publish.recover(target)
        assert text_of(target) in ("old", "new")


@pytest.mark.usefixtures("way")
def test_failure_leaves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, new = tmp_path / "out.ojfa", tmp_path / "work" / "new"
    write(target, "old")
    write(new, "new")

    def refuse(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        real = os.rename
        patch.setattr(publish, "exchange", lambda *_: False)
        patch.setattr(os, "rename", lambda a, b: refuse() if a == new else real(a, b))
        with pytest.raises(PermissionError):
            publish.publish(new, target)
    assert (text_of(target), text_of(new)) == ("old", "new")
    publish.publish(new, target)
    assert text_of(target) == "new"


def test_recovered_by_another_process_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, new = tmp_path / "out.ojfa", tmp_path / "work" / "new"
    write(target, "old")
    write(new, "new")
    real, times = os.rename, iter(range(9))

    def rename(source: Path, to: Path) -> None:
        if source == new and next(times) < 3:
            publish.recover(target)
        real(source, to)

    monkeypatch.setattr(publish, "exchange", cannot_exchange)
    monkeypatch.setattr(os, "rename", rename)
    publish.publish(new, target)
    assert text_of(target) == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"out.ojfa", "work"}


def test_what_is_put_back_through_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "out.ojfa", tmp_path / "link"
    write(tmp_path / "out.ojfa.being-replaced", "old")
    link.symlink_to("out.ojfa")
    publish.recover(link)
    assert text_of(target) == "old"


def test_what_can_not_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out.ojfa.being-replaced", "old")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OjfaError, match="killed; it is whole, but can't be put back") as caught:
        publish.recover(tmp_path / "out.ojfa")
    assert "out.ojfa.being-replaced" in str(caught.value.hint)


@pytest.mark.usefixtures("way")
def test_working_directory_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.ojfa"
    write(target, "old")
    monkeypatch.chdir(target)
    build(Path(), "new")
    assert text_of(target) == "new"
    assert list(tmp_path.iterdir()) == [target]
