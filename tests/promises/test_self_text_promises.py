"""Promises on what the model writes: divided fairly, counted rightly, in the bundle, or refused."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from often import assert_at_most

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import MANIFEST, STATISTICS
from ojfa_export.bundle.promise import Limits
from ojfa_export.cli.app import app
from ojfa_export.compiler import self_text as stage
from ojfa_export.compiler import statistics_stage
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.compiler.work import Work
from ojfa_export.errors import CalibrationError, CheckpointError, OjfaError, UsageError
from ojfa_export.promises.collect import sample_places
from ojfa_export.promises.p_values import betting, largest_stake
from ojfa_export.promises.self_text import divide, windows_to_write
from ojfa_export.promises.statistics import ExitStatistics, join, load_statistics
from ojfa_export.promises.windows import most_needed
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT
from ojfa_export.training.options import TrainOptions

Options = Callable[..., BuildOptions]
LAST_STAGES = ["self-text", "statistics", "certification", "exits", "verify"]
Population = Callable[..., ExitStatistics]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)
LIMITS = st.builds(
    Limits,
    max_disagreement=st.floats(0.01, 0.9),
    confidence=st.floats(0.5, 0.99),
    max_extra_surprisal=st.none() | st.floats(0.1, 9),
)
KINDS = st.sampled_from([1, 2])


@pytest.fixture
def chatty(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with a chat template."""
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "chatty"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return directory


@pytest.fixture
def options(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> Options:
    plain = BuildOptions(
        str(tiny_checkpoint),
        tmp_path / "out.ojfa",
        rank=8,
        shortcut="ojfa",
        calibration_data=(Path(f"code={calibration_text}"),),
        calibration_tokens=1024,
        max_cache_length=64,
        skip_verification=True,
        max_disagreement=0.3,
        self_text="alone",
        self_text_windows=32,
    )
    return lambda **changes: replace(plain, **changes)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), KINDS)
def test_both_splits_have_as_many_of_each_kind(parts: list[int], kinds: int) -> None:
    ends = np.cumsum(parts)
    windows = np.arange(ends[-1], dtype=np.int32)[:, None]
    found = divide(windows, parts, kinds, given=3)
    [tuning], [certification] = found.tuning, found.certification
    together = np.concatenate([tuning, certification]).ravel().tolist()
    assert len(set(together)) == len(together)
    kind = np.searchsorted(ends, np.arange(ends[-1]), side="right") % kinds
    for split in (tuning, certification):
        counts = np.bincount(kind[split.ravel()], minlength=kinds)
        assert len(set(counts.tolist())) == 1
    fewest = min(int((kind == each).sum()) for each in range(kinds))
    assert len(together) == kinds * fewest  # no more are left out than must be
    assert found.domains == ("self-text",)


