"""Fields of published configs that change nothing, as transformers shows; and the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import make_checkpoint

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.families.config import GENERATION_FIELDS

Fields = dict[str, Any]

COMMON: Fields = {
    "_num_labels": 2,
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    "_model_name_or_path": "owner/model",
    "unk_token_id": 0,
    "lm_head_bias": False,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "do_sample": True,
    "max_length": 5,
    "repetition_penalty": 9.0,
    "num_beams": 1,
    "suppress_tokens": [1, 2, 3],
    "early_stopping": "never",
}
PHI_4 = {"full_attn_mod": 1, "interpolate_factor": 1, "mlp_bias": False}
HARMLESS = {"llama": {**COMMON, "mlp_bias": False}, "gpt2": COMMON, "phi3": {**COMMON, **PHI_4}}


def edit(directory: Path, fields: Fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("family", HARMLESS)
def test_harmless_fields(tmp_path: Path, family: str) -> None:
    """Neither the model that is read is another, nor what transformers computes."""
    directory = make_checkpoint(family, tmp_path, seed=4)
    before, logits = Checkpoint(directory).spec, _logits(directory)
    edit(directory, HARMLESS[family])
    assert Checkpoint(directory).spec == before
    assert torch.equal(_logits(directory), logits)


def _logits(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([[5, 66, 7]])).logits


def test_fields_of_generation_are_those_of_transformers() -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert {*defaults} - {"use_cache"} == GENERATION_FIELDS


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "rope_interleaved", True),
        ("gpt2", "lm_head_bias", True),
        ("phi3", "mlp_bias", True),
        ("phi3", "full_attn_mod", 2),
        ("phi3", "interpolate_factor", 4),
        ("llama", "transformers.js_config", "x"),
        ("llama", "_num_labels", 1.5),
    ],
)
def test_other_values_are_refused(tmp_path: Path, family: str, field: str, value: Any) -> None:
    directory = make_checkpoint(family, tmp_path, seed=4)
    edit(directory, {field: value})
    with pytest.raises(CheckpointError, match=f"field '{field}' "):
        Checkpoint(directory)


def test_fields_that_the_user_has_ignored(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path, seed=4)
    spec = Checkpoint(directory).spec
    edit(directory, {"brand_new": 1, "and_more": [2]})
    with pytest.raises(CheckpointError, match=r"'llama': and_more, brand_new$") as caught:
        Checkpoint(directory)
    assert "give --ignore-config-field and_more and so on" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match=r"'llama': brand_new$"):
        Checkpoint(directory, ["and_more"])
    assert Checkpoint(directory, ["and_more", "brand_new"]).spec == spec


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("hidden_size", "field 'hidden_size' is understood for family 'llama', and can't be"),
        ("rope_parameters", "field 'rope_parameters' is understood"),
        ("no_such", "has no field 'no_such' that could be ignored"),
    ],
)
def test_fields_that_cannot_be_ignored(tmp_path: Path, name: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint(make_checkpoint("llama", tmp_path, seed=4), [name])
    assert caught.value.hint == f"leave out --ignore-config-field {name}"
