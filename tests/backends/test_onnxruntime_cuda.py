"""The onnxruntime-cuda backend without a GPU: its graphs on the CPU provider, its device the CPU.

All of it but the operators' CUDA kernels: graphs, plans, memory, recordings, every policy.
tests/gpu has the same comparisons on a GPU.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from chain import Chain, Kind, build_chain
from tiny_models import VARIANTS, VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_FP16_RELATIVE, LOGITS_FP32

from ojfa_export import backends
from ojfa_export.backends.frugal import FrugalEngines
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import block_name
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import BackendError, BundleError
from ojfa_export.runtime.decoding import StepByStep
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.shadow import Shadow
from ojfa_export.runtime.speculator import Speculator
from ojfa_export.system.progress import SILENT

NAME = "onnxruntime-cuda"
LENGTH, EXIT = 44, 2
FP16 = [
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "phi3-sliding-window",
    "stablelm",
    "qwen3",
    "smollm3-sliding-window",
    "olmo2",
]


@pytest.fixture
def driver(monkeypatch):
    """A device in host memory, and the CPU provider where the CUDA provider would be."""
    from stand_in import stand_in_gpu
    from stand_in.onnxruntime_cuda import make_onnxruntime

    with stand_in_gpu() as stand_in:
        from ojfa_export.backends.onnxruntime_cuda import provider

        monkeypatch.setattr(provider, "ort", make_onnxruntime(stand_in))
        yield stand_in


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory):
    """Exported tiny models, each made once."""
    made: dict[tuple[str, str, Kind], Chain] = {}

    def make(name: str, precision: str = "fp32", kind: Kind = "narrow") -> Chain:
        key = name, precision, kind
        if key not in made:
            directory = tmp_path_factory.mktemp(name)
            checkpoint = make_checkpoint(name, directory / "checkpoint", seed=7)
            made[key] = build_chain(
                checkpoint,
                directory,
                precision=precision,
                max_length=2 * LENGTH,
                kind=kind,
            )
        return made[key]

    return make


@dataclass
class Both:
    """A model on the CPU backend and on this one."""

    chain: Chain
    engines: object

    def sessions(self, batch: int = 1, shadow: Shadow | None = None) -> tuple[Session, Session]:
        spec = self.chain.spec
        return self.chain.session(batch), Session(spec, self.engines, batch, 2 * LENGTH, shadow)

    def assert_close(self, actual, expected):
        expected = np.asarray(expected)
        tolerance = LOGITS_FP32
        if self.chain.precision == "fp16":
            tolerance = LOGITS_FP16_RELATIVE * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


@pytest.fixture
def both_of(driver, chain_of, tmp_path):
    backend = backends.load(NAME)

    def make(name: str, precision: str = "fp32", kind: Kind = "narrow") -> Both:
        chain = chain_of(name, precision, kind)
        return Both(chain, chain.open_on(backend, tmp_path))

    return make


@pytest.fixture
def token_ids(rng):
    return rng.integers(0, VOCAB_SIZE, (2, LENGTH)).tolist()


def compare(both: Both, token_ids: list[list[int]]) -> None:
    """A prompt at an exit and to full depth, then steps at exits, catching up and rewinding."""
    here, there = both.sessions(2)
    prompts = [token_ids[0][:20], token_ids[1][:17]]
    for run in (
        lambda session: session.advance(prompts, EXIT, every_position=True),
        lambda session: session.deepen("full", every_position=True),
    ):
        for expected, actual in zip(run(here), run(there), strict=True):
            both.assert_close(actual, expected)
    for step in range(20, LENGTH):
        depth = ("full", EXIT, 1, "full")[step % 4]
        new = [[token_ids[0][step]], [token_ids[1][step]] if step % 3 else []]
        both.assert_close(there.advance(new, depth), here.advance(new, depth))
        if step == 30:
            for session in (here, there):
                session.rewind(25, 0)
                session.rewind(9, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_in_fp32(both_of, token_ids, name):
    compare(both_of(name), token_ids)


@pytest.mark.parametrize("name", FP16)
def test_models_in_fp16(both_of, token_ids, name):
    compare(both_of(name, "fp16"), token_ids)


@pytest.mark.parametrize("kind", ["residual", "mlp"])
@pytest.mark.parametrize(("name", "precision"), [("llama-gqa", "fp32"), ("gpt2", "fp16")])
def test_exit_heads_that_know_the_exit(both_of, token_ids, name, precision, kind):
    """The head finds each exit's gate, or its scale and bias."""
    both = both_of(name, precision, kind)
    here, there = both.sessions()
    for exit in range(1, both.chain.spec.blocks):
        new = token_ids[0][4 * exit : 4 * exit + 4]
        both.assert_close(there.advance(new, exit), here.advance(new, exit))
        both.assert_close(there.advance([1], exit), here.advance([1], exit))


