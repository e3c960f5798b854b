"""The comparison of greedy tokens: it finds what differs, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from bench.quality import greedy
from ojfa_export.runtime.model import load


def test_prompts_are_of_every_kind() -> None:
    prompts = greedy.read_prompts()
    assert len({each["name"] for each in prompts}) == len(prompts) == 32
    assert sum("messages" in each for each in prompts) >= 10
    assert [each["tokens"] for each in prompts if "file" in each] == [1500]
    assert all(greedy.text_of(each) for each in prompts if "messages" not in each)


def test_bundle_and_checkpoint_agree(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    model, reference = load(tiny_bundle), greedy.Reference(tiny_checkpoint)
    row = greedy.compare(model, reference, {"name": "code", "text": "def f(x):"}, 24)
    assert row.parting is None
    assert row.same_prompt
    assert row.tokens == len(model.encode("def f(x):"))


def test_a_difference_is_found_with_its_gap(tiny_checkpoint: Path) -> None:
    reference = greedy.Reference(tiny_checkpoint)
    prompt = reference.prompt({"text": "def f(x):"})
    theirs = reference.generate(prompt, 12)
    ids = torch.tensor([prompt + theirs[:7]])
    logits = reference.model(ids).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    ours = [*theirs[:7], order[2], *theirs[8:]]
    found = greedy.find_parting(reference, prompt, ours, theirs)
    assert found is not None
    assert (found.at, found.ours, found.theirs) == (7, order[2], order[0])
    values = logits[order[:3]].tolist()
    assert found.top_gap == pytest.approx(values[0] - values[1], abs=1e-5)
    assert found.gap == pytest.approx(values[0] - values[2], abs=1e-5)
    assert greedy.find_parting(reference, prompt, theirs, theirs) is None
    with pytest.raises(ValueError, match="longer"):
        greedy.find_parting(reference, prompt, theirs[:-1], theirs)
