"""A bundle with blocks behind its exits and a check head behind these: the two together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from chain import random_blocks
from tolerances import CONFIDENCE, LOGITS_FP32

import ojfa_export
from ojfa_export.bundle.block_shortcut import BlocksOnSequences
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Manifest
from ojfa_export.bundle.names import CHECK_HEAD, MANIFEST
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.bundle.shortcut_file import load_exit, save
from ojfa_export.compiler.check_stage import DEFAULT_TOKENS, default_size
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import BuildResult, build
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import UsageError
from ojfa_export.graphs.weights import references
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.planning.step_costs import measure_costs
from ojfa_export.promises.collect import collect_statistics
from ojfa_export.promises.measures import MEASURES
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.checks import language_head

EXITS, SIZE = (1, 3), 50


@pytest.fixture(scope="module")
def built(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildResult:
    directory = tmp_path_factory.mktemp("built")
    checkpoint = Checkpoint(tiny_checkpoint)
    jump = random_blocks(checkpoint.spec, EXITS, seed=4, each=True)
    save(jump, directory / "jump.safetensors", checkpoint.sha256(), {"text": "made up"})
    return build(
        BuildOptions(
            str(tiny_checkpoint),
            directory / "out.ojfa",
            shortcut=directory / "jump.safetensors",
            check_vocabulary=SIZE,
            max_disagreement=0.5,
            confidence=0.8,
            calibration_data=(calibration_text,),
            calibration_tokens=1024,
            max_cache_length=64,
        )
    )


@pytest.fixture(scope="module")
def model(built: BuildResult) -> Model:
    return ojfa_export.load(built.bundle)


def test_it_is_verified_and_its_head_is_the_models_own(built: BuildResult, model: Model) -> None:
    names = {each.name for each in built.report.checks}
    assert all(each.passed for each in built.report.checks)
    assert {"graph check_head", "engine check_head", "graph exit_block"} <= names
    assert {f"float64 check_head behind exit {exit}: logits" for exit in EXITS} <= names
    whole, own = (
        references(onnx.load(model.bundle.graphs / f"{name}.onnx", load_external_data=False))
        for name in ("final_head", CHECK_HEAD)
    )
    assert whole.keys() == own.keys()
    assert {name for name in own if own[name] != whole[name]} == {"head"}


def test_confidence_is_of_what_the_block_gives(
    model: Model, tiny_checkpoint: Path, rng: np.random.Generator
) -> None:
    """NumPy's block on the whole sequence, then its head, on the check head's tokens alone."""
    tokens, tables = model.bundle.check_tokens(), model.manifest.rotary
    assert tokens is not None
    assert tables is not None
    rotary = model.bundle.tensor(tables.cos), model.bundle.tensor(tables.sin)
    jump, _ = load_exit(model.bundle.path("shortcut.safetensors"))
    head = language_head(Checkpoint(tiny_checkpoint))
    ids = rng.integers(model.spec.vocab_size, size=20).tolist()
    never = ExitPolicy(exits=EXITS, measure="top", thresholds=(2.0, 2.0))
    deciding, hidden = model.session(), model.session()
    said = np.stack([deciding.decide([token], never).confidence[:, 0] for token in ids], axis=1)
    for row, exit in enumerate(EXITS):
        hidden.rewind(0)
        hidden.advance(ids, exit)
        states = hidden._runner.pending[exit][0, : len(ids)].astype(np.float64)
        logits = head.logits(
            BlocksOnSequences(jump, model.spec, rotary, len(ids)).apply(states, exit)
        )[:, tokens]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = (shares / shares.sum(axis=1, keepdims=True)).max(axis=1)
        # A softmax moves by no more than its logits.
        np.testing.assert_allclose(said[row], expected, atol=CONFIDENCE + LOGITS_FP32, rtol=0)


def test_statistics_are_of_what_sessions_compare(
    model: Model, tmp_path: Path, rng: np.random.Generator
) -> None:
    window = rng.integers(model.spec.vocab_size, size=(1, 24)).astype(np.int32)
    found = collect_statistics(
        model.spec, lambda: model.engines, ["d"], [window], tmp_path, SILENT, rng
    )
    assert found.exits == EXITS
    never = ExitPolicy(exits=EXITS, measure="margin", thresholds=(2.0, 2.0))
    deciding = model.session()
    [full] = model.session().advance(window[0].tolist(), every_position=True)
    for place, token in enumerate(window[0].tolist()):
        said = deciding.decide([token], never).confidence[:, 0]
        kept = found.confidence[MEASURES.index("margin"), 0, place]
        # It holds 16 bits, rounded down.
        np.testing.assert_allclose(kept, said, rtol=2e-3, atol=CONFIDENCE)
    for column, exit in enumerate(EXITS):
        [logits] = model.session().advance(window[0].tolist(), exit, every_position=True)
        agrees = logits.argmax(axis=1) == full.argmax(axis=1)
        np.testing.assert_array_equal(found.agrees[0, :, column], agrees)


def test_who_leaves_pays_the_head_and_no_second_block(model: Model) -> None:
    costs = measure_costs(model.spec, model.engines, 64, rounds=1, seconds=0.0, progress=SILENT)
    assert costs.leaving == costs.final_head == costs.of_policies().leaving


def test_the_default_counts_no_block_for_the_head(model: Model) -> None:
    """A check head saves rows of the head; a block runs before it all the same."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "heads": 9, "kv_heads": 3}
    spec = model.spec.model_copy(update={**sizes, "head_dim": 64, "vocab_size": 49_152})
    entry: ShortcutEntry = model.manifest.shortcut
    count, reason = default_size(spec.model_copy(update={"blocks": 30}), entry, None)
    assert count == DEFAULT_TOKENS
    assert "would read 21% of what a token of full depth does" in reason
    assert default_size(spec.model_copy(update={"blocks": 90}), entry, None)[0] == 0


def test_golden_tokens_of_an_exit_that_there_is_not(built: BuildResult, model: Model) -> None:
    check = model.manifest.check
    assert check is not None
    raw = json.loads((built.bundle / MANIFEST).read_text())
    raw.pop("digest")
    golden = {
        "policy": {"exits": [2], "measure": "top", "thresholds": [0.5]},
        "prompt_token_ids": [1],
        "token_ids": [1],
        "blocks_run": [2],
    }
    raw["check"]["golden"] = golden
    with pytest.raises(UsageError, match="exit 2 is none of this bundle's"):
        Manifest.model_validate_json(json.dumps(raw))
    if check.golden is not None:
        assert set(check.golden.policy.exits) <= set(EXITS)
    assert Bundle(built.bundle).manifest.check == check
