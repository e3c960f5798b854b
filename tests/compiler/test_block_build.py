"""A bundle with blocks behind a few exits: built of a file, verified, and run there alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chain import random_blocks
from click.testing import CliRunner
from drafts import draft_for
from tolerances import LOGITS_FP32

import ojfa_export
from ojfa_export import errors
from ojfa_export.backends.block_jump import check_runs_jump
from ojfa_export.backends.frugal import FrugalEngines
from ojfa_export.bundle.block_shortcut import BlockShortcut, BlocksOnSequences
from ojfa_export.bundle.manifest import manifest_digest
from ojfa_export.bundle.names import GRAPHS, MANIFEST, SHORTCUT, STATISTICS
from ojfa_export.bundle.shortcut_file import save
from ojfa_export.cli.app import app
from ojfa_export.compiler import parts
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.pipeline import BuildResult, build, plan
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.planning.step_costs import measure_costs
from ojfa_export.planning.traffic import block_bytes
from ojfa_export.promises.statistics import load_statistics
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.system.digest import sha256_file
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.checks import language_head
from ojfa_export.verify.verify import verify_bundle

EXITS = (1, 3)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def jump(checkpoint: Checkpoint) -> BlockShortcut:
    return random_blocks(checkpoint.spec, EXITS, seed=4, each=True)


@pytest.fixture(scope="module")
def jump_file(checkpoint: Checkpoint, jump: BlockShortcut, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("jump") / "block.safetensors"
    save(jump, path, checkpoint.sha256(), {"text": "made up"})
    return path


@pytest.fixture(scope="module")
def built(
    tiny_checkpoint: Path, calibration_text: Path, jump_file: Path, tmp_path_factory: Any
) -> BuildResult:
    """Verified; not to be written to."""
    from ojfa_export.compiler.options import BuildOptions

    return build(
        BuildOptions(
            str(tiny_checkpoint),
            tmp_path_factory.mktemp("built") / "out.ojfa",
            shortcut=jump_file,
            calibration_data=(calibration_text,),
            calibration_tokens=1024,
            max_cache_length=64,
        )
    )


@pytest.fixture(scope="module")
def model(built: BuildResult) -> Model:
    return ojfa_export.load(built.bundle)


def failed(*arguments: str) -> list[str]:
    """The error and the hint of a command that fails."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code != 0
    lines = result.stderr.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    return lines


def test_it_is_verified_and_described(built, model, jump, jump_file):
    checks = {check.name for check in built.report.checks}
    assert all(check.passed for check in built.report.checks)
    assert {"graph exit_block", "engine exit_block", "logits exit 3"} <= checks
    assert {"float64 exit 1: logits", "float64 exit 3: logits"} <= checks
    assert "shortcut file exit_block_01 at exit 3: hidden" in checks
    assert not any("exit_head" in name for name in checks)
    entry, names = model.manifest.shortcut, [graph.name for graph in model.manifest.graphs]
    assert (entry.kind, entry.exits, entry.blocks) == ("block", EXITS, 2)
    assert entry.parameters == jump.parameters == built.report.parameters
    assert names[-3:] == ["exit_block_00", "exit_block_01", "final_head"]
    assert set(model.manifest.engines[0].files) == set(names)
    assert (built.bundle / SHORTCUT).read_bytes() == jump_file.read_bytes()
    assert model.exits == EXITS
    assert [row.blocks for row in built.report.exits] == list(EXITS)
    page = (built.bundle / "report" / "report.html").read_text(encoding="utf-8")
    assert "2 blocks behind exits 1, 3" in page
    shown = CliRunner().invoke(app, ["inspect", str(built.bundle)]).stdout
    assert "1, 3 by the shortcut, 4 by the full head" in shown
    assert "a block for each exit, with keys and values of its own" in shown
    assert all(check.passed for check in verify_bundle(built.bundle, None, "onnxruntime", SILENT))


