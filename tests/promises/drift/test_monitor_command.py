"""`ojfa-export monitor` from a log to text, JSON, picture and exit status."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import ojfa_export
from ojfa_export.bundle.names import MANIFEST, STATISTICS
from ojfa_export.bundle.promise import Promise
from ojfa_export.cli.app import app
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.drift.replay import watched

Invoke = Callable[..., Result]
CODE = ["def parse(", "class Action:", "import os", "for x in y:", "return None", "raise Error("]


@pytest.fixture
def invoke() -> Invoke:
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    lines: list[dict[str, str]] = [{"prompt": each, "domain": "code"} for each in CODE]
    lines += [{"text": 3 * each, "domain": "docs"} for each in CODE[:4]]
    lines += [{"prompt": CODE[0]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def altered(bundle: Path, output: Path, **changes: Any) -> Path:
    """A copy of the bundle whose manifest says something else."""
    shutil.copytree(bundle, output)
    manifest = ojfa_export.load(bundle).manifest.model_copy(update=changes)
    (output / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return output


def promising(bundle: Path, limit: float) -> Promise:
    promise = ojfa_export.load(bundle).manifest.promise
    assert promise is not None
    limits = promise.limits.model_copy(update={"max_disagreement": limit})
    return promise.model_copy(update={"limits": limits})


def test_a_log_beside_the_calibration(
    invoke: Invoke, promised: Path, log: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "drift.png"
    args = ["monitor", promised, log, "--max-new-tokens", 8, "--picture", picture]
    result = invoke(*args, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == (3 if document["alarm"] else 0)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [each["domain"] for each in document["domains"]] == ["code", "docs", None]
    assert [each["requests"] for each in document["domains"]] == [6, 4, 1]

    model = ojfa_export.load(promised)
    policy, domain = model.auto_policy(), document["domains"][0]
    made = [model.generate(each, exit="auto", max_new_tokens=8).prompts[0] for each in CODE]
    assert domain["tokens"] == sum(len(each.token_ids) for each in made)
    depths = (*policy.exits, model.blocks)
    assert domain["exits"]["blocks"] == list(depths)
    shares = [[np.mean(np.array(c.exit_blocks) == depth) for depth in depths] for c in made]
    np.testing.assert_allclose(domain["exits"]["log"], np.mean(shares, axis=0))
    differ = []
    for completion in made:
        start = len(completion.prompt_token_ids) - 1
        ids = completion.prompt_token_ids + completion.token_ids[:-1]
        [logits] = model.session().advance(ids, every_position=True)
        differ.append(np.mean(logits[start:].argmax(axis=1) != completion.token_ids))
    found = domain["disagreement"]
    assert found["estimate"] == pytest.approx(np.mean(differ))
    assert found["units"] == 6
    assert found["course"]["units"] == [1, 2, 3, 4, 5, 6]
    assert found["course"]["estimate"] == pytest.approx(
        np.cumsum(differ) / np.arange(1, 7), abs=1e-12
    )
    [evidence] = [e for e in model.manifest.promise.domains if e.name == "code"]
    assert found["calibration"] == pytest.approx(evidence.disagreement)
    assert domain["calibration_windows"] == evidence.windows
    calibrated = np.dot(domain["exits"]["calibration"], depths)
    assert calibrated == pytest.approx(evidence.depth)

    said = invoke(*args)
    assert "code: 6 requests" in said.stdout
    assert "no domain named: 1 requests" in said.stdout
    assert f"{found['estimate']:.1%}" in said.stdout
    texts = document["domains"][1]
    ids = [model.tokenizer.encode(3 * each).ids for each in CODE[:4]]
    assert texts["tokens"] == sum(map(len, ids))


def test_calibration_text_has_not_drifted_and_other_text_has(
    invoke: Invoke, promised: Path, calibration_text: Path, tmp_path: Path
) -> None:
    text = calibration_text.read_text()
    like = tmp_path / "like.jsonl"
    pieces = [text[start : start + 120] for start in range(40_000, 80_000, 1000)]
    like.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces))
    other = tmp_path / "other.jsonl"
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 40)
    other.write_text("\n".join(json.dumps({"text": 40 * chr(letter)}) for letter in letters))
    args = ["monitor", promised, f"code={like}", f"docs={other}", "--json"]
    code, docs = json.loads(invoke(*args).stdout)["domains"]
    every = [each["exits"]["comparison"] for each in (code, docs)]
    every += [at["comparison"] for each in (code, docs) for at in each["confidence"]]
    assert all(each["drifted"] == (each["p_value"] <= 0.01 / 8) for each in every)
    assert not code["exits"]["comparison"]["drifted"]
    assert any(at["comparison"]["drifted"] for at in docs["confidence"])


def test_a_broken_promise(invoke: Invoke, promised: Path, log: Path, tmp_path: Path) -> None:
    """Promised 0.1%, of which a tiny model's exits know nothing."""
    broken = altered(promised, tmp_path / "b.ojfa", promise=promising(promised, 0.001))
    args = ["monitor", broken, *[log] * 6, "--max-new-tokens", 8]
    result = invoke(*args)
    assert result.exit_code == 3
    assert "ALARM after " in result.stdout
    assert "the promise is broken in: code" in result.stderr
    document = json.loads(invoke(*args, "--json").stdout)
    assert document["alarm"]
    assert document["domains"][0]["disagreement"]["alarm_at"] <= 36


