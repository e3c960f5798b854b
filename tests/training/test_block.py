"""The block under training: what its shortcut says, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import BLOCK_RELATIVE
from trainings import Checkpoints, Options, random_text, scatter

from ojfa_export.cli.app import app
from ojfa_export.models.spec import SECOND
from ojfa_export.training.kinds.block import Block
from ojfa_export.training.train import train
from ojfa_export.writing.frozen import Frozen, States

TEXT = random_text(16, 20)
VARIANTS = (
    *("llama-gqa", "llama-attention-bias", "llama-mlp-bias", "llama-rope-llama3", "qwen2"),
    *("mistral-sliding-window", "phi3-gqa", "phi3-longrope", "phi3-partial-rotary"),
    *("granite-biases", "gpt_neox", "qwen3", "smollm3-sliding-window", "olmo2"),
    *("gemma2", "gemma3_text", "gemma3_text-layer-types"),
    *("gpt2", "gpt2-relu", "gpt2-inverse-layer-scale"),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_is_the_shortcut(
    variant: str, checkpoints: Checkpoints, rng: np.random.Generator
) -> None:
    checkpoint = checkpoints(variant)
    frozen, spec = Frozen(checkpoint, torch.device("cpu")), checkpoint.spec
    real = frozen.states(torch.arange(32).reshape(2, 16))
    hidden = tuple(
        torch.from_numpy(rng.normal(size=(2, 16, spec.hidden_size))) for _ in real.hidden
    )
    states = States(real.embedded, hidden, real.last, real.beside)
    rotary = frozen.rotary
    start = 16 * (spec.rotations_of(spec.blocks - 1) == SECOND)
    rows = slice(start, start + 16)
    tables = () if rotary is None else tuple(each[rows] for each in rotary.tables(16))
    for exits in (None, (1, spec.blocks - 1)):
        block = Block.begin(frozen, TEXT, exits, 0)
        scatter(block, int(rng.integers(2**31)))
        shortcut = block.shortcut()
        shortcut.check_fits(spec)
        assert block.outputs == shortcut.exits == (exits or tuple(range(1, spec.blocks)))
        tokens = torch.arange(16, 32)
        with torch.no_grad():
            found = block.double().predict(states, block.outputs, tokens)
        for exit, y in zip(block.outputs, found, strict=True):
            wanted = shortcut.apply(hidden[exit - 1][1].numpy(), exit, spec, tables)
            assert wanted.dtype == np.float64
            limit = BLOCK_RELATIVE * np.abs(wanted).max()
            np.testing.assert_allclose(y.numpy(), wanted, rtol=0, atol=limit)
            single = shortcut.apply(hidden[exit - 1][1].float().numpy(), exit, spec, tables)
            assert single.dtype == np.float32
            np.testing.assert_allclose(single, wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("variant", ["olmo2", "granite-biases", "gpt2"])
def test_it_begins_as_the_last_block(variant: str, checkpoints: Checkpoints) -> None:
    """At the last exit it is the model itself."""
    frozen = Frozen(checkpoints(variant), torch.device("cpu"))
    states, last = frozen.states(torch.arange(30).reshape(2, 15)), frozen.spec.blocks - 1
    (found,) = Block.begin(frozen, TEXT, None, 0).predict(states, [last], torch.arange(30))
    torch.testing.assert_close(found, states.at(last + 1, torch.arange(30)), rtol=0, atol=0)
    shortcut = Block.begin(frozen, TEXT, (last,), 0).shortcut()
    for name, weight in frozen.last_block().items():
        np.testing.assert_array_equal(shortcut.weights[name][0], weight)


def test_a_block_of_another_model_does_not_fit(checkpoints: Checkpoints) -> None:
    frozen = Frozen(checkpoints("llama-gqa"), torch.device("cpu"))
    shortcut = Block.begin(frozen, TEXT, None, 0).shortcut()
    for changes, message in (
        ({"hidden_size": 32}, "its hidden size is 64, the model's 32"),
        ({"kv_heads": 4}, "its width of attention is 128, the model's 192"),
        ({"qk_norm": "head"}, "its norm of queries is 0, the model's 16"),
        ({"intermediate_size": 64}, "its width of the MLP is 96, the model's 64"),
        ({"gated": False}, "its first matrix's width is 192, the model's 96"),
        ({"blocks": 3}, "it serves exit 3, the model has 3 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            shortcut.check_fits(frozen.spec.model_copy(update=changes))


def test_it_is_built_into_a_bundle(tiny_checkpoint: Path, options: Options, tmp_path: Path) -> None:
    asked = options(jump="block", exits=(1, 3), tokens="3k", passes=1)
    assert [row["exit"] for row in train(asked)["outputs"]] == [1, 3]
    arguments = ["build", str(tiny_checkpoint), "-o", str(tmp_path / "bundle")]
    arguments += ["--calibration-tokens", "1024", "--max-cache-length", "64"]
    result = CliRunner().invoke(app, [*arguments, "--shortcut", str(asked.output)])
    assert result.exit_code == 0, result.stderr
    assert "2 blocks behind exits 1, 3" in result.stdout