@given(LIMITS, KINDS)
def test_as_many_windows_as_the_promise_needs(limits: Limits, kinds: int) -> None:
    def certified(windows: int) -> int:
        each = -(-windows // kinds), windows // kinds
        parts = each[:kinds]
        ids = np.zeros((sum(parts), 1), np.int32)
        return len(divide(ids, parts, kinds, 0).certification[0])

    needed = most_needed(limits)
    written = windows_to_write(None, limits, kinds)
    assert written >= 64
    assert certified(written) >= needed
    with pytest.raises(CalibrationError, match="windows of self-text are too few") as caught:
        windows_to_write(1, limits, kinds)
    enough = int(caught.value.message.split("needs ")[1].split(",")[0])
    assert windows_to_write(enough, limits, kinds) == enough
    assert certified(enough) >= needed
    with pytest.raises(CalibrationError):
        windows_to_write(enough - 1, limits, kinds)
    assert f"--self-text-windows {enough}" in str(caught.value.hint)


def test_two_kinds_of_windows_keep_the_level(rng: np.random.Generator) -> None:
    """Half of the windows differ never or hardly, half twice as often as the limit: P(p<=u)<=u."""
    draws, limit, half = 3000, 0.1, 64
    for easy in (0.0, 0.04):
        means = np.repeat([easy, 2 * limit - easy], half)
        losses = rng.binomial(64, means, (draws, 2 * half)) / 64
        for stake in np.linspace(0.2, 1, 4) * largest_stake(limit):
            found = np.array([betting(row, limit, stake) for row in losses])
            for level in (0.01, 0.05, 0.2):
                assert_at_most(level, int((found <= level).sum()), draws, f"p <= {level}")


@given(st.integers(1, 300), st.integers(1, 30), st.integers(1, 8))
def test_no_place_is_outside_what_counts(counted: int, count: int, runs: int) -> None:
    places, run = sample_places(np.random.default_rng(0), count, counted, 8 * runs)
    assert places.shape == (count, min(counted, 8 * runs))
    assert (places >= 0).all()
    assert (places < counted).all()
    assert all(len(set(row)) == len(row) for row in places.tolist())
    assert places.shape[1] % run == 0


def test_statistics_of_two_sorts_of_text(population: Population) -> None:
    files, written = population(windows=4), replace(population(windows=3, domains=1), run=4)
    written = replace(written, domains=("self-text",))
    together = join([replace(files, run=6), written])
    assert together.domains == ("domain0", "domain1", "self-text")
    assert together.run == 2
    expected = [*files.members(), np.arange(8, 11)]
    for found, wanted in zip(together.members(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for part, rows in ((files, slice(0, 8)), (written, slice(8, 11))):
        np.testing.assert_array_equal(together.agrees[rows], part.agrees)
        np.testing.assert_array_equal(together.confidence[:, rows], part.confidence)
        np.testing.assert_array_equal(together.extra_surprisal[rows], part.extra_surprisal)


def test_a_promise_on_what_the_model_writes(
    options: Options, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whichever pay, by what a step takes here.
    monkeypatch.setattr(statistics_stage, "exits_to_certify", lambda *_: (1, 3))
    asked = options(checkpoint=str(chatty))
    result = build(asked)
    names = [each.name for each in result.stages]
    assert names[-5:] == LAST_STAGES
    assert result.promise is not None
    [evidence] = result.promise.domains
    assert (evidence.name, evidence.made_on) == ("self-text", "self-text")
    tuned = "on the tuning text" in result.promise.reason  # where no exit pays, none is tested
    assert evidence.windows == (8 if tuned else 24)
    assert "2,048 tokens that the model wrote, half from its chat template" in evidence.text
    said = CliRunner().invoke(app, ["inspect", str(result.bundle)])
    assert "promise on self-text" in said.stdout
    page = (result.bundle / "report" / "report.html").read_text()
    assert evidence.text in page
    assert result.promise.reason in page

    # The same text once more, and what the runtime says of every token that the model wrote.
    inputs = Inputs(asked)
    assert inputs.self_text is not None
    with Work(asked.output.with_name("again.ojfa"), "text").open() as work:
        stage.write_self_text(inputs.checkpoint, inputs.self_text, work, SILENT)
        windows = stage.read_self_text(inputs.self_text, work)
    given_tokens = inputs.self_text.starts.given
    assert windows.counted == 64 - given_tokens
    splits = load_statistics(result.bundle / STATISTICS)
    assert splits["tuning"].windows == len(windows.tuning[0]) == 8
    model, found = Model(Bundle(result.bundle), "onnxruntime"), splits["certification"]
    assert (found.exits, splits["tuning"].exits) == ((1, 3), (1, 2, 3))
    assert found.tokens_per_window == windows.counted
    for index in (0, 11, 12, 23):  # of both kinds
        ids = windows.certification[0][index].tolist()
        [full] = model.session().advance(ids, "full", every_position=True)
        for column, depth in enumerate(found.exits):
            [early] = model.session().advance(ids, depth, every_position=True)
            agrees = (early.argmax(axis=1) == full.argmax(axis=1))[given_tokens:]
            np.testing.assert_array_equal(found.agrees[index, :, column], agrees)


def test_beside_files_every_domain_is_kept(options: Options) -> None:
    result = build(options(self_text="beside"))
    assert result.promise is not None
    made_on = [(each.name, each.made_on, each.text) for each in result.promise.domains]
    assert made_on[0] == ("code", "files", "source.txt")
    assert made_on[1][:2] == ("self-text", "self-text")
    assert "wrote, from 24 tokens of source.txt" in made_on[1][2]
    for each in load_statistics(result.bundle / STATISTICS).values():
        assert each.domains == ("code", "self-text")
        assert (each.tokens_per_window, each.run) == (40, 8)


class Reports:
    """Progress that stops while text is written, after so many reports of it."""

    def __init__(self, stop: int) -> None:
        self.stop, self.writing, self.total = stop, False, 0

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Reports]:
        self.writing = what == "writing text"
        if self.writing:
            self.total = total
        yield self

    def advance(self, count: int = 1) -> None:
        self.stop -= self.writing
        if self.writing and self.stop == 0:
            raise KeyboardInterrupt


def test_an_interrupted_writing_goes_on(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    from ojfa_export.writing import self_text

    monkeypatch.setattr(self_text, "CPU_ROWS", 8)
    whole = build(options())
    asked = options(output=options().output.with_name("killed.ojfa"))
    with pytest.raises(KeyboardInterrupt):
        build(asked, Reports(50))  # 40 reports of each of four batches
    kept = asked.output.with_name("killed.ojfa.partial") / "scratch" / "self-text"
    assert [path.name for path in kept.iterdir()] == ["000000.npy"]
    progress = Reports(-1)
    result = build(asked, progress)
    assert progress.total == 24 * 64
    assert [each.name for each in result.stages if each.resumed][-1] == "calibrate"
    killed, undisturbed = (each.bundle / STATISTICS for each in (result, whole))
    assert killed.read_bytes() == undisturbed.read_bytes()


def test_no_training_has_the_seed() -> None:
    """What a jump was trained on, with whatever seed, proves nothing of it."""
    with pytest.raises(UsageError):
        TrainOptions("x", Path("x.safetensors"), seed=stage.SEED)
    states = {
        tuple(np.random.SeedSequence([seed, number]).generate_state(4))
        for number in range(100)
        for seed in (*range(100), stage.SEED)
    }
    assert len(states) == 100 * 101


def refused(asked: BuildOptions, match: str, kind: type[OjfaError] = UsageError) -> str:
    with pytest.raises(kind, match=match) as caught:
        plan(asked)
    assert not list(asked.output.parent.glob("out.ojfa*"))
    return str(caught.value.hint)


def test_what_makes_no_sense_together(options: Options) -> None:
    with pytest.raises(UsageError, match="self-text is part of a promise") as caught:
        options(max_disagreement=None)
    assert "--max-disagreement" in str(caught.value.hint)
    with pytest.raises(UsageError, match="self-text-windows is given, but nothing is promised"):
        options(self_text=None)
    with pytest.raises(UsageError, match="self-text 'only' is not known"):
        options(self_text="only")
    with pytest.raises(UsageError, match="self-text-windows must be 1 or more"):
        options(self_text_windows=0)


def test_too_little(options: Options) -> None:
    hint = refused(options(max_disagreement=0.05), "32 windows of self-text", CalibrationError)
    assert "--self-text-windows 86" in hint
    hint = refused(options(calibration_tokens=10**6), "fitting takes all", CalibrationError)
    assert "--calibration-data" in hint
    refused(options(max_cache_length=32), "windows have 32", CalibrationError)


def test_a_domain_of_the_same_name(options: Options, calibration_text: Path) -> None:
    data = (Path(f"self-text={calibration_text}"),)
    hint = refused(options(calibration_data=data, self_text="beside"), "is called 'self-text'")
    assert "DOMAIN=FILE" in hint
    assert plan(options(calibration_data=data))["settings"]["self_text"]


def test_templates_that_do_not_render(options: Options, chatty: Path) -> None:
    (chatty / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    hint = refused(options(checkpoint=str(chatty)), "can't be rendered", CheckpointError)
    assert "--self-text" in hint


def test_without_torch(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    hint = refused(options(), "a promise on self-text needs the package torch", OjfaError)
    assert "pip install" in hint


def test_command_line(options: Options) -> None:
    asked = options()
    arguments = ["build", asked.checkpoint, "-o", str(asked.output), "--dry-run", "--json"]
    arguments += ["--max-cache-length", "64", "--rank", "8", "--calibration-tokens", "1024"]
    arguments += ["--calibration-data", str(asked.calibration_data[0])]
    arguments += ["--max-disagreement", "0.3", "--self-text", "alone"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["stages"][-5:] == LAST_STAGES
    assert "4,096 tokens that the model wrote" in document["settings"]["self_text"]
    done = CliRunner().invoke(app, [*arguments[:-1], "now"])
    assert done.exit_code == 2


def test_manifests_from_before(options: Options) -> None:
    """A promise without what it was made on was made on files."""
    result = build(options(self_text=None, self_text_windows=None))
    assert result.promise is not None
    fields = json.loads((result.bundle / MANIFEST).read_text())["promise"]
    for each in fields["domains"]:
        del each["made_on"], each["text"]
    found = type(result.promise).model_validate(fields)
    assert {each.made_on for each in found.domains} == {"files"}
