"""A bundle with a draft layer: built of a file and of an EAGLE-3 directory, verified, and run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drafts import draft_for
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import ojfa_export
from ojfa_export import backends, errors
from ojfa_export.bundle.manifest import manifest_digest
from ojfa_export.bundle.names import DRAFT, DRAFT_GRAPHS, MANIFEST, SHORTCUT
from ojfa_export.bundle.shortcut_file import load, save
from ojfa_export.cli.app import app
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.draft_head import draft_vocabulary, frequent_tokens
from ojfa_export.compiler.draft_stage import draft_prompts
from ojfa_export.compiler.fingerprints import stage_keys
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.models.chat_format import ChatFormat
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.runtime.draft_layer import draft_share
from ojfa_export.system.digest import sha256_file
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.verify import verify_bundle


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def draft(checkpoint):
    return draft_for(checkpoint.spec, seed=3)


@pytest.fixture(scope="module")
def draft_file(checkpoint, draft, tmp_path_factory):
    path = tmp_path_factory.mktemp("draft") / "d.safetensors"
    save(draft, path, checkpoint.sha256(), {"text": "made up"})
    return path


@pytest.fixture(scope="module")
def headless(checkpoint, draft, tmp_path_factory):
    """A layer with the model's head."""
    path = tmp_path_factory.mktemp("headless") / "h.safetensors"
    save(replace(draft, head=None, tokens=None), path, checkpoint.sha256())
    return path


@pytest.fixture(scope="module")
def options(tiny_checkpoint, calibration_text, tmp_path_factory):
    def make(**changes) -> BuildOptions:
        return BuildOptions(
            str(tiny_checkpoint),
            changes.pop("output", tmp_path_factory.mktemp("built") / "out.ojfa"),
            **{
                "calibration_data": (calibration_text,),
                "calibration_tokens": 1024,
                "max_cache_length": 64,
                **changes,
            },
        )

    return make


@pytest.fixture(scope="module")
def built(options, draft_file):
    """With a jump that is calibrated, and verified."""
    return build(options(shortcut=["ojfa", draft_file], rank=8))


@pytest.fixture(scope="module")
def model(built):
    return ojfa_export.load(built.bundle)


def test_drafts_are_counted_in_answers(tiny_checkpoint):
    """Held-out text is what a user says, where the model has a template for that."""
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    held_out = np.random.default_rng(3).integers(3, tokenizer.get_vocab_size(), (40, 64))
    chat = ChatFormat(templates={"default": "U:{{ messages[0].content }}\nA:"}, special_tokens={})
    refuses = ChatFormat(templates={"default": "{{ raise_exception('no') }}"}, special_tokens={})
    inputs = SimpleNamespace(
        windows=SimpleNamespace(held_out=held_out), tokenizer=tokenizer, chat=None
    )
    plain = draft_prompts(inputs)
    assert plain == held_out[::3, :48].tolist()
    inputs.chat = refuses
    assert draft_prompts(inputs) == plain
    inputs.chat = chat
    texts = [tokenizer.decode(ids) for ids in draft_prompts(inputs)]
    assert texts == [f"U:{tokenizer.decode(ids)}\nA:" for ids in plain]


def test_a_head_over_frequent_tokens(options, headless, checkpoint):
    """Rows of the model's head, of tokens that the text has, else of low numbers."""
    made = build(options(shortcut=["ojfa", headless], rank=8, draft_vocabulary=40))
    found, digest = load(made.bundle / DRAFT)
    given, _ = load(headless)
    assert digest == checkpoint.sha256()
    ends = checkpoint.family.ends(checkpoint.config, checkpoint.spec)
    head = checkpoint.read(ends.get("head", ends["token_embedding"]))
    np.testing.assert_array_equal(found.head, head[found.tokens])
    np.testing.assert_array_equal(found.qkv, given.qkv)
    assert len(found.tokens) == 40
    assert set(checkpoint.spec.eos_token_ids) <= set(found.tokens.tolist())
    model = ojfa_export.load(made.bundle)
    how = {"max_new_tokens": 20, "ignore_eos": True}
    drafted = model.generate([[5, 6, 7]], speculate=Speculation(0, 3), **how)
    assert drafted.prompts[0].token_ids == model.generate([[5, 6, 7]], **how).prompts[0].token_ids
    assert "drafts 40 tokens" in CliRunner().invoke(app, ["inspect", str(made.bundle)]).output
    inputs = [Inputs(options(shortcut=headless, draft_vocabulary=size)) for size in (40, 41)]
    one, other = map(stage_keys, inputs)
    assert {name for name in one if one[name] != other[name]} == {"draft", "exits", "verify"}


