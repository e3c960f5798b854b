"""The picture of a real model: it is drawn of what the results say."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from bench.quality import real_model

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_speeds_are_the_results_own() -> None:
    summary = read("drafts-smollm2-8192-tokens.json")["summary"]
    axes = Figure().subplots()
    real_model.speeds(axes, summary)
    widths = [bar.get_width() for bar in axes.patches]
    names = ["full", "default", "1", "2", "3"]
    assert widths == [summary[name]["ms_per_token"] for name in names]
    assert axes.texts[0].get_text() == f" {summary['full']['ms_per_token']:.1f} ms"
    assert all("equal" not in text.get_text() for text in axes.texts)
    axes = Figure().subplots()
    real_model.speeds(axes, {**summary, "2": {**summary["2"], "equal": 11}})
    assert "11 equal" in axes.texts[3].get_text()


def test_exits_are_the_results_own() -> None:
    [mlp] = (kind for kind in read("trained-smollm2.json")["kinds"] if kind["kind"] == "mlp")
    axes = Figure().subplots()
    real_model.exits(axes, mlp)
    without, trained = (line.get_ydata().tolist() for line in axes.lines)
    assert without == mlp["on_its_text"]["begin"]["agreement"]
    assert trained == mlp["on_its_text"]["jump"]["agreement"]


def test_the_readme_says_what_the_results_say() -> None:
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    [mlp] = (kind for kind in read("trained-smollm2.json")["kinds"] if kind["kind"] == "mlp")
    agreement = mlp["on_its_text"]["jump"]["agreement"]
    row = " | ".join(f"{agreement[exit - 1]:.0%}" for exit in (5, 10, 15, 20, 25))
    assert f"| {row} |" in readme
    speedup = read("drafts-smollm2-8192-tokens.json")["summary"]["default"]["speedup"]
    assert f"{speedup:.2f} times" in readme
    greedy = read("greedy-smollm2.json")
    assert greedy["prompts_tokenized_alike"] == greedy["prompts"] == 32
    if greedy["prompts_equal"] == 32:
        assert "all 4,096 are equal" in readme
