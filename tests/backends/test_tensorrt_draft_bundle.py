"""A bundle with a draft layer on the TensorRT backend: added, verified, run; on the stand-ins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drafts import draft_for
from engine.random_requests import (
    TIMEOUT,
    alone,
    check_each_gives_what_it_gives_alone,
    layer_requests,
)
from engine.test_launching_ahead import examples
from engine.watched_engine import WatchedEngine
from hypothesis import given
from hypothesis import strategies as st

import ojfa_export
from bench.serving import drafts
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.shortcut_file import save
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import BackendError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.planning.plan import plan_bundle
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.verify import compare_blocks


@pytest.fixture(scope="module")
def bundle(driver, tiny_checkpoint, calibration_text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle")
    checkpoint = Checkpoint(tiny_checkpoint)
    file = directory / "draft.safetensors"
    save(draft_for(checkpoint.spec, seed=3), file, checkpoint.sha256(), {"text": "made up"})
    options = BuildOptions(
        str(tiny_checkpoint),
        directory / "out.ojfa",
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=128,
        shortcut=["ojfa", file],
        rank=8,
        skip_verification=True,
    )
    built = build(options).bundle
    add_engines(built, "tensorrt", SILENT)
    return built


@pytest.fixture(scope="module")
def models(bundle):
    return ojfa_export.load(bundle, backend="tensorrt"), ojfa_export.load(bundle)


def test_it_is_verified(bundle, models):
    checks = compare_blocks(Bundle(bundle), models[0], "tensorrt", SILENT)
    names = [check.name for check in checks]
    assert "float64 draft: logits" in names
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("speculate", [True, Speculation(0, 3)])
def test_generated_tokens_are_those_of_the_cpu(models, speculate):
    prompts = [[5, 6, 7], [8] * 20, [3]]
    for each in (prompts[:1], prompts):
        found, expected = (
            model.generate(each, speculate=speculate, max_new_tokens=40) for model in models
        )
        for one, other in zip(found.prompts, expected.prompts, strict=True):
            assert one.token_ids == other.token_ids


@pytest.mark.parametrize("speculate", [Speculation(0, 3), Speculation(0, draft_cost=0.01)])
def test_texts_that_end_where_nobody_foresaw_it(models, speculate):
    """The round that was begun ahead is dropped, for one sequence or for all."""
    prompts = [[5, 6, 7], [8] * 20, [3]]
    how = {"speculate": speculate, "max_new_tokens": 40}
    whole = models[1].generate(prompts, **how).prompts
    for end in (1, 4, 9, 20):
        stop = tuple({each.token_ids[end] for each in whole})
        for each in (prompts[:1], prompts[1:2], prompts):
            found, expected = (m.generate(each, stop_token_ids=stop, **how) for m in models)
            assert [one.token_ids for one in found.prompts] == [
                one.token_ids for one in expected.prompts
            ]


@pytest.mark.parametrize("pages", [3, 100])
@examples
@given(requests=layer_requests, slots=st.integers(1, 4))
def test_requests_give_the_tokens_of_each_alone(models, pages, requests, slots):
    check_each_gives_what_it_gives_alone(*models, requests, slots, pages)


def test_a_shared_prefix_is_known_to_the_layer(models):
    prefix = np.random.default_rng(0).integers(200, size=70).tolist()
    options = {"max_new_tokens": 12, "ignore_eos": True, "speculate": Speculation(0, 4)}
    with WatchedEngine(models[0], max_sequences=2) as engine:
        for prompt in ([*prefix, 5], [*prefix, 6, 7], prefix[:4]):
            result = engine.submit(prompt, **options).result(TIMEOUT)
            assert result.token_ids == alone(models[1], prompt, options).token_ids
            if prompt[:-1] != prefix and len(prompt) > 70:
                assert result.usage.cached_tokens >= 70


def sessions_made(model, monkeypatch) -> list:
    model._last.drop()  # of the test before
    made = []

    def noting(*args, **kwargs):
        made.append(Model.session(model, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(model, "session", noting)
    return made


@pytest.mark.parametrize("speculate", [False, Speculation(0, 3)])
def test_a_generation_goes_on_with_the_session_of_the_last(models, monkeypatch, speculate):
    """Whose steps are recorded; tokens are those of a new one."""
    device, cpu = models
    made, recorder = sessions_made(device, monkeypatch), device.engines.device.recorder
    how = {"exit": None if speculate else "full", "speculate": speculate, "max_new_tokens": 30}
    for prompt in ([5, 6, 7], [9] * 20, [3]):
        found, expected = (m.generate([prompt], **how).prompts[0] for m in models)
        assert found.token_ids == expected.token_ids
        newest = recorder.newest
    assert len(made) == 1
    assert made[0].stats.rounds == made[0].lengths[0] == 0
    device.generate([[3]], **how)
    assert recorder.newest is newest  # nothing is recorded that was before
    device.generate([[3], [4]], **how)
    device.generate([[3]], **{**how, "max_new_tokens": 120})
    assert [each.batch_size for each in made] == [1, 2, 1]
    assert cpu._last._session is None


def test_a_session_is_not_kept_of_what_did_not_end(models, monkeypatch):
    made = sessions_made(models[0], monkeypatch)
    stream = models[0].stream([5, 6, 7], exit="full", max_new_tokens=9)
    next(stream)
    stream.close()
    models[0].generate([[5]], exit="full", max_new_tokens=3)
    assert len(made) == 2
    models[0].session(1, 8)  # of whoever asks for one, who needs the memory
    models[0].generate([[5]], exit="full", max_new_tokens=3)
    assert len(made) == 4


def test_where_engines_alone_run_it_says_so(bundle, monkeypatch):
    monkeypatch.setenv("OJFA_DECODE", "engines")
    model = ojfa_export.load(bundle, backend="tensorrt")
    assert model.generate([[5, 6]], max_new_tokens=2).prompts[0].token_ids
    with pytest.raises(BackendError, match="OJFA_DECODE=engines"):
        model.generate([[5, 6]], speculate=True, max_new_tokens=2)


def test_rounds_are_timed(bundle, monkeypatch):
    """The session is rewound between rounds: none is begun ahead."""
    monkeypatch.setattr("ojfa_export.planning.plan.SECONDS", 0)
    plan = plan_bundle(bundle, SILENT, backend="tensorrt")
    assert any(point.exit == 0 for point in plan.points)


def test_the_benchmark_generates_from_it(bundle, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "drafts.json"
    prompts.write_text("def main(\nimport os\n", encoding="utf-8")
    arguments = ["--backend", "tensorrt", "--prompts", str(prompts), "--out", str(out)]
    costs = ["--costs", "0.1", "0.05", "0.1"]
    drafts.main([str(bundle), *arguments, "--new", "12", "--drafts", "2", *costs])
    told = json.loads(out.read_text())["summary"]
    assert set(told) == {"full", "default", "adapted", "2"}
    assert all(each["equal"] == each["prompts"] == 2 for each in told.values())
