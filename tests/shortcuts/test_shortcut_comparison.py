"""A comparison of shortcuts on a tiny model: its figures, its files, its judgements."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import random_blocks, random_mlp
from click.testing import CliRunner
from PIL import Image

from ojfa_export.bundle.shortcut_file import save
from ojfa_export.cli.app import app
from ojfa_export.compiler import work
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.shortcuts.comparison.claims import judge
from ojfa_export.shortcuts.comparison.model import Comparison
from ojfa_export.shortcuts.comparison.write import write_comparison
from ojfa_export.shortcuts.kinds import KINDS

PICTURES = ("quality_by_exit", "quality_by_cost", "precision_matrix")
RANK = 4


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint: Path, calibration_text: Path, given: Path, block: Path) -> list[str]:
    data = ["--calibration-data", str(calibration_text), "--calibration-tokens", "1024"]
    others = ["--with", str(given), "--with", str(block)]
    return ["compare", str(tiny_checkpoint), "--rank", str(RANK), *data, *others]


@pytest.fixture(scope="module")
def given(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """The file of an MLP that is the identity: its second matrix is zero."""
    checkpoint = Checkpoint(tiny_checkpoint)
    mlp = random_mlp(checkpoint.spec, 8)
    path = tmp_path_factory.mktemp("given") / "mlp.safetensors"
    save(replace(mlp, down=np.zeros_like(mlp.down)), path, checkpoint.sha256())
    return path


@pytest.fixture(scope="module")
def block(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """The file of blocks that are the identity at two exits: what they add is zero."""
    checkpoint = Checkpoint(tiny_checkpoint)
    blocks = random_blocks(checkpoint.spec, (1, 3), each=True)
    nothing = {
        name: np.zeros_like(each) if ".out." in name or ".down." in name else each
        for name, each in blocks.weights.items()
    }
    same = {"scale": np.ones_like(blocks.scale), "shift": np.zeros_like(blocks.shift)}
    path = tmp_path_factory.mktemp("given") / "block.safetensors"
    save(replace(blocks, weights=nothing, **same), path, checkpoint.sha256())
    return path


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory) -> tuple[Path, Comparison]:
    output = tmp_path_factory.mktemp("compare") / "out"
    result = CliRunner().invoke(app, [*arguments, "-o", str(output), "--json", "-q"], obj=None)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document.pop("directory") == str(output)
    return output, Comparison.model_validate(document)


def test_files_hold_the_comparison(compared):
    output, report = compared
    names = {f"{name}.png" for name in PICTURES} | {"comparison.json", "comparison.html"}
    assert {path.name for path in output.iterdir()} == names
    assert [path.name for path in output.parent.iterdir()] == ["out"]  # nothing beside it
    assert Comparison.model_validate_json((output / "comparison.json").read_text()) == report
    for name in PICTURES:
        assert min(Image.open(output / f"{name}.png").size) > 500
    text = (output / "comparison.html").read_text()
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    for claim in report.claims:
        assert claim.evidence.split(";")[0].split("<")[0][:40] in text


def test_every_kind_has_its_parameters_and_figures(compared):
    _, report = compared
    hidden, exits = report.hidden_size, report.blocks - 1
    narrow, normed = 2 * hidden * RANK, 2 * hidden * (RANK + 1)
    *fitted, mlp, block = report.kinds
    assert (mlp.kind, mlp.title) == (None, "mlp, given: mlp.safetensors")
    assert mlp.exits == report.of("identity").exits
    assert mlp.parameters > 0
    assert (block.kind, block.title) == (None, "block, given: block.safetensors, at exits 1, 3")
    identity = report.of("identity")
    assert [block.at(exit) for exit in (1, 2, 3)] == [identity.at(1), None, identity.at(3)]
    assert {each.kind: each.parameters for each in fitted} == {
        "identity": 0,
        "jtc": exits * hidden**2,
        "njtc": exits * narrow,
        "n-njtc": exits * normed,
        "ojfa": normed,
        "ojfa-cosine": normed,
        "mixed": normed,
        "residual-closed-form": normed + exits,
        "residual": normed + exits,
    }
    assert [each.kind for each in fitted] == list(KINDS)
    assert all(len(each.exits) == exits for each in (*fitted, mlp))
    read = {each.check.name: each.check.weights_read for each in report.kinds}
    whole = report.vocab_size * hidden + hidden
    assert read["model's own"] == whole
    of_block = read["given: block.safetensors"] - whole
    assert of_block > block.parameters / 2 - 2 * hidden  # one of two, and what 128 tokens left
    assert read["linear map"] == whole + hidden**2
    assert read["folded"] == RANK * (report.vocab_size + hidden + 1)
    assert read["residual"] == whole + narrow + RANK + exits
    assert all(each.check.milliseconds > 0 for each in report.kinds)


def test_closed_form_is_not_above_descent(compared):
    _, report = compared
    assert [row.level for row in report.descent] == list(range(1, report.blocks))
    assert all(row.closed_loss <= row.descent_loss for row in report.descent)
    assert report.distillation.loss_after <= report.distillation.loss_before


def with_precisions(report: Comparison, **precisions: list[float]) -> Comparison:
    """The same with other Precision@1 of some kinds (with _ for -)."""
    kinds = []
    for each in report.kinds:
        values = precisions.get((each.kind or "given").replace("-", "_"))
        exits = each.exits
        if values is not None:
            pairs = zip(exits, values, strict=True)
            exits = [old.model_copy(update={"precision_at_1": new}) for old, new in pairs]
        kinds.append(each.model_copy(update={"exits": exits}))
    return report.model_copy(update={"kinds": kinds})


def verdict(report: Comparison, words: str) -> tuple[bool | None, str]:
    [claim] = [each for each in judge(report) if words in each.statement]
    return claim.holds, claim.evidence


def test_claims_follow_the_figures(compared):
    _, report = compared
    near = with_precisions(report, n_njtc=[0.30, 0.40, 0.50], ojfa=[0.28, 0.38, 0.45])
    assert verdict(near, "One jump serves every exit")[0] is True
    far = with_precisions(report, n_njtc=[0.30, 0.40, 0.50], ojfa=[0.28, 0.38, 0.40])
    holds, evidence = verdict(far, "One jump serves every exit")
    assert holds is False
    assert "0.353 against 0.400" in evidence
    assert "most at exit 3, +0.100" in evidence

    better = with_precisions(report, residual=[0.4, 0.5, 0.6], identity=[0.1, 0.5, 0.5])
    assert verdict(better, "at least as good as identity")[0] is True
    worse = with_precisions(report, residual=[0.4, 0.4, 0.6], identity=[0.1, 0.5, 0.5])
    holds, evidence = verdict(worse, "at least as good as identity")
    assert holds is False
    assert "behind at exits 2" in evidence

    mixed = with_precisions(report, ojfa=[0.2, 0.2, 0.2], mixed=[0.3, 0.2, 0.2])
    assert verdict(mixed, "all levels mixed")[0] is False

    flat = report.model_copy(update={"precision_at_1": np.full((3, 3), 0.3).tolist()})
    assert verdict(flat, "An arbitrary level")[0] is False
    steep = [[0.1] * 3, [0.4] * 3, [0.3] * 3]
    steep = report.model_copy(update={"precision_at_1": steep})
    assert verdict(steep, "An arbitrary level")[0] is True
    assert verdict(steep, "middle one")[0] is True

    rows = [
        row.model_copy(update={"closed_loss": 1.0, "descent_loss": 1.01, "closed_seconds": 0.1,
                               "descent_seconds": 3.0})
        for row in report.descent
    ]  # fmt: skip
    fast = report.model_copy(update={"descent": rows})
    assert verdict(fast, "closed form")[0] is True
    rows[1] = rows[1].model_copy(update={"descent_loss": 0.99})
    assert verdict(report.model_copy(update={"descent": rows}), "closed form")[0] is False
    without = report.model_copy(update={"descent": []})
    assert not [each for each in judge(without) if "closed form" in each.statement]


def test_page_without_descent(compared, tmp_path):
    _, report = compared
    write_comparison(report.model_copy(update={"descent": []}), tmp_path)
    assert "gradient descent</h2>" not in (tmp_path / "comparison.html").read_text()


def test_what_is_there_is_kept_unless_asked(compared, arguments, tmp_path):
    output, _ = compared
    before = (output / "comparison.json").read_bytes()
    again = CliRunner().invoke(app, [*arguments, "-o", str(output)])
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert (output / "comparison.json").read_bytes() == before
    other = tmp_path / "notes"
    other.mkdir()
    refused = CliRunner().invoke(app, [*arguments, "-o", str(other), "--overwrite"])
    assert refused.exit_code == 2
    assert "holds no comparison.json" in refused.output
    wrong = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "new"), "--rank", "0"])
    assert wrong.exit_code == 2
    assert "rank 0 is outside" in wrong.output
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_interrupted_while_publishing_goes_on(compared, arguments, tmp_path, monkeypatch):
    output = tmp_path / "report"
    asked = [*arguments, "-o", str(output), "--skip-descent"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "publish", interrupt)
        assert CliRunner().invoke(app, asked).exit_code == 130
    assert not output.exists()
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0, again.output
    names = {path.name for path in compared[0].iterdir()}
    assert {path.name for path in output.iterdir()} == names
    assert list(tmp_path.iterdir()) == [output]