@pytest.mark.parametrize(("name", "precision"), [("llama-gqa", "fp32"), ("gpt2", "fp16")])
def test_blocks_behind_exits(both_of, token_ids, name, precision):
    """Prompts, steps and rewinding, with exits asked in any order; half of them for the first time
    of tokens that have run past them.
    """
    both = both_of(name, precision, "block")
    here, there = both.sessions(2)
    first, *_, last = both.chain.shortcut.exits
    for number, exit in enumerate(("full", first, last, "full", first, first, last)):
        start = 5 * number
        new = [ids[start : start + (5 if number < 3 else 1 + number % 2)] for ids in token_ids]
        for one, other in zip(
            here.advance(new, exit, every_position=True),
            there.advance(new, exit, every_position=True),
            strict=True,
        ):
            both.assert_close(other, one)
        if number == 4:
            for session in (here, there):
                session.rewind(9, 1)
    policy = ExitPolicy(exits=(first, last), measure="top", thresholds=(0.02, 0.03))
    expected, actual = here.decide([[1], [2]], policy), there.decide([[1], [2]], policy)
    assert actual.blocks_run.tolist() == expected.blocks_run.tolist()
    both.assert_close(actual.logits, expected.logits)


def test_exits_per_token_speculation_and_shadow_checks(both_of, token_ids):
    both = both_of("llama-gqa")
    here, there = both.sessions(2, Shadow(0.5, np.random.default_rng(3)))
    policy = ExitPolicy(exits=(1, EXIT), measure="top", thresholds=(0.02, 0.03))
    pending = [ids[:9] for ids in token_ids]
    for _ in range(12):
        expected, actual = here.decide(pending, policy), there.decide(pending, policy)
        assert actual.blocks_run.tolist() == expected.blocks_run.tolist()
        both.assert_close(actual.logits, expected.logits)
        pending = [[int(row.argmax())] for row in expected.logits]
    checks = there.run_shadow_checks()
    full, _ = both.sessions(2)
    for row in range(2):
        every = full.advance([there.tokens(row) if r == row else [] for r in range(2)],
                             every_position=True)[row]  # fmt: skip
        for check in (each for each in checks if each.row == row):
            exit_choice = np.array(here.tokens(row) + pending[row])[check.position + 1]
            assert check.agrees == (every[check.position].argmax() == exit_choice)
    assert checks
    drafted = [
        Speculator(session, Speculation(exit=EXIT, draft=3), Sampling(), [np.random.default_rng(0)])
        for session in both.sessions()
    ]
    ids = [token_ids[0][:5]] * 2
    for _ in range(6):
        chosen = [each.step([ids[i]], [9])[0] for i, each in enumerate(drafted)]
        assert chosen[0] == chosen[1]
        ids = [[each[-1].id] for each in chosen]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 20, 0.9, seed=2)])