def test_which_tokens_are_frequent(options, headless):
    inputs = Inputs(options(shortcut=headless))
    tokens = frequent_tokens(inputs, 60)
    counts = np.bincount(inputs.windows.fit.ravel(), minlength=inputs.checkpoint.spec.vocab_size)
    assert set(np.argsort(-counts)[:10].tolist()) <= set(tokens.tolist())
    assert draft_vocabulary(inputs) == 0  # a small vocabulary


@pytest.mark.parametrize(
    ("size", "shortcut", "message"),
    [
        (40, "residual", "there is no draft layer"),
        (1, None, "one token says nothing"),
        (10**6, None, "is more than the model's"),
        (40, "own", "has a head of its own, over 16 tokens"),
    ],
)
def test_a_head_that_cannot_be_given(
    options, draft, headless, checkpoint, tmp_path, size, shortcut, message
):
    if shortcut == "own":
        shortcut = tmp_path / "own.safetensors"
        head = np.zeros((16, checkpoint.spec.hidden_size), np.float32)
        own = replace(draft, head=head, tokens=np.arange(16, dtype=np.int32))
        save(own, shortcut, checkpoint.sha256())
    with pytest.raises(errors.UsageError, match=message):
        Inputs(options(shortcut=shortcut or headless, draft_vocabulary=size))


def test_quantised_weights_are_refused(options, draft_file):
    match = "weights int4 can't go with a draft layer: "
    with pytest.raises(errors.UsageError, match=match) as caught:
        plan(options(shortcut=draft_file, weights="int4"))
    assert caught.value.hint


def write_eagle3(directory, draft, spec, *, own_head=True, weights="model.safetensors", **config):
    """The public layout of a draft layer, its head's rows in another order."""
    directory.mkdir()
    hidden, size = draft.hidden_size, draft.head_dim
    q, k, v = np.split(
        draft.qkv, [draft.heads * size, (draft.heads + draft.kv_heads) * size], axis=1
    )
    gate, up = np.split(draft.up, 2, axis=1)
    tensors = {
        "fc.weight": draft.fuse.T,
        "midlayer.input_layernorm.weight": draft.embedding_norm,
        "midlayer.hidden_norm.weight": draft.state_norm,
        "midlayer.self_attn.q_proj.weight": q.T,
        "midlayer.self_attn.k_proj.weight": k.T,
        "midlayer.self_attn.v_proj.weight": v.T,
        "midlayer.self_attn.o_proj.weight": draft.out.T,
        "midlayer.post_attention_layernorm.weight": draft.mlp_norm,
        "midlayer.mlp.gate_proj.weight": gate.T,
        "midlayer.mlp.up_proj.weight": up.T,
        "midlayer.mlp.down_proj.weight": draft.down.T,
        "norm.weight": draft.final_norm,
    }
    if own_head:
        order = np.argsort(draft.tokens)[::-1]
        ids = draft.tokens[order].astype(np.int64)
        tensors["lm_head.weight"] = draft.head[order]
        tensors["d2t"] = ids - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(spec.vocab_size), ids)
    arrays = {name: np.ascontiguousarray(each) for name, each in tensors.items()}
    if weights.endswith(".bin"):
        torch.save({n: torch.from_numpy(each) for n, each in arrays.items()}, directory / weights)
    else:
        save_file(arrays, directory / weights)
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": hidden,
        "num_attention_heads": draft.heads,
        "num_key_value_heads": draft.kv_heads,
        "head_dim": size,
        "intermediate_size": draft.width,
        "rope_theta": draft.rope_theta,
        "rms_norm_eps": draft.epsilon,
        "vocab_size": spec.vocab_size,
        "draft_vocab_size": spec.vocab_size if draft.head is None else len(draft.head),
        "eagle_aux_hidden_state_layer_ids": list(draft.depths),
        **config,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


