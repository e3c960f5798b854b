"""A bundle's planned default: what `generate` and `run` do where nothing is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import ojfa_export
from ojfa_export.bundle.manifest import read_manifest
from ojfa_export.bundle.names import MANIFEST, STATISTICS
from ojfa_export.cli.app import app
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import BundleError

PROMPT = "def main("
POLICY = ExitPolicy(exits=(2,), measure="top", thresholds=(0.0,))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(exit: str, speculation: Speculation | None = None) -> Default:
    return Default.model_validate(
        {"exit": exit, "speculation": speculation, "ms_per_token": 1.0, "full_ms_per_token": 2.0,
         "reason": "half the time"}
    )  # fmt: skip


@pytest.fixture
def with_default(tiny_bundle: Path, tmp_path: Path) -> Any:
    def make(default: Default | None, auto: ExitPolicy | None = POLICY) -> Path:
        bundle = tmp_path / "default.ojfa"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(tiny_bundle, bundle)
        changes = {"default": default, "auto": auto}
        manifest = read_manifest(tiny_bundle).model_copy(update=changes)
        (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return bundle

    return make


def test_generate_takes_the_default(with_default: Any) -> None:
    model = ojfa_export.load(with_default(planned("auto")))
    given = model.generate(PROMPT, max_new_tokens=6).prompts[0]
    assert given.exit_blocks == [2] * 6
    assert given.token_ids == model.generate(PROMPT, exit=2, max_new_tokens=6).prompts[0].token_ids
    # Whatever is asked for comes before it.
    assert model.generate(PROMPT, exit="full", max_new_tokens=3).prompts[0].exit_blocks == [4] * 3
    assert model.generate(PROMPT, speculate=True, max_new_tokens=3).prompts[0].exit_blocks[-1] == 4
    # Neither the plan nor the promise is about batches and sampling.
    for settings in ({"prompts": [PROMPT, "a"]}, {"prompts": PROMPT, "temperature": 0.7}):
        for completion in model.generate(**settings, max_new_tokens=3).prompts:
            assert set(completion.exit_blocks) == {4}


def test_planned_speculation_gives_the_tokens_of_full_depth(with_default: Any) -> None:
    drafting = Speculation(exit=3, draft=2)
    model = ojfa_export.load(with_default(planned("full", drafting), auto=None))
    given = model.generate(PROMPT, max_new_tokens=12).prompts[0]
    full = model.generate(PROMPT, exit="full", max_new_tokens=12).prompts[0]
    asked = model.generate(PROMPT, speculate=drafting, max_new_tokens=12).prompts[0]
    assert given.token_ids == full.token_ids
    assert given.passes == asked.passes
    assert full.passes == 12


def test_run_says_what_it_does(with_default: Any) -> None:
    bundle = with_default(planned("auto"))
    plain = invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 4)
    assert "default: half the time (--exit full overrides)\n" in plain.stderr
    assert plain.stderr.endswith("exit auto, 2.0 blocks/token\n")
    full = invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 4, "--exit", "full")
    assert "default" not in full.stderr
    assert full.stderr.endswith("exit full\n")
    document = json.loads(
        invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 4, "--json").stdout
    )
    assert document["exit"] == "auto"
    sampled = invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 4, "--temperature", 1)
    assert sampled.stderr.endswith("exit full\n")
    drafting = with_default(planned("full", Speculation(exit=2)), auto=None)
    said = invoke("run", drafting, "-p", PROMPT, "--max-new-tokens", 4).stderr
    assert said.endswith(" tokens per full pass\n")
    assert "half the time" in invoke("inspect", drafting).stdout


def test_defaults_that_the_bundle_cannot_do(with_default: Any) -> None:
    with pytest.raises(BundleError, match="the default is auto, which the bundle doesn't have"):
        read_manifest(with_default(planned("auto"), auto=None))
    with pytest.raises(BundleError, match="exit 4 can't draft"):
        read_manifest(with_default(planned("full", Speculation(exit=4)), auto=None))
    bundle = with_default(planned("full"), auto=None)
    path = bundle / MANIFEST
    path.write_text(path.read_text().replace("half the time", "no time"))
    with pytest.raises(BundleError, match="was altered"):
        read_manifest(bundle)


def test_plan_of_a_built_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "frontier.png"
    done = invoke("plan", tiny_bundle, "--json", "-q", "-o", picture)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    kinds = [point["kind"] for point in document["frontier"]]
    assert kinds[:4] == ["fixed"] * 3 + ["full"]
    assert kinds.count("speculation") == 3 * 8
    assert document["frontier"][3]["ms"] == document["costs_ms"]["exits"][-1]
    assert all(
        0 <= point["worst_agreement"] <= point["agreement"] <= 1 for point in document["frontier"]
    )
    assert document["tokens"] >= 64
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = invoke("plan", tiny_bundle, "-q").stdout
    assert "full" in shown
    assert "Default here: " in shown
    assert read_manifest(tiny_bundle).default is not None


def test_bundles_without_statistics(with_default: Any, tmp_path: Path) -> None:
    bundle = with_default(None, None)
    (bundle / STATISTICS).unlink()
    manifest = read_manifest(bundle)
    files = {name: entry for name, entry in manifest.files.items() if name != STATISTICS}
    text = manifest.model_copy(update={"files": files}).to_json()
    (bundle / MANIFEST).write_text(text, encoding="utf-8")
    done = invoke("plan", bundle, "-o", tmp_path / "frontier.png")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "has no calibration statistics of its exits" in done.stderr
    assert "ojfa-export build CHECKPOINT -o BUNDLE" in done.stderr
    assert not (tmp_path / "frontier.png").exists()
    assert invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 1).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "none.ojfa"], "none.ojfa is not a bundle"),
        (["plan", "BUNDLE", "--confidence", "1.5"], "confidence must be between 0 and 1"),
        (["plan", "BUNDLE", "-o", "frontier.jpg"], "is no PNG file by its name"),
        (["bench", "BUNDLE", "--exit", "auto"], "are measured on a text"),
        (["bench", "BUNDLE", "--speculate"], "are measured on a text"),
        (["bench", "BUNDLE", "--draft-exit", "2"], "are settings of speculation"),
        (["bench", "BUNDLE", "--text", "none.txt"], "can't be read"),
        (["bench", "BUNDLE", "--text", "TEXT", "--exit", "auto"], "has no exit policy for 'auto'"),
        (["bench", "BUNDLE", "--text", "TEXT", "--exit", "9"], "outside this model's 1..4"),
        (["bench", "BUNDLE", "--text", "SHORT"], "has 1 tokens; a piece to read takes"),
    ],
)
def test_bad_input(
    tiny_bundle: Path, calibration_text: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a")
    names = {"BUNDLE": tiny_bundle, "TEXT": calibration_text, "SHORT": short}
    more = ["--prompt-length", 8] if arguments[0] == "bench" else []
    done = invoke(*(names.get(argument, argument) for argument in arguments), *more)
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    first, *hints = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert all(line.startswith("hint: ") for line in hints)


def test_bench_on_a_text(with_default: Any, calibration_text: Path, tmp_path: Path) -> None:
    bundle = with_default(planned("full"))
    arguments = ["bench", bundle, "--text", calibration_text, "--prompt-length", 8, "-q"]
    arguments += ["--iterations", 40, "--exit", 2, "--exit", "auto", "--speculate"]
    done = invoke(*arguments, "--draft-exit", 3, "--json", "-o", tmp_path / "bench.json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document["ways"]) == ["full", "exit 2", "auto", "speculation, exit 3"]
    assert document["tokens"] == 64
    assert document["ways"]["auto"]["blocks"] == 2
    assert document["ways"]["auto"]["agreement"] == document["ways"]["exit 2"]["agreement"]
    # Each of the two pieces of 32 tokens may end with a round that gives up to 8 more.
    assert 64 <= sum(document["ways"]["speculation, exit 3"]["steps_tokens"]) <= 64 + 2 * 8
    assert json.loads((tmp_path / "bench.json").read_text()) == document
    table = invoke(*arguments[:-1]).stdout.partition("\n\n")[2].splitlines()
    assert table[1].split()[0] == "full"