def test_few_tokens_compared(invoke: Invoke, promised: Path, log: Path) -> None:
    result = invoke("monitor", promised, log, "--max-new-tokens", 2, "--shadow-share", 1e-9)
    assert result.exit_code == 0
    assert result.stdout.count("no token was compared") == 3
    document = json.loads(
        invoke("monitor", promised, log, "--shadow-share", 1e-9, "--max-new-tokens", 2,
               "--json").stdout
    )  # fmt: skip
    assert document["domains"][0]["disagreement"]["estimate"] is None


def test_bundles_that_cannot_be_watched(
    invoke: Invoke, promised: Path, tiny_bundle: Path, log: Path, tmp_path: Path
) -> None:
    full = ExitPolicy(exits=(), measure="top", thresholds=())
    policy = ojfa_export.load(promised).manifest.auto
    files = dict(ojfa_export.load(promised).manifest.files)
    del files[STATISTICS]
    bare = altered(promised, tmp_path / "bare.ojfa", files=files)
    (bare / STATISTICS).unlink()
    for bundle, message in (
        (tiny_bundle, "has no exit policy for 'auto'"),
        (altered(tiny_bundle, tmp_path / "a.ojfa", auto=policy), "has no promise to watch"),
        (altered(promised, tmp_path / "f.ojfa", auto=full), "no token leaves early"),
        (bare, "has no calibration statistics"),
    ):
        result = invoke("monitor", bundle, log, "--json")
        assert result.exit_code == 1
        error, hint = result.stderr.splitlines()
        assert error.startswith("error: ")
        assert message in json.loads(result.stdout)["error"]["message"]
        assert message in error
        assert "--max-disagreement" in hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "' + "x" * 400 + '"}', "line 1: the prompt has "),
        ('{"text": "a", "time": 3}', "line 1: unknown field 'time'"),
        ('{"text": "a", "domain": "poems"}', "nothing was promised of domain 'poems'"),
    ],
)
def test_bad_logs(invoke: Invoke, promised: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    result = invoke("monitor", promised, path)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.splitlines()[1].startswith("hint: ")


def test_long_texts_are_read_as_far_as_they_fit(promised: Path, invoke: Invoke, log: Path) -> None:
    log.write_text(json.dumps({"text": "x y " * 200}))
    document = json.loads(invoke("monitor", promised, log, "--json").stdout)
    assert document["domains"][0]["tokens"] == 64


@pytest.mark.parametrize("options", [["--shadow-share", 0], ["--false-alarms", 1], ["--seed", -1]])
def test_options_out_of_range(invoke: Invoke, promised: Path, log: Path, options: list) -> None:
    result = invoke("monitor", promised, log, *options)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_pictures_that_cannot_be_drawn(
    invoke: Invoke, promised: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "none" / "a.png", tmp_path):
        result = invoke("monitor", promised, log, "--picture", place)
        assert result.exit_code == 2
        assert "the picture can't be written to" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("monitor", promised, log, "--picture", tmp_path / "a.png")
    assert "needs matplotlib" in result.stderr
    assert "ojfa-export[build]" in result.stderr
    assert not list(tmp_path.glob("*.png"))


def test_what_a_bundle_is_watched_by(promised: Path) -> None:
    model = ojfa_export.load(promised)
    known = watched(model)
    assert known.policy == model.manifest.auto
    assert known.statistics.domains == ("code", "docs")
    assert known.promise == model.manifest.promise