def test_qualities_are_those_of_whole_windows(built, model, checkpoint, jump, rng):
    """An exit's logits are the definition's, of the text before as well."""
    head, tables = language_head(checkpoint), model.manifest.rotary
    rotary = model.bundle.tensor(tables.cos), model.bundle.tensor(tables.sin)
    ids = rng.integers(model.spec.vocab_size, size=20).tolist()
    for exit in EXITS:
        session = model.session()
        [found] = session.advance(ids, exit, every_position=True)
        hidden = session._runner.pending[exit][0, :20].astype(np.float64)
        wanted = head.logits(BlocksOnSequences(jump, model.spec, rotary, 20).apply(hidden, exit))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=LOGITS_FP32)
    for row in built.report.exits:
        assert row.given is not None
        assert 0 < row.given.surprisal < 20


def test_statistics_and_plans_know_its_exits_alone(built, model):
    for split in load_statistics(built.bundle / STATISTICS).values():
        assert split.exits == EXITS
        assert split.agrees.shape[-1] == 2
    shown = CliRunner().invoke(app, ["plan", str(built.bundle), "--json"])
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    fixed = [each["exit"] for each in document["frontier"] if each["kind"] == "fixed"]
    assert fixed == list(EXITS)
    drafting = {each["exit"] for each in document["frontier"] if each["kind"] == "speculation"}
    assert drafting <= set(EXITS)


def test_costs_of_a_model_that_is_too_large_to_time_whole(model):
    """The blocks that are timed end at an exit that there is."""
    spec = model.spec
    for blocks in (1.5, 2.5, 3.5):
        costs = measure_costs(
            spec, model.engines, 64, rounds=1, seconds=0.0, progress=SILENT,
            most_bytes=blocks * block_bytes(spec),
        )  # fmt: skip
        assert len(costs.exits) == spec.blocks


def test_engines_that_keep_one_block_loaded_give_the_same(model, rng):
    frugal, session = Session(model.spec, FrugalEngines(model.engines), 1, 64), model.session()
    for exit in (3, model.blocks, 1, 3):
        new = rng.integers(model.spec.vocab_size, size=5).tolist()
        np.testing.assert_array_equal(frugal.advance(new, exit), session.advance(new, exit))


def test_a_draft_layer_beside_it(options, checkpoint, jump_file, model, tmp_path):
    """Passes are cut for both; each knows what it must whatever the other does."""
    layer = tmp_path / "draft.safetensors"
    save(draft_for(checkpoint.spec, seed=3), layer, checkpoint.sha256())
    both = ojfa_export.load(build(options(shortcut=[jump_file, layer], rank=None)).bundle)
    prompt, most = list(range(5, 20)), {"max_new_tokens": 12, "ignore_eos": True}
    ways = [{"exit": 3}, {"exit": "full"}, {"speculate": Speculation(3, 2)}]
    for way in ways:
        wanted = model.generate([prompt], **way, **most).prompts[0]
        assert both.generate([prompt], **way, **most).prompts[0].token_ids == wanted.token_ids
    drafted = both.generate([prompt], speculate=Speculation(0, 2), **most).prompts[0]
    assert drafted.token_ids == both.generate([prompt], exit="full", **most).prompts[0].token_ids
    session = both.session(drafts=True)
    first = session.advance(prompt)[0]
    token = int(first.argmax())
    session.propose([[token]])
    session.complete_greedily([[7]], [2])
    session.rewind(len(prompt) + 1)
    expected = model.session()
    expected.advance([*prompt, token])
    for exit in (1, 3):
        np.testing.assert_allclose(
            session.advance([9], exit), expected.advance([9], exit), rtol=0, atol=LOGITS_FP32
        )


def test_every_way_of_decoding_runs(model):
    prompts = ["def main(", "import "]
    full = model.generate(prompts, exit="full", max_new_tokens=6, ignore_eos=True)
    for exit in EXITS:
        done = model.generate(prompts, exit=exit, max_new_tokens=6, ignore_eos=True)
        assert [each.exit_blocks for each in done.prompts] == [[exit] * 6] * 2
    policy = ExitPolicy(exits=EXITS, measure="top", thresholds=(2.0, -1.0))
    done = model.generate(prompts, exit=policy, max_new_tokens=6, ignore_eos=True)
    assert [each.exit_blocks for each in done.prompts] == [[3] * 6] * 2
    alone = model.generate(prompts, exit=3, max_new_tokens=6, ignore_eos=True)
    assert [e.token_ids for e in done.prompts] == [e.token_ids for e in alone.prompts]
    for speculation in (True, Speculation(1, 3), Speculation(3, 2)):
        drafted = model.generate(prompts, speculate=speculation, max_new_tokens=6, ignore_eos=True)
        assert [e.token_ids for e in drafted.prompts] == [e.token_ids for e in full.prompts]