def test_steps_begun_ahead_change_nothing(both_of, driver, rng, name, sampling):
    """The device goes on from tokens that the host hasn't seen; now and then others are wanted."""
    sessions = both_of(name).sessions(2)
    policy = ExitPolicy(exits=(1, EXIT), measure="top", thresholds=(0.02, 0.03))
    for exit in (EXIT, policy):
        decoders = [
            StepByStep(each, exit, sampling, [sampling.generator(row) for row in range(2)])
            for each in sessions
        ]
        driver.launched.clear()
        pending = [[1, 5, 6], [2, 6]]
        for step in range(14):
            expected, chosen = (each.step(pending, [14 - step] * 2) for each in decoders)
            assert chosen == expected
            pending = [[token.id for token in tokens] for tokens in expected]
            if step % 5 == 3:
                pending[int(rng.integers(2))] = [7]
        for each in decoders:
            each.end()
        # Run once and recorded once: from then on they are replayed.
        assert driver.launched.count("embed") >= 2
        assert driver.launched.count("graph") > 5
        assert sessions[0].tokens() == sessions[1].tokens()


def test_a_step_that_was_interrupted_can_be_taken_again(both_of, driver, rng, monkeypatch):
    here, there = both_of("llama-gqa").sessions()
    launch, failed = driver.cuGraphLaunch, []

    def failing(*arguments):
        if rng.random() < 0.2:
            failed.append(1)
            raise KeyboardInterrupt
        return launch(*arguments)

    monkeypatch.setattr(driver, "cuGraphLaunch", failing)
    pending, greedy = [[1, 5, 6]], Sampling()
    for _ in range(8):
        steps = [StepByStep(each, EXIT, greedy, [greedy.generator(0)]) for each in (here, there)]
        for _ in range(3):
            length = here.lengths[0]
            expected = steps[0].step(pending, [9])
            for _ in range(50):
                try:
                    chosen = steps[1].step(pending, [9])
                    break
                except KeyboardInterrupt:
                    steps[1] = StepByStep(there, EXIT, greedy, [greedy.generator(0)])
                    there.rewind(length)
            assert chosen == expected
            pending = [[expected[0][0].id]]
        for each in steps:
            each.end()
    assert failed


def test_blocks_and_heads_close_and_open_again(both_of, token_ids):
    both = both_of("gpt2")
    here, there = both.chain.session(), Session(
        both.chain.spec, FrugalEngines(both.engines), 1, 2 * LENGTH
    )  # fmt: skip
    for start in range(0, 12, 3):
        new = token_ids[0][start : start + 3]
        both.assert_close(there.advance(new), here.advance(new))
        both.assert_close(there.advance([2]), here.advance([2]))


def test_weights_are_on_the_device_once(driver, both_of):
    """A tied head is the embedding; steps and sessions add none."""
    both = both_of("gpt2")
    both.engines.load_blocks(both.chain.spec.blocks)
    embedding = both.engines.weights("embed")["token_embedding"].pointer
    assert both.engines.weights("final_head")["head"].pointer == embedding
    stored = sum(path.stat().st_size for path in both.chain.graphs.glob("block_*.bin"))
    driver.progress()
    before = driver.used
    both.engines.load_blocks(both.chain.spec.blocks)
    driver.progress()
    assert driver.used == before >= stored


def test_equal_blocks_are_one_session(both_of):
    both = both_of("llama-gqa")
    both.engines.load_blocks(both.chain.spec.blocks)
    assert len(both.engines._sessions) == 2  # the embedding, and all blocks
    scaled = both_of("gpt2-inverse-layer-scale")
    scaled.engines.load_blocks(scaled.chain.spec.blocks)
    assert len(scaled.engines._sessions) == 1 + scaled.chain.spec.blocks


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_hold_no_weights_and_use_fused_operators(both_of, tmp_path, precision):
    both_of("llama-gqa", precision)
    model = onnx.load(tmp_path / f"{block_name(0)}.onnx")
    matrices = [each for each in model.graph.initializer if len(each.dims) > 1]
    assert {each.data_type for each in matrices} <= {onnx.TensorProto.INT32}
    kinds = [node.op_type for node in model.graph.node]
    if precision == "fp16":
        assert kinds.count("GroupQueryAttention") == 1
        # Norms to fp16, and what the block adds to the hidden states to fp32.
        assert kinds.count("Cast") == 4
    else:
        assert kinds.count("SkipSimplifiedLayerNormalization") == 1
        assert kinds.count("ScatterElements") == kinds.count("RotaryEmbedding") == 2
        assert kinds.count("Split") == 1  # gate and up, which are equally wide
        assert "ScatterND" not in kinds


