"""The draft under training: exactly what its shortcut will do, chain by chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import KL_FP32, TORCH_FLOAT64_RELATIVE
from trainings import Checkpoints, random_text, scatter

from ojfa_export.training.divergence import measure
from ojfa_export.training.kinds.draft import MEASURED, Draft, depths, frequent, is_llamas
from ojfa_export.writing.frozen import Frozen, States

TEXT = random_text(16, 20)


def _draft(checkpoints: Checkpoints, variant: str, vocabulary: int | None, seed: int) -> Draft:
    frozen = Frozen(checkpoints(variant), torch.device("cpu"))
    draft = Draft.begin(frozen, TEXT, vocabulary, seed)
    scatter(draft, seed)
    return draft


def _states(rng: np.random.Generator, batch: int, tokens: int, hidden: int, blocks: int) -> States:
    def random() -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(batch, tokens, hidden)))

    return States(random(), tuple(random() for _ in range(blocks)), random(), ((), {}))


@pytest.mark.parametrize(
    "variant", ["llama-gqa", "qwen2", "qwen3", "smollm3", "gemma3_text", "gpt2"]
)
def test_chains_are_those_of_the_shortcut(
    variant: str, checkpoints: Checkpoints, rng: np.random.Generator
) -> None:
    """Every chain of every window against NumPy, which runs one after the other with a cache."""
    draft = _draft(checkpoints, variant, None, int(rng.integers(2**31)))
    spec, shortcut = checkpoints(variant).spec, draft.shortcut()
    shortcut.check_fits(spec)
    states = _states(rng, 2, 9, spec.hidden_size, spec.blocks)
    with torch.no_grad():
        found = [each.numpy() for each in draft.double().chain(states, MEASURED)]
    for row in range(2):
        e = states.embedded[row].numpy()
        seen = [states.hidden[depth - 1][row].numpy() for depth in shortcut.depths]
        memory = shortcut.memory(np.concatenate(seen, axis=-1))
        for start in range(9 - MEASURED):
            y, past = shortcut.apply(memory[: start + 1], e[1 : start + 2])
            for step in range(MEASURED):
                if step:
                    y, past = shortcut.apply(y[-1:], e[start + step + 1 : start + step + 2], past)
                limit = TORCH_FLOAT64_RELATIVE * np.abs(y).max()
                np.testing.assert_allclose(found[step][row, start], y[-1], rtol=0, atol=limit)


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_figures_are_those_of_every_chain(
    vocabulary: int | None, checkpoints: Checkpoints, rng: np.random.Generator
) -> None:
    """Loss, agreement and chains of drafts against NumPy, with a head of its own and without."""
    frozen = Frozen(checkpoints("llama-gqa"), torch.device("cpu"))
    draft = Draft.begin(frozen, TEXT, vocabulary, 3)
    if draft.head is not None:
        torch.testing.assert_close(
            draft.head.detach(), frozen.head.weight[draft.tokens], rtol=0, atol=0
        )
    shortcut, windows = draft.shortcut(), torch.from_numpy(rng.integers(0, 300, size=(3, 24)))
    states = frozen.states(windows)
    full = frozen.full_log_probs(states.last).double().numpy()
    model_head = frozen.head.weight.numpy()
    tokens = np.arange(320) if shortcut.tokens is None else shortcut.tokens
    positions = np.stack([np.arange(first, first + 8) for first in (4, 9, 16)])
    losses, right = np.zeros((4, 3, 8)), np.zeros((4, 3, 8), bool)
    for row, places in enumerate(positions):
        e = states.embedded[row].numpy()
        hidden = np.concatenate([states.hidden[d - 1][row].numpy() for d in draft.depths], -1)
        for column, place in enumerate(places):
            for step in range(4):
                start = place - step - 1
                y, past = shortcut.apply(shortcut.memory(hidden[: start + 1]), e[1 : start + 2])
                for more in range(start + 2, place + 1):
                    y, past = shortcut.apply(y[-1:], e[more : more + 1], past)
                logits = shortcut.logits(y[-1], model_head).astype(np.float64)
                own = logits - np.log(np.exp(logits).sum())
                wanted = full[row, place, tokens]
                wanted = wanted - np.log(np.exp(wanted).sum())
                losses[step, row, column] = (np.exp(wanted) * (wanted - own)).sum()
                right[step, row, column] = tokens[own.argmax()] == full[row, place].argmax()
    found = measure(frozen, draft, windows, torch.from_numpy(positions), 2, 10)
    np.testing.assert_allclose(found.loss, losses.mean((1, 2)), atol=KL_FP32)
    np.testing.assert_allclose(found.agreement, right.mean((1, 2)))
    chains = [
        [all(right[step, row, first + step] for step in range(count)) for first in range(5)]
        for count in range(1, 5)
        for row in range(3)
    ]
    assert found.chain is not None
    np.testing.assert_allclose(found.chain, np.mean(np.reshape(chains, (4, 15)), axis=1))


def test_a_later_text_changes_no_earlier_chain(
    checkpoints: Checkpoints, rng: np.random.Generator
) -> None:
    draft = _draft(checkpoints, "llama-gqa", None, 1).double()
    spec = checkpoints("llama-gqa").spec
    states = _states(rng, 1, 12, spec.hidden_size, spec.blocks)
    later = States(
        torch.cat([states.embedded[:, :9], states.embedded[:, 9:] + 1], 1),
        tuple(torch.cat([h[:, :6], h[:, 6:] + 1], 1) for h in states.hidden),
        states.last,
        states.beside,
    )
    with torch.no_grad():
        for step, (one, other) in enumerate(
            zip(draft.chain(states, 3), draft.chain(later, 3), strict=True)
        ):
            torch.testing.assert_close(one[:, :6], other[:, :6], rtol=0, atol=0)
            assert (one[:, 8 - step] != other[:, 8 - step]).any()


def test_it_begins_as_the_last_block(checkpoints: Checkpoints) -> None:
    """Where that is Llama's: with the embedding's rows at zero it is that block of its memory."""
    frozen = Frozen(checkpoints("llama-gqa"), torch.device("cpu"))
    draft = Draft.begin(frozen, TEXT, None, 0)
    states = frozen.states(torch.arange(30).reshape(2, 15))
    with torch.no_grad():
        draft.qkv[: frozen.spec.hidden_size] = 0
        found = draft.chain(states, 1)[0]
        arguments, named = states.beside
        wanted = frozen.last_layer(states.hidden[-1], *arguments, **named)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert is_llamas(frozen.spec)
    for other in ("gpt2", "qwen3", "smollm3", "olmo2", "gemma2"):
        assert not is_llamas(checkpoints(other).spec)


def test_depths_rise_and_end_with_the_last_block() -> None:
    assert depths(30) == (5, 15, 30)
    assert depths(3) == (1, 2, 3)
    assert depths(4) == (1, 2, 4)


def test_frequent_tokens_are_those_of_the_training_text(checkpoints: Checkpoints) -> None:
    spec = checkpoints("llama-gqa").spec
    training, _ = TEXT.held_out()
    times = np.bincount(TEXT.windows[training].ravel(), minlength=spec.vocab_size)
    chosen = frequent(TEXT, spec, 40).numpy()
    assert len(chosen) == 40
    assert (np.diff(chosen) > 0).all()
    assert times[chosen].min() >= np.delete(times, chosen).max()