def test_another_exit_is_one_clear_error(built, model):
    bundle = str(built.bundle)
    text = ("--prompt", "a")
    for arguments in (
        ("run", bundle, *text, "--exit", "2"),
        ("run", bundle, *text, "--speculate", "--draft-exit", "2"),
        ("bench", bundle, "--exit", "2"),
    ):
        error, hint = failed(*arguments)
        assert "exit 2 is none of this bundle's: its block jump serves 1, 3" in error
        assert "'full'" in hint
    policy = ExitPolicy(exits=(1, 2), measure="top", thresholds=(0.5, 0.5))
    with ojfa_export.Engine(model) as engine:
        for ask in (
            lambda: model.generate("a", exit=2),
            lambda: model.generate("a", exit=policy),
            lambda: model.generate("a", speculate=Speculation(2)),
            lambda: model.resolve_exit(2),
            lambda: engine.submit("a", exit=2),
            lambda: engine.warm_up(exits=(2,)),
        ):
            with pytest.raises(errors.UsageError, match="serves 1, 3"):
                ask()
    with pytest.raises(errors.UsageError, match=r"exit 7 is outside this model's 1\.\.4"):
        model.generate("a", exit=7)


def test_a_jump_that_does_not_belong_there_is_refused(options, checkpoint, jump, tmp_path):
    path, sha256 = tmp_path / "other.safetensors", checkpoint.sha256()
    beyond = replace(jump, exits=(3, 4))
    wide = random_blocks(checkpoint.spec.model_copy(update={"hidden_size": 32}), EXITS)
    for made, digest, message in (
        (jump, "0" * 64, "a shortcut of another model"),
        (beyond, sha256, "it serves exit 4, the model has 4 blocks"),
        (wide, sha256, "its hidden size is 32, the model's 64"),
    ):
        save(made, path, digest)
        with pytest.raises(errors.CheckpointError, match=message):
            plan(options(shortcut=path, rank=None))


def test_a_backend_that_runs_none_refuses_it():
    other: Any = SimpleNamespace(name="other")
    check_runs_jump(other, None)
    match = "the shortcut is a block jump, which the other backend doesn't run"
    with pytest.raises(errors.BackendError, match=match) as caught:
        check_runs_jump(other, EXITS)
    assert "another shortcut" in caught.value.hint


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt"])
def test_backends_for_a_gpu_run_it_on_stand_ins(built, model, tmp_path, monkeypatch, backend):
    """Its engines are verified as they are added; steps begin before the token before is known."""
    from stand_in import stand_in_gpu
    from stand_in.onnxruntime_cuda import make_onnxruntime

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    policy = ExitPolicy(exits=EXITS, measure="top", thresholds=(0.02, 0.01))
    ways = [{"exit": 1}, {"exit": 3}, {"exit": policy}, {"exit": "full"}, {"exit": 3}]
    ways += [{"speculate": Speculation(3, 2)}]
    prompt, most = list(range(5, 25)), {"max_new_tokens": 8, "ignore_eos": True}
    wanted = [model.generate([prompt], **way, **most).prompts[0] for way in ways]
    with stand_in_gpu() as driver:
        from ojfa_export.backends.onnxruntime_cuda import provider

        monkeypatch.setattr(provider, "ort", make_onnxruntime(driver))
        added = add_engines(bundle, backend, SILENT)
        assert added["checks"] > 10
        device = ojfa_export.load(bundle, backend=backend)
        with ojfa_export.Engine(device, max_sequences=3) as engine:
            running = [engine.submit(prompt, **way, **most) for way in ways]
            found = [each.result(60) for each in running]
        found += [device.generate([prompt], **way, **most).prompts[0] for way in ways]
        for each, other in zip(found, wanted * 2, strict=True):
            assert each.token_ids == other.token_ids
            assert each.exit_blocks == other.exit_blocks
        del device, engine, running