def equal(one, other) -> bool:
    names = ("fuse", "qkv", "out", "up", "down", "head", "tokens", "final_norm", "embedding_norm")
    numbers = ("depths", "heads", "kv_heads", "head_dim", "rope_theta", "epsilon")
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names) and all(
        getattr(one, n) == getattr(other, n) for n in numbers
    )


def test_the_bundle_is_verified_described_and_shown(built, model, draft, draft_file):
    names = [check.name for check in built.report.checks]
    assert {"graph draft: logits", "float64 draft: logits"} <= set(names)
    assert all(check.passed for check in built.report.checks)
    entry = model.manifest.draft
    assert [graph.name for graph in entry.graphs] == list(DRAFT_GRAPHS)
    assert (entry.depths, entry.parameters) == (draft.depths, draft.parameters)
    assert entry.engines[0].backend == "onnxruntime"
    assert (built.bundle / DRAFT).read_bytes() == draft_file.read_bytes()
    shown = CliRunner().invoke(app, ["inspect", str(built.bundle)])
    assert "exit 0" in shown.stdout
    assert f"{draft.parameters:,} parameters" in shown.stdout
    assert "draft_memory" in shown.stdout
    assert built.report.kind == "ojfa"
    verified = CliRunner().invoke(app, ["verify", str(built.bundle)])
    assert verified.exit_code == 0
    assert "float64 draft: logits" in verified.stdout


def test_it_drafts_by_default_and_tokens_are_those_of_full_depth(model):
    prompts = [[5, 6, 7], [8] * 20, [3]]
    for each in (prompts[:1], prompts):
        plain = model.generate(each, exit="full", max_new_tokens=20)
        for speculate in (True, Speculation(0, 3)):
            drafted = model.generate(each, speculate=speculate, max_new_tokens=20)
            for one, other in zip(plain.prompts, drafted.prompts, strict=True):
                assert one.token_ids == other.token_ids
    share = draft_share(model.manifest)
    resolved = model.resolve_speculation(ojfa_export.GenerationOptions(speculate=True))
    assert (resolved.speculation.exit, resolved.speculation.draft_cost) == (0, share)
    assert 0 < share < 1


def test_a_draft_costs_the_share_of_the_weights_that_it_reads(model, draft):
    spec, graphs = model.spec, model.bundle.graphs
    own = draft.qkv.size + draft.out.size + draft.up.size + draft.down.size + draft.head.size
    head = spec.vocab_size * spec.hidden_size
    norms = 2 * spec.hidden_size
    blocks = sum((graphs / f"block_{i:02}.bin").stat().st_size for i in range(spec.blocks)) // 4
    full = blocks - spec.blocks * norms + head
    assert draft_share(model.manifest) == pytest.approx(own / full, rel=0.02)


def test_an_engine_drafts_with_it(model):
    with ojfa_export.Engine(model, max_sequences=3) as engine:
        asked = [
            ([5, 6, 7], {"speculate": True, "exit": "full"}),
            ([8] * 20, {"speculate": Speculation(0, 3), "exit": "full"}),
            ([9] * 5, {"exit": 2}),
            ([5, 6, 7, 8], {"speculate": Speculation(2), "exit": "full"}),
        ]
        requests = [engine.submit(ids, max_new_tokens=16, **how) for ids, how in asked]
        for request, (ids, how) in zip(requests, asked, strict=True):
            alone = model.generate([ids], max_new_tokens=16, **how).prompts[0]
            assert request.result(60).token_ids == alone.token_ids


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_an_eagle_3_directory_is_the_same_layer(options, built, draft, tmp_path, weights, model):
    directory = write_eagle3(tmp_path / "eagle", draft, model.spec, weights=weights)
    result = build(options(shortcut=[built.bundle / SHORTCUT, directory], skip_verification=True))
    found, of_model = load(result.bundle / DRAFT)
    assert equal(found, draft)
    assert of_model == model.manifest.model.sha256
    for name in ("draft.bin", "draft_tokens.bin", "draft.onnx", "draft_head.onnx"):
        one, other = (each.bundle / "graphs" / name for each in (result, built))
        assert one.read_bytes() == other.read_bytes()
    again = ojfa_export.load(result.bundle)
    assert again.generate([5, 6], speculate=Speculation(0)).prompts[0].token_ids


