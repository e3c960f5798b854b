"""Configs with hostile values: refused in words, or what transformers accepts as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st
from tiny_models import VARIANTS

from ojfa_export.decoding.generation_defaults import GenerationDefaults
from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.generation import read_generation
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import IRRELEVANT_FIELDS, Config

Fields = dict[str, Any]
EXAMPLES = 100

HOSTILE = [
    10**400, -(10**400), 2**31 - 1, 2**31, 2**63, -1, 0, 1, 2, 3, 65_536, 65_537,
    float("nan"), float("inf"), -float("inf"), 1e-320, 1e-45, 1e39, 1e308, -0.0, 0.5, 1.0, -1e-5,
    True, False, None, "", "x", "1", "silu", "default", "float16", "\x1b[2J", [], {}, [[]], [1],
    [1.0], [-1], [True], [None], ["x"], [1] * 8, [float("nan")] * 8, {"a": 1}, {"rope_type": []},
]  # fmt: skip
ROTARY = {
    "rope_type": ["default", "linear", "dynamic", "llama3", "longrope", "su", "yarn"],
    "type": ["linear"],
    "rope_theta": [10_000.0, 1e6],
    "factor": [2.0, 8],
    "low_freq_factor": [1.0, 4.0],
    "high_freq_factor": [4.0, 1.0],
    "original_max_position_embeddings": [1, 32, 64],
    "partial_rotary_factor": [0.5, 0.25],
    "short_factor": [[1.0] * 8, [1.0] * 4],
    "long_factor": [[1.0] * 8, [2.0] * 4],
    "attention_factor": [1.0],
    "mscale": [1.0],
}


FAMILIES = ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "phi3", "qwen3", "smollm3"]


def _base(family: str) -> Fields:
    return dict(json.loads(VARIANTS[family].build_config().to_json_string()))


def _without_nulls(fields: Fields) -> Fields:
    """A null is an absent field, as it was to transformers before version 5."""
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if value is not None
    }


def _fields_of(family: str) -> list[str]:
    named = {
        "num_labels",
        "dtype",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "head_dim",
    }
    return sorted({*_base(family), *IRRELEVANT_FIELDS, *named} - {"model_type"})


def _values(name: str) -> st.SearchStrategy[Any]:
    anything = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=4)
    if name not in ("rope_scaling", "rope_parameters"):
        return anything
    return anything | st.fixed_dictionaries(
        {}, optional={key: st.sampled_from([*sound, *HOSTILE]) for key, sound in ROTARY.items()}
    )


def _changes(family: str) -> st.SearchStrategy[Fields]:
    names = st.lists(st.sampled_from(_fields_of(family)), min_size=1, max_size=2, unique=True)
    return names.flatmap(lambda each: st.fixed_dictionaries({name: _values(name) for name in each}))


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_values(family: str, rng: np.random.Generator) -> None:
    base = _base(family)

    @seed(int(rng.integers(2**32)))
    @settings(max_examples=EXAMPLES, deadline=2000, database=None)
    @given(_changes(family))
    @example({"rms_norm_eps": 10**400, "layer_norm_epsilon": 10**400})
    @example({"num_hidden_layers": 2**31 - 1, "n_layer": 2**31 - 1})
    @example({"head_dim": 2**31 - 2})
    @example({"num_labels": 2**31 - 1})
    def check(changes: Fields) -> None:
        # As a file gives them: no number that Python's JSON wouldn't read.
        fields = json.loads(json.dumps({**base, **changes}))
        config = Config(fields, "config.json")
        try:
            found, spec = read_spec(config)
        except CheckpointError as error:
            said = error
        else:
            said = None
        if said is not None:
            assert said.message.startswith("config.json: ")
            assert len(said.message) < 1000
            assert said.hint
            return
        transformers.AutoConfig.for_model(**_without_nulls(fields))
        assert 0 <= spec.norm_epsilon <= 1
        assert all(0 <= each < spec.vocab_size for each in spec.eos_token_ids)
        rotary = found.rotary(config)
        if rotary is not None and rotary.dim <= 1024:
            for table in rotary.tables(3):
                assert np.isfinite(table).all()

    check()


@pytest.mark.parametrize("value", [-1, 320, 2**63, 1.0, True, "0", [0, 320], [[0]], {}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_of_text_is_a_token(tmp_path, name: str, value: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    config = Config({**_base("llama"), "eos_token_id": value}, name)
    read = {
        "config.json": lambda: read_spec(config),
        "generation_config.json": lambda: _generation(tmp_path),
    }
    with pytest.raises(CheckpointError, match=r"'eos_token_id' must be a token id in 0\.\.319"):
        read[name]()


@pytest.mark.parametrize("name", [*GenerationDefaults.model_fields, "num_beams", "bad_words_ids"])
def test_hostile_words_on_generation(tmp_path, name: str) -> None:
    """What is taken can be written into a manifest and read again; all else is refused tidily."""
    refusals = []
    for value in HOSTILE:
        (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
        try:
            found = _generation(tmp_path)
        except CheckpointError as error:
            refusals.append(error)
        else:
            assert GenerationDefaults.model_validate_json(found.model_dump_json()) == found
    assert refusals
    assert all(error.hint and "\n" not in error.message for error in refusals)
    assert max(len(error.message) for error in refusals) < 300 + len(str(tmp_path))


def _generation(directory: Path) -> GenerationDefaults:
    return read_generation(directory, Config(_base("llama"), "config.json"), 320)[1]
