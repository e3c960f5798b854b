"""What generation_config.json says of generation: the values, and the text, of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tolerances import PROBABILITY_FP32

import ojfa_export
from ojfa_export.bundle.names import MANIFEST
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.decoding.generation_defaults import NO_DEFAULTS
from ojfa_export.decoding.logits import LogitsProcessor
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint

Fields = dict[str, Any]
FOLLOWED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens")


def write(directory: Path, fields: Fields, name: str = "generation_config.json") -> None:
    path = directory / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def random_fields(rng: np.random.Generator) -> Fields:
    fields = {
        "temperature": float(rng.uniform(0.2, 2)),
        "top_k": int(rng.integers(3, 300)),
        "top_p": float(rng.uniform(0.3, 1)),
        "repetition_penalty": float(rng.uniform(1.05, 1.5)),
        "suppress_tokens": rng.choice(320, 7, replace=False).tolist(),
    }
    return {**fields, "do_sample": True, "max_length": 9, "bos_token_id": 0, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_values_are_those_of_transformers(
    directory: Path, rng: np.random.Generator, name: str
) -> None:
    fields = random_fields(rng)
    if name != "config.json":
        fields |= {"min_p": 0.05, "eos_token_id": [7, 9], "transformers_version": "4.46.0"}
        write(directory, {"temperature": 0.1, "num_beams": 4}, "config.json")  # read by nobody then
    write(directory, fields, name)
    said, checkpoint = load(directory).generation_config, Checkpoint(directory)
    for each in FOLLOWED:
        found = getattr(checkpoint.generation, each)
        assert (list(found) if each == "suppress_tokens" else found) == getattr(said, each), each
    eos = said.eos_token_id
    assert list(checkpoint.spec.eos_token_ids) == (eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize("fields", [{}, {"top_k": 0, "temperature": 0.0, "num_beams": 1}])
def test_nothing_is_said(directory: Path, fields: Fields) -> None:
    assert Checkpoint(directory).generation == NO_DEFAULTS
    write(directory, fields)
    assert Checkpoint(directory).generation == NO_DEFAULTS


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_beams": 4}, "field 'num_beams' is 4, which is not followed"),
        ({"no_repeat_ngram_size": 3}, "field 'no_repeat_ngram_size' is 3"),
        ({"begin_suppress_tokens": [5]}, r"field 'begin_suppress_tokens' is \[5\]"),
        ({"brand_new": "x"}, "field 'brand_new' is 'x', which is not followed"),
        ({"top_p": 1.5}, "field 'top_p' can't be 1.5: "),
        ({"top_k": 2.5}, "field 'top_k' can't be 2.5: "),
        ({"temperature": "hot"}, "field 'temperature' can't be 'hot': "),
        ({"temperature": float("nan")}, "field 'temperature' can't be nan: "),
        ({"suppress_tokens": [-1]}, r"field 'suppress_tokens' can't be \[-1\]: "),
        ({"suppress_tokens": [320]}, r"'suppress_tokens' has token ids outside 0\.\.319"),
    ],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_cannot_be_followed(directory: Path, fields: Fields, match: str, name: str) -> None:
    [field] = fields
    write(directory, fields, name)
    if field == "brand_new" and name == "config.json":
        match = "not understood for family 'llama': brand_new"
    with pytest.raises(CheckpointError, match=f"{name}: .*{match}") as caught:
        Checkpoint(directory)
    assert f"--ignore-config-field {field}" in str(caught.value.hint)
    assert Checkpoint(directory, [field]).generation == NO_DEFAULTS


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> tuple[Any, Any]:
    """A bundle and the transformers model of a checkpoint with values of its own."""
    from tiny_models import make_checkpoint

    directory = make_checkpoint("llama-gqa", tmp_path_factory.mktemp("own") / "c", seed=6)
    write(directory, {**random_fields(np.random.default_rng()), "eos_token_id": None})
    options = BuildOptions(
        str(directory), directory.with_name("own.ojfa"), rank=8, shortcut="ojfa",
        calibration_data=(calibration_text,), calibration_tokens=1024, max_cache_length=64,
        skip_verification=True,
    )  # fmt: skip
    return ojfa_export.load(build(options).bundle), load(directory)


@torch.inference_mode()
def generate(model: Any, prompt: list[int], **options: Any) -> Any:
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    return model.generate(
        torch.tensor([prompt]), attention_mask=mask, eos_token_id=None, output_logits=True,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


def test_greedy_text(spoken: tuple[Any, Any], rng: np.random.Generator) -> None:
    """Greedy is the default, and what the checkpoint says of penalties holds."""
    ours, theirs = spoken
    prompt = rng.integers(320, size=9).tolist()
    expected = generate(theirs, prompt, do_sample=False, max_new_tokens=30)
    [completion] = ours.generate(prompt, max_new_tokens=30, ignore_eos=True).prompts
    with ojfa_export.Engine(ours, max_sequences=2) as engine:
        served = engine.submit(prompt, max_new_tokens=30, ignore_eos=True).result(60.0)
    assert served.token_ids == completion.token_ids
    for step, token in enumerate(expected.sequences[0, len(prompt) :].tolist()):
        second, first = expected.scores[step][0].topk(2).values.flip(0)
        if first - second < 1e-3:
            break  # either may be chosen
        assert completion.token_ids[step] == token
    assert not {*completion.token_ids} & {*ours.manifest.generation.suppress_tokens}


def test_sampled_from_the_same_distribution(
    spoken: tuple[Any, Any], rng: np.random.Generator
) -> None:
    ours, theirs = spoken
    options = GenerationOptions(sample=True).completed(ours.manifest.generation)
    for _ in range(5):
        prompt = rng.integers(320, size=9).tolist()
        given = generate(theirs, prompt, do_sample=True, max_new_tokens=1)
        logits = LogitsProcessor(options, prompt).adjust(given.logits[0][0].numpy())
        expected = torch.softmax(given.scores[0][0].double(), 0).numpy()
        actual = options.sampling.probabilities(logits)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=PROBABILITY_FP32)


def test_options_override_them(spoken: tuple[Any, Any], rng: np.random.Generator) -> None:
    own = spoken[0].manifest.generation
    plain = GenerationOptions().completed(own)
    assert (plain.temperature, plain.top_k, plain.top_p, plain.min_p) == (0.0, None, 1.0, 0.0)
    assert plain.repetition_penalty == own.repetition_penalty
    sampled = GenerationOptions(temperature=0.3).completed(own)
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.3, own.top_k, own.top_p)
    named = {"temperature": 0.5, "top_k": 320, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    named |= {"repetition_penalty": 1.0, "logit_bias": dict.fromkeys(own.suppress_tokens, 0.0)}
    assert not GenerationOptions(**named).completed(own).adjusts_logits
    assert GenerationOptions(**named).completed(own) == GenerationOptions(**named)
    assert GenerationOptions(sample=True).completed(NO_DEFAULTS).temperature == 1.0
    with pytest.raises(ojfa_export.UsageError, match="temperature 0 is greedy"):
        GenerationOptions(sample=True, temperature=0)
    with pytest.raises(ojfa_export.UsageError, match="the bundle's own defaults can't") as caught:
        spoken[0].generate([1], speculate=True)
    assert "--repetition-penalty 1" in str(caught.value.hint)


def test_manifest_that_suppresses_tokens_of_another_model(spoken: tuple[Any, Any]) -> None:
    manifest = spoken[0].manifest
    own = manifest.generation.model_copy(update={"suppress_tokens": (320,)})
    path = spoken[0].bundle.directory / MANIFEST
    kept = path.read_text()
    path.write_text(manifest.model_copy(update={"generation": own}).to_json())
    with pytest.raises(ojfa_export.BundleError, match="never chosen are outside the model"):
        ojfa_export.load(path.parent)
    path.write_text(kept)