def test_without_a_head_of_its_own_the_models_is_used(options, checkpoint, built, tmp_path):
    spec = checkpoint.spec
    draft = draft_for(spec, seed=4, own_head=False)
    directory = write_eagle3(tmp_path / "eagle", draft, spec, own_head=False)
    result = build(options(shortcut=[built.bundle / SHORTCUT, directory]))
    assert all(check.passed for check in result.report.checks)
    model = ojfa_export.load(result.bundle)
    assert model.manifest.draft.tokens is None
    assert model.manifest.draft.spec.vocab_size == spec.vocab_size


def test_depths_of_a_published_drafter(checkpoint, tmp_path):
    from ojfa_export.compiler.eagle3 import read_eagle3

    spec = checkpoint.spec.model_copy(update={"blocks": 32})
    draft = replace(draft_for(spec), depths=(2, 16, 29))
    name = "eagle_aux_hidden_state_layer_ids"
    for index, (config, depths) in enumerate(
        [
            ({name: None}, (2, 16, 29)),
            ({name: [4, 8, 32]}, (4, 8, 32)),
            ({name: None, "eagle_config": {name: [1, 15, 28]}}, (2, 16, 29)),
            ({name: None, "eagle_config": {"use_aux_hidden_state": True}}, (2, 16, 29)),
        ]
    ):
        directory = write_eagle3(tmp_path / f"eagle{index}", draft, spec, **config)
        assert read_eagle3(directory, spec).depths == depths


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 128}, "its hidden_size is 128, the model's"),
        ({"vocab_size": 7}, "its vocab_size is 7, the model's"),
        ({"architectures": ["MixtralForCausalLM"]}, "its architecture is"),
        ({"attention_bias": True}, "its attention_bias is True, and only False"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu"),
        ({"norm_before_residual": True}, "its norm_before_residual is True"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "its positions are rotated as 'llama3'"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "it sees states after 9 of 4 blocks"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 1, 3]}, "the states that it sees are those"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "the states that it sees are those"),
        ({"num_key_value_heads": 3}, "has shape"),
        ({"draft_vocab_size": 5}, r"tensor 'lm_head.weight' has shape"),
        ({"intermediate_size": "wide"}, "its intermediate_size is wide"),
    ],
)
def test_another_drafter_is_refused_in_one_line(
    checkpoint, draft, tiny_checkpoint, calibration_text, tmp_path, config, message
):
    directory = write_eagle3(tmp_path / "eagle", draft, checkpoint.spec, **config)
    arguments = ["build", str(tiny_checkpoint), "-o", str(tmp_path / "o"), "--dry-run"]
    arguments += ["--calibration-data", str(calibration_text), "--shortcut", str(directory)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert message in lines[0].replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), "lacks tensor 'fc.weight'"),
        (lambda t: t.update({"midlayer.self_attn.q_proj.bias": t["norm.weight"]}), "can't be run"),
        (lambda t: t.update({"layers.1.norm.weight": t["norm.weight"]}), "can't be run"),
        (lambda t: t.update({"d2t": t["d2t"] * 0 + 900}), "d2t names tokens"),
        (lambda t: t.update({"d2t": t["d2t"][:-1]}), "d2t has shape"),
        (lambda t: t.update({"d2t": t["d2t"].astype(np.float32)}), "expected whole numbers"),
        (lambda t: t.pop("lm_head.weight"), "lacks tensor 'lm_head.weight'"),
        (lambda t: t.update({"norm.weight": t["norm.weight"] * np.nan}), "NaN"),
    ],
)
def test_damaged_weights_are_refused(checkpoint, draft, tmp_path, change, message):
    from ojfa_export.compiler.eagle3 import read_eagle3

    directory = write_eagle3(tmp_path / "eagle", draft, checkpoint.spec)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(errors.CheckpointError, match=message):
        read_eagle3(directory, checkpoint.spec)


def test_a_layer_that_does_not_belong_there_is_refused(options, draft, draft_file, tmp_path):
    other = tmp_path / "other.safetensors"
    save(draft, other, "0" * 64)
    with pytest.raises(errors.CheckpointError, match="a shortcut of another model"):
        build(options(shortcut=other))
    with pytest.raises(errors.UsageError, match="two shortcuts that draft"):
        build(options(shortcut=[draft_file, draft_file]))
    with pytest.raises(errors.UsageError, match="two shortcuts of exits"):
        build(options(shortcut=["ojfa", "residual", draft_file]))


