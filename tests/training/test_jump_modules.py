"""The torch modules against NumPy, and the frozen model against transformers and our head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import make_model
from tolerances import (
    KL_FP32,
    LOG_PROBS_FP32_RELATIVE,
    LOGITS_FP32,
    NORMED_STATISTICS,
    TORCH_FLOAT64_RELATIVE,
    TORCH_GRADIENT_RELATIVE,
)
from trainings import Checkpoints, random_text, scatter

from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.training.divergence import learn, measure
from ojfa_export.training.kinds import KINDS
from ojfa_export.training.kinds.jump import Pointwise
from ojfa_export.training.kinds.residual import Residual
from ojfa_export.writing.frozen import Frozen

# Gated with RMSNorm and SiLU; not gated with LayerNorm: GELU's two forms, and ReLU.
POINTWISE = ("mlp", "residual")
TEXT = random_text(16, 20)
FROZEN = (
    "llama-gqa",
    "llama-tied",
    "phi3",
    "gpt2",
    "gpt2-untied",
    "granite",
    "granite-tied",
    "stablelm",
    "olmo2",
    "gemma2",
    "gemma2-untied",
    "gemma3_text",
    "gpt_neox",
)
VARIANTS = ("llama-gqa", "phi3", "stablelm", "gpt2", "gpt2-gelu", "gpt2-relu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", POINTWISE)
def test_module_is_the_shortcut(
    variant: str, kind: str, checkpoints: Checkpoints, rng: np.random.Generator
) -> None:
    frozen = Frozen(checkpoints(variant), torch.device("cpu"))
    spec = frozen.spec
    jump = KINDS[kind].begin(frozen, TEXT, 24, 5)
    assert isinstance(jump, Pointwise)
    scatter(jump, int(rng.integers(2**31)))
    shortcut = jump.shortcut()
    h = 3 * rng.normal(size=(7, spec.hidden_size)) + 1
    for exit in range(1, spec.blocks):
        with torch.no_grad():
            found = jump.double().jump(torch.from_numpy(h), exit).numpy()
        wanted = shortcut.apply(h, exit)
        assert wanted.dtype == np.float64
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=TORCH_FLOAT64_RELATIVE * np.abs(wanted).max()
        )
    if isinstance(shortcut, MlpShortcut):
        shortcut.check_fits(spec)


@pytest.mark.parametrize("kind", POINTWISE)
def test_a_jump_begins_as_the_identity(kind: str, frozen: Frozen) -> None:
    jump = KINDS[kind].begin(frozen, TEXT, 16, 1)
    states = frozen.states(torch.arange(40).reshape(2, 20))
    jump.prepare([states])
    tokens = torch.tensor([0, 5, 33])
    assert jump.outputs == tuple(range(1, frozen.spec.blocks))
    for exit, found in zip(jump.outputs, jump.predict(states, jump.outputs, tokens), strict=True):
        torch.testing.assert_close(found, states.at(exit, tokens), rtol=0, atol=0)
    assert jump.shortcut().parameters > 0


def test_residual_statistics_are_those_of_all_exits(frozen: Frozen) -> None:
    jump = Residual.begin(frozen, TEXT, 4, 0)
    parts = [frozen.states(torch.arange(40).reshape(2, 20) + 7 * n) for n in range(3)]
    jump.prepare(iter(parts))
    hidden = [each for states in parts for each in states.hidden[:-1]]
    h = torch.cat([each.reshape(-1, each.shape[-1]) for each in hidden]).numpy()
    shortcut = jump.shortcut()
    normed = h.astype(np.float64) * shortcut.scale + shortcut.shift
    np.testing.assert_allclose(normed.mean(0), 0, atol=NORMED_STATISTICS)
    np.testing.assert_allclose(normed.std(0), 1, atol=NORMED_STATISTICS)


def test_residual_of_a_fitted_shortcut(random_shortcut: Callable[..., Shortcut]) -> None:
    plain = random_shortcut(10, 3, residual=True)
    fitted = replace(plain, gates=np.array([0.5, 0, 2], np.float32), kind="residual")
    again = Residual.of(fitted).shortcut()
    for name in ("scale", "shift", "down", "up", "gates"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name))


@pytest.mark.parametrize("variant", FROZEN)
def test_frozen_model_is_transformers(variant: str, checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints(variant)
    frozen = Frozen(checkpoint, torch.device("cpu"))
    assert not any(each.requires_grad for each in frozen.model.parameters())
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        wanted = make_model(variant, seed=3)(ids).logits.log_softmax(-1)
    states = frozen.states(ids)
    found = frozen.full_log_probs(states.last)
    torch.testing.assert_close(found, wanted, rtol=0, atol=LOGITS_FP32)
    assert len(states.hidden) == frozen.spec.blocks
    ends = checkpoint.family.ends(checkpoint.config, checkpoint.spec)
    table = torch.from_numpy(checkpoint.read(ends["token_embedding"]))
    torch.testing.assert_close(states.embedded, table[ids], rtol=0, atol=0)
    with torch.no_grad():  # the last one is what the final norm sees
        again = frozen.logits(states.hidden[-1]).log_softmax(-1)
    torch.testing.assert_close(again, wanted, rtol=0, atol=LOGITS_FP32)


@pytest.mark.parametrize("variant", ["llama-gqa", "gpt2", "granite", "granite-tied", "stablelm"])
def test_exits_logits_are_the_heads(
    variant: str, checkpoints: Checkpoints, rng: np.random.Generator
) -> None:
    checkpoint = checkpoints(variant)
    frozen, spec = Frozen(checkpoint, torch.device("cpu")), checkpoint.spec
    ends = checkpoint.family.ends(checkpoint.config, spec)
    bias = ends.get("final_norm.bias")
    norm = FinalNorm(
        spec.norm,
        checkpoint.read(ends["final_norm.weight"]),
        None if bias is None else checkpoint.read(bias),
        spec.norm_epsilon,
    )
    weight = checkpoint.read(ends.get("head", ends["token_embedding"]))
    y = rng.normal(size=(9, spec.hidden_size))
    logits = LanguageHead(norm, weight, None).logits(y)
    largest = logits.max(-1, keepdims=True)
    wanted = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    found = frozen.logits(torch.from_numpy(y.astype(np.float32))).log_softmax(-1).numpy()
    limit = LOG_PROBS_FP32_RELATIVE * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=limit)


@pytest.mark.parametrize(("kind", "chosen"), [("mlp", 24), ("draft", 40), ("draft", None)])
def test_pieces_give_the_gradient_of_the_whole(
    kind: str, chosen: int | None, frozen: Frozen
) -> None:
    """`learn` against the loss as it is written down, by autograd in one go."""
    jump = KINDS[kind].begin(frozen, TEXT, chosen, 2)
    scatter(jump, 7)
    states = frozen.states(torch.arange(60).reshape(3, 20))
    tokens, outputs = torch.tensor([4, 5, 8, 25, 44, 59]), [1, 3]
    full = frozen.full_log_probs(states.last.reshape(-1, states.last.shape[-1])[tokens])
    if jump.vocabulary is not None:
        full = full[:, jump.vocabulary].log_softmax(-1)
    loss = torch.zeros(())
    predicted = jump.predict(states, outputs, tokens)
    for y, weight in zip(predicted, jump.weights(outputs), strict=True):
        own = jump.logits(frozen, y).log_softmax(-1)
        loss = loss + weight * torch.nn.functional.kl_div(
            own, full, log_target=True, reduction="sum"
        )
    wanted = torch.autograd.grad(loss / 6, list(jump.parameters()))
    for rows in (4, 100):
        jump.zero_grad()
        found = learn(frozen, jump, states, outputs, tokens, 1 / 6, rows)
        assert found == pytest.approx(float(loss.detach()) / 6, rel=TORCH_GRADIENT_RELATIVE)
        for each, gradient in zip(jump.parameters(), wanted, strict=True):
            limit = TORCH_GRADIENT_RELATIVE * float(gradient.abs().max())
            torch.testing.assert_close(each.grad, gradient, rtol=0, atol=limit)


def test_figures_are_those_of_every_exit(frozen: Frozen, rng: np.random.Generator) -> None:
    """Against NumPy, token by token; in pieces and passes of any size."""
    windows = torch.from_numpy(rng.integers(0, 300, size=(3, 16)))
    positions = torch.from_numpy(
        np.sort(rng.permuted(np.tile(np.arange(16), (3, 1)), axis=1)[:, :5])
    )
    jump = Residual.begin(frozen, TEXT, 8, 0)
    scatter(jump, 3)
    with torch.no_grad():
        logits = frozen.model(windows, output_hidden_states=True)
        full = logits.logits.double().log_softmax(-1)
    figures = measure(frozen, jump, windows, positions, 2, 4)
    again = measure(frozen, jump, windows, positions, 1, 100)
    assert figures.chain is None
    for exit in range(1, frozen.spec.blocks):
        losses, agree = [], []
        for row, places in enumerate(positions.tolist()):
            for place in places:
                h = logits.hidden_states[exit][row, place]
                with torch.no_grad():
                    own = frozen.logits(jump.jump(h[None], exit)).log_softmax(-1).double()[0]
                wanted = full[row, place]
                losses.append(float((wanted.exp() * (wanted - own)).sum()))
                agree.append(bool(own.argmax() == wanted.argmax()))
        for found in (figures, again):
            assert found.loss[exit - 1] == pytest.approx(np.mean(losses), abs=KL_FP32)
            assert found.agreement[exit - 1] == pytest.approx(np.mean(agree))