def test_plans_that_name_files_elsewhere(both_of, tmp_path):
    both_of("llama-gqa")
    from ojfa_export.backends.onnxruntime_cuda.plan import read_plan

    plan = tmp_path / f"{block_name(0)}.json"
    plan.write_text(plan.read_text().replace('"graph": "', '"graph": "../'))
    with pytest.raises(BundleError, match="names a file elsewhere"):
        read_plan(plan)
    plan.write_text("{}")
    with pytest.raises(BundleError, match="can't be read"):
        read_plan(plan)


def test_head_size_that_fused_attention_does_not_take(both_of, tmp_path):
    chain = both_of("llama-gqa", "fp16").chain
    odd = chain.spec.model_copy(update={"head_dim": 12, "rotary_dim": 12})
    with pytest.raises(BackendError, match=r"head size 12 .* multiples of 16"):
        backends.load(NAME).build_engine(
            odd, chain.graphs / f"{block_name(0)}.onnx", tmp_path / "odd.json"
        )


def test_onnxruntime_without_cuda(driver, monkeypatch):
    from ojfa_export.backends.onnxruntime_cuda import provider

    monkeypatch.setattr(provider, "ort", ort)
    with pytest.raises(BackendError, match="has no CUDA provider") as raised:
        backends.load(NAME).check({})
    assert "onnxruntime-gpu" in raised.value.hint


def test_a_run_that_fails(both_of, monkeypatch):
    both = both_of("llama-gqa")
    session = both.sessions()[1]
    session.advance([1, 2, 3])

    def fail(self, *_):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 99\nand more")

    monkeypatch.setattr(type(both.engines._sessions["block_00.onnx"]), "run_with_iobinding", fail)
    with pytest.raises(BackendError, match=r"can't run 'block_00': Failed to allocate .* 99$"):
        session.advance([1, 2])


def test_a_provider_that_does_not_load(driver, both_of, monkeypatch):
    """ONNX Runtime then goes on with the CPU by itself; this backend doesn't."""
    from ojfa_export.backends.onnxruntime_cuda import provider

    monkeypatch.setattr(provider.ort.InferenceSession, "get_providers", lambda self: ["CPU"])
    both = both_of("llama-gqa")
    with pytest.raises(BackendError, match="doesn't load") as raised:
        both.engines.load_blocks(1)
    assert "--no-deps onnxruntime-gpu" in raised.value.hint


def test_engines_are_added_to_a_bundle_and_run(driver, tiny_bundle, tmp_path):
    """Built from the graphs alone, recorded with what they were built with; the same tokens."""
    bundle = tmp_path / "copy.ojfa"
    shutil.copytree(tiny_bundle, bundle)
    add_engines(bundle, NAME, SILENT)
    opened = Bundle(bundle)
    built_with = opened.engines(NAME).built_with
    assert built_with["onnxruntime"] == ort.__version__
    assert (built_with["provider"], built_with["gpu"]) == ("CUDA", "Stand-in GPU")
    here, there = Model(opened), Model(opened, NAME)
    prompts = ["def main(", "import "]
    for options in ({"exit": "full"}, {"exit": 2}, {"speculate": True}):
        expected, actual = (each.generate(prompts, **options) for each in (here, there))
        assert [p.text for p in actual.prompts] == [p.text for p in expected.prompts]


@pytest.mark.slow
def test_a_bundle_is_built_and_verified_on_this_backend(
    driver, tiny_checkpoint, calibration_text, tmp_path
):
    """Calibration runs its engines, and every one of them is compared with transformers."""
    options = BuildOptions(
        str(tiny_checkpoint),
        tmp_path / "built.ojfa",
        backend=NAME,
        rank=8,
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=64,
    )
    bundle = build(options).bundle
    assert Bundle(bundle).engines(NAME).built_with["provider"] == "CUDA"
    report = json.loads((bundle / "report" / "report.json").read_text())
    engines = [each for each in report["checks"] if "engine" in each["name"]]
    assert engines
    assert all(each["passed"] for each in report["checks"])
