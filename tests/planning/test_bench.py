"""Latency measurement on a tiny model: that it measures what it says, not how fast it is."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import make_checkpoint

from bench.cpu.compiled import Compiled, compile_checkpoint
from bench.cpu.overhead import TimedEngines, measure_overhead
from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.errors import UsageError
from ojfa_export.planning import bench
from ojfa_export.system.progress import Silent

LENGTH = 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("compiled")
    make_checkpoint("llama-gqa", folder / "checkpoint", seed=1)
    return compile_checkpoint(folder / "checkpoint", folder, LENGTH)


class RecordingEngines(ChoosesOnHost):
    """Engines that note every block and head that is run, and on how many tokens."""

    def __init__(self, compiled: Compiled) -> None:
        self.engines = compiled.open()
        self.calls: list[tuple[int, int]] = []
        self.finals: list[bool] = []

    def __getattr__(self, name: str):
        return getattr(self.engines, name)

    def executor(self, slots: int, capacity: int):
        executor = self.engines.executor(slots, capacity)
        run = executor.run

        def recorded(blocks, hidden, *arguments, **named):
            self.calls += [(block, len(hidden)) for block in blocks]
            return run(blocks, hidden, *arguments, **named)

        executor.run = recorded
        return executor

    def logits(self, hidden, blocks_run: int):
        self.finals.append(blocks_run == self.spec.blocks)
        return self.engines.logits(hidden, blocks_run)


def test_each_exit_decodes_one_token_at_a_time_and_prefills_the_whole_prompt(compiled):
    engines = RecordingEngines(compiled)
    settings = bench.BenchSettings(prompt_length=10, warmup=0, iterations=bench.BURST, prefills=2)
    samples = bench.time_exits(compiled.spec, engines, [2, 4], settings, Silent())
    assert {exit: (len(s["decode"]), len(s["prefill"])) for exit, s in samples.items()} == {
        2: (bench.BURST, 2),
        4: (bench.BURST, 2),
    }
    steps = bench.BURST + 1
    # Two prompts at either exit, and one more that fills the cache for decoding.
    assert engines.calls.count((0, 10)) == 2 * 2 + 1
    assert engines.calls.count((3, 10)) == 2 + 1
    # No step has more than its own token to run: waiting tokens of shallow exits are rewound.
    assert {tokens for _, tokens in engines.calls} == {1, 10}
    assert engines.calls.count((1, 1)) == 2 * steps
    assert engines.calls.count((3, 1)) == steps
    assert sum(engines.finals) == 2 + 1 + steps


def test_warmup_is_not_counted(compiled):
    settings = bench.BenchSettings(prompt_length=4, warmup=9, iterations=5, prefills=1)
    engines = RecordingEngines(compiled)
    samples = bench.time_exits(compiled.spec, engines, [1], settings, Silent())
    assert len(samples[1]["decode"]) == 5
    assert len(samples[1]["prefill"]) == 1
    assert engines.calls.count((0, 4)) == 1 + 1 + 1


def test_summary_gives_median_percentile_and_rates(compiled):
    settings = bench.BenchSettings(prompt_length=100, warmup=0, iterations=5, prefills=3)
    samples = {"decode": [1.0, 2.0, 3.0, 4.0, 100.0], "prefill": [10.0, 20.0, 30.0]}
    latency = bench.summarise(compiled.spec, 2, samples, settings, 1, bandwidth=1e9)
    assert latency.decode_ms_median == 3.0
    assert latency.tokens_per_second == pytest.approx(1000 / 3)
    assert latency.prefill_ms_median == 20.0
    assert latency.prefill_tokens_per_second == pytest.approx(5000)
    assert latency.decode_ms_p95 == pytest.approx(np.percentile(samples["decode"], 95))
    assert latency.bandwidth_share == pytest.approx(latency.bytes_touched / 3e-3 / 1e9)


@pytest.mark.parametrize(
    ("prompt_length", "iterations"), [(0, 1), (LENGTH - bench.BURST, 1), (10, 0)]
)
def test_settings_that_measure_nothing_are_refused(prompt_length, iterations):
    settings = bench.BenchSettings(prompt_length, 0, iterations, 1)
    with pytest.raises(UsageError):
        bench._check(settings, LENGTH)


def test_result_is_json_with_samples_by_exit(compiled):
    import json

    settings = bench.BenchSettings(prompt_length=4, warmup=0, iterations=2, prefills=1)
    samples = bench.time_exits(compiled.spec, compiled.open(), [1, 4], settings, Silent())
    exits = [bench.summarise(compiled.spec, e, samples[e], settings, 1, 1e9) for e in (1, 4)]
    result = bench.BenchResult({"cpu": "x"}, settings, exits, samples)
    document = json.loads(json.dumps(result.to_json()))
    assert [latency["blocks"] for latency in document["exits"]] == [1, 4]
    assert len(document["samples_ms"]["4"]["decode"]) == 2


def test_overhead_leaves_out_what_onnx_runtime_takes(compiled, monkeypatch):
    """With a clock that moves only inside runs, nothing is left outside of them."""
    from bench.cpu import overhead

    now = 0.0

    def clock() -> float:
        return now

    class SlowSession:
        def __init__(self, session) -> None:
            self.session = session

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, *arguments):
            nonlocal now
            now += 1.0
            return self.session.run(*arguments)

        def run_with_iobinding(self, *arguments):
            nonlocal now
            now += 1.0
            return self.session.run_with_iobinding(*arguments)

    class SlowEngines(TimedEngines):
        def session(self, name):
            if name not in self._timed:
                slow = SlowSession(super(TimedEngines, self).session(name))
                self._timed[name] = overhead._TimedSession(slow, self.watch)
            return self._timed[name]

    monkeypatch.setattr(overhead.time, "perf_counter", clock)
    engines = SlowEngines(compiled.spec, compiled.weights, compiled.engines, compiled.rotary)
    result = measure_overhead(engines, prompt_length=4, iterations=3, warmup=1)
    assert now > 0
    assert set(result.samples_us) == {1, 2, 3, 4}
    assert all(samples == [0.0] * 3 for samples in result.samples_us.values())
    assert result.per_block_us == pytest.approx(0, abs=1e-6)