def test_exit_0_without_a_draft_layer(tiny_bundle, model):
    result = CliRunner().invoke(
        app, ["run", str(tiny_bundle), "--prompt", "a", "--speculate", "--draft-exit", "0"]
    )
    assert result.exit_code != 0
    lines = result.stderr.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert "no draft layer" in lines[0]
    with pytest.raises(errors.UsageError, match="no draft layer"):
        ojfa_export.load(tiny_bundle).session(drafts=True)


def test_a_backend_that_runs_none_says_so(built, tmp_path, monkeypatch):
    """Its engines are added, and drafts come of an exit: TensorRT on a stand-in, without layers."""
    from stand_in import stand_in_gpu

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    with stand_in_gpu():
        monkeypatch.delattr(type(backends.load("tensorrt")), "open_draft")
        add_engines(bundle, "tensorrt", SILENT)
        model = ojfa_export.load(bundle, backend="tensorrt")
        assert model.drafts is None
        assert [each.backend for each in model.manifest.draft.engines] == ["onnxruntime"]
        for ask in (
            lambda: model.generate([1, 2], speculate=Speculation(0)),
            lambda: model.session(drafts=True),
        ):
            with pytest.raises(errors.BackendError, match="does not run draft layers") as caught:
                ask()
            assert "--backend onnxruntime" in caught.value.hint
        assert model.generate([1, 2], speculate=True).prompts[0].token_ids
    again = ojfa_export.load(bundle)
    assert again.generate([1, 2], speculate=Speculation(0)).prompts[0].token_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(depths=[1, 2, 9]), "draft.depths"),
        (lambda d: d.update(depths=[2, 1, 4]), "draft.depths"),
        (lambda d: d.update(depths=[1, 4]), "contradicts manifest.json"),
        (lambda d: d["spec"].update(blocks=2, attention_scales=[1, 1]), "draft.spec"),
        (lambda d: d["spec"].update(hidden_size=32), "draft.spec"),
        (lambda d: d["spec"].update(heads=2), "contradicts manifest.json"),
        (lambda d: d["spec"].update(vocab_size=10), "draft.tokens"),
        (lambda d: d.update(tokens=None), "draft.spec.vocab_size"),
        (lambda d: d["tokens"].update(offset=1 << 40), "beyond the file"),
        (lambda d: d["tokens"].update(file=d["rotary"]["cos"]["file"]), "none of the model's"),
        (lambda d: d["tokens"].update(file="elsewhere.bin"), "without its digest"),
        (lambda d: d["rotary"]["cos"].update(shape=[2, 8]), "draft.rotary"),
        (lambda d: d["graphs"].pop(), "names graphs other than"),
        (lambda d: d["engines"][0]["files"].popitem(), "names onnxruntime engines other than"),
        (lambda d: d["engines"][0]["files"].update(draft="graphs/draft.onnx"), "other inputs"),
        (lambda d: d.update(rope_theta=7.0), "is not the draft layer that the manifest"),
        (lambda d: d.update(more=1), "draft.more"),
    ],
)
def test_a_manifest_that_lies_about_the_layer_is_refused(built, tmp_path, change, message):
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    path = bundle / MANIFEST
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields["draft"])
    fields["digest"] = manifest_digest(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(errors.OjfaError, match=message):
        verify_bundle(bundle, None, "onnxruntime", SILENT)


def test_engines_of_other_weights_are_found(built, tmp_path):
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    weights = bundle / "graphs" / "draft.bin"
    whole = bytearray(weights.read_bytes())
    middle = len(whole) // 2 & ~3
    whole[middle : middle + 4] = np.float32(3.0).tobytes()
    weights.write_bytes(whole)
    path = bundle / MANIFEST
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["files"]["graphs/draft.bin"]["sha256"] = sha256_file(weights)
    fields["digest"] = manifest_digest(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    failed = {c.name for c in verify_bundle(bundle, None, "onnxruntime", SILENT) if not c.passed}
    assert failed == {"graph draft: logits", "float64 draft: logits"}