def test_engines_are_built_again(built, tmp_path):
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    shutil.rmtree(bundle / "engines" / "onnxruntime")
    fields = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    engines = fields["engines"].pop()["files"]
    fields["files"] = {k: each for k, each in fields["files"].items() if k not in engines.values()}
    write(bundle, fields)
    add_engines(bundle, "onnxruntime", SILENT)
    for file in engines.values():
        assert (bundle / file).read_bytes() == (built.bundle / file).read_bytes()


def write(bundle: Path, fields: dict[str, Any]) -> None:
    fields["digest"] = manifest_digest(fields)
    (bundle / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": [1, 4]}, "4 is none of 4 blocks"),
        ({"exits": [3, 1]}, "must rise"),
        ({"exits": [1, 2, 3]}, "one block, or one for each exit"),
        ({"exits": None}, "has exits and blocks"),
        ({"blocks": 1}, "names graphs other than those"),
        ({"kind": "ojfa"}, "has exits and blocks"),
        ({"residual": True}, "has exits and blocks alone"),
        ({"exits": [1, 2]}, "exit 3 is none of this bundle's"),
    ],
)
def test_a_manifest_that_lies_is_refused(built, tmp_path, changes, message):
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    fields = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    fields["shortcut"] = {k: v for k, v in (fields["shortcut"] | changes).items() if v is not None}
    fields["golden"][0]["exit"] = 3
    write(bundle, fields)
    with pytest.raises(errors.BundleError, match=message):
        ojfa_export.load(bundle)


def test_verification_names_a_block_that_is_another(built, tmp_path, rng):
    """Weights written anew, with right digests: the engines run them, the file differs."""
    bundle = shutil.copytree(built.bundle, tmp_path / "b.ojfa")
    path = bundle / GRAPHS / "exit_block_01.bin"
    numbers = np.fromfile(path, np.float32)
    numbers[rng.integers(len(numbers) // 2, len(numbers), size=50)] += 0.5
    path.write_bytes(numbers.tobytes())
    fields = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    fields["files"][f"{GRAPHS}/exit_block_01.bin"]["sha256"] = sha256_file(path)
    write(bundle, fields)
    checks = verify_bundle(bundle, None, "onnxruntime", SILENT)
    wrong = [each.name for each in checks if not each.passed]
    assert "shortcut file exit_block_01 at exit 3: hidden" in wrong
    assert not any("exit 1" in name or "float64" in name for name in wrong)


def test_quantised_weights_leave_the_blocks_behind_exits_as_they_are(options, jump, jump_file):
    result = build(options(shortcut=jump_file, rank=None, weights="int8", skip_verification=False))
    assert all(check.passed for check in result.report.checks)
    size = (result.bundle / GRAPHS / "exit_block_01.bin").stat().st_size
    assert size >= 4 * sum(each[1].size for each in jump.weights.values())
    model = ojfa_export.load(result.bundle)
    assert len(model.generate([1, 2], exit=3, max_new_tokens=4).prompts[0].token_ids) <= 4


def test_sixteen_bits_and_one_block_for_all(options, checkpoint, tmp_path):
    path = tmp_path / "one.safetensors"
    save(random_blocks(checkpoint.spec, (1, 2, 3), seed=9), path, checkpoint.sha256())
    result = build(options(shortcut=path, rank=None, precision="fp16", skip_verification=False))
    assert all(check.passed for check in result.report.checks)
    assert "one block behind exits 1, 2, 3" in result.summary()
    names = [graph.name for graph in ojfa_export.load(result.bundle).manifest.graphs]
    assert names[-2:] == ["exit_block_00", "final_head"]


def test_graphs_alone(options, built, jump_file, tmp_path):
    made = options(output=tmp_path / "graphs", rank=None, shortcut=None)
    document = parts.export_only(made, [jump_file], SILENT)
    assert document["graphs"][-2:] == ["exit_block_00", "exit_block_01"]
    for name in ("exit_block_00.onnx", "exit_block_01.bin"):
        one = (tmp_path / "graphs" / name).read_bytes()
        assert one == (built.bundle / GRAPHS / name).read_bytes()
