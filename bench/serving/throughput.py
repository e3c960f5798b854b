"""What continuous batching gives: `python -m bench.serving.throughput BUNDLE --out serving.json`.

One client, a static batch and the engine on the same requests take turns; every figure is a ratio
of medians within the run. Processor time is that of the whole process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ojfa_export
from bench.serving.limits import least_over_prediction, most_over_one_client, pass_costs
from bench.serving.result import write_result
from ojfa_export.decoding.exits import Exit
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.engine.engine import Engine

TEXT = Path(__file__).parents[2] / "calibration" / "text" / "code.txt"
PROMPT, SLOTS, LONG_PROMPT = 32, 16, 900
SHORTEST, LONGEST = 4, 40


@dataclass(frozen=True)
class Taken:
    """What a run took.

    Attributes:
        tokens: Generated.
        seconds: By the wall's clock.
        processor_seconds: Of the process.
    """

    tokens: int
    seconds: float
    processor_seconds: float


@dataclass
class Runs:
    """Samples by name."""

    samples: dict[str, list[Taken]] = field(default_factory=dict)

    def add(self, name: str, run: Callable[[], int]) -> None:
        """Takes one."""
        wall, processor = time.perf_counter(), time.process_time()
        tokens = run()
        taken = Taken(tokens, time.perf_counter() - wall, time.process_time() - processor)
        self.samples.setdefault(name, []).append(taken)

    def rate(self, name: str) -> float:
        """Median tokens per second."""
        return statistics.median(each.tokens / each.seconds for each in self.samples[name])

    def processor(self, name: str) -> float:
        """Median processor seconds per token."""
        return statistics.median(
            each.processor_seconds / each.tokens for each in self.samples[name]
        )


class Bench:
    """The runs of a bundle.

    Args:
        bundle: Its directory.
        requests: How many come, of random lengths.
        prompt: Tokens of each prompt.
    """

    def __init__(self, bundle: Path, requests: int, prompt: int = PROMPT) -> None:
        self.model = ojfa_export.load(bundle)
        self.model.engines.load_blocks(self.model.blocks)
        ids = self.model.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:40_000]).ids
        rng = random.Random(0)
        starts = [rng.randrange(len(ids) - LONG_PROMPT) for _ in range(requests)]
        self.prompts = [ids[start : start + prompt] for start in starts]
        self.lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(requests)]
        self.long = ids[:LONG_PROMPT]

    def one_client(self) -> int:
        """Requests one after the other."""
        some = list(zip(self.prompts, self.lengths, strict=True))[:SLOTS]
        return sum(self._generate([prompt], length) for prompt, length in some)

    def static_batches(self) -> int:
        """Batches of 16 that begin and end together: each waits for its longest."""
        count = 0
        for at in range(0, len(self.prompts), SLOTS):
            some = slice(at, at + SLOTS)
            count += self._static(self.prompts[some], self.lengths[some])
        return count

    def continuous(self) -> int:
        """The same requests, all given to the engine at once."""
        with Engine(self.model, max_sequences=SLOTS, prefix_cache=False) as engine:
            requests = [
                engine.submit(prompt, max_new_tokens=length, ignore_eos=True)
                for prompt, length in zip(self.prompts, self.lengths, strict=True)
            ]
            return sum(len(request.result().token_ids) for request in requests)

    def at_exits(self, exits: Sequence[Exit], tokens: int = 64) -> int:
        """Twelve requests at once, at these exits in turn."""
        with Engine(self.model, max_sequences=12, prefix_cache=False) as engine:
            requests = [
                engine.submit(
                    prompt, exit=exits[index % len(exits)], max_new_tokens=tokens, ignore_eos=True
                )
                for index, prompt in enumerate(self.prompts[:12])
            ]
            return sum(len(request.result().token_ids) for request in requests)

    def between_tokens(self) -> dict[str, list[float]]:
        """Seconds between tokens of eight requests, while they are alone and with a long prompt."""
        gaps: dict[str, list[float]] = {"alone": [], "with_a_long_prompt": []}
        options = GenerationOptions(max_new_tokens=120, ignore_eos=True)
        with Engine(self.model, max_sequences=9, prefix_cache=False) as engine:
            for name, sample in gaps.items():
                requests = [engine.submit(prompt, options) for prompt in self.prompts[:8]]
                readers = [
                    threading.Thread(target=_read_gaps, args=(request, sample))
                    for request in requests
                ]
                for reader in readers:
                    reader.start()
                if name != "alone":
                    time.sleep(0.1)
                    engine.submit(self.long, max_new_tokens=1)
                for reader in readers:
                    reader.join()
        return gaps

    def _generate(self, prompts: list[list[int]], tokens: int) -> int:
        made = self.model.generate(
            prompts, exit="full", max_new_tokens=tokens, ignore_eos=True
        ).prompts
        return sum(len(each.token_ids) for each in made)

    def _static(self, prompts: list[list[int]], lengths: list[int]) -> int:
        self._generate(prompts, max(lengths))
        return sum(lengths)


def _read_gaps(request: ojfa_export.Request, sample: list[float]) -> None:
    before = None
    for _ in request:
        now = time.perf_counter()
        if before is not None:
            sample.append(now - before)
        before = now


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything, prints the bars and writes the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of each prompt")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    bench, runs = Bench(options.bundle, options.requests, options.prompt), Runs()
    blocks = bench.model.blocks
    depths: list[Exit] = [blocks // 2, 3 * blocks // 4, "full"]
    for _ in range(options.rounds):
        runs.add("one client", bench.one_client)
        runs.add("static batches of 16", bench.static_batches)
        runs.add("engine, 16 slots", bench.continuous)
        runs.add("engine, 12 at full depth", lambda: bench.at_exits(["full"]))
        runs.add("engine, 12 at three depths", lambda: bench.at_exits(depths))
    gaps = bench.between_tokens()
    figures = judge(runs, gaps, depths, blocks)
    costs = pass_costs(bench.model, 2 * options.prompt, options.prompt)
    exits = [blocks if depth == "full" else depth for depth in depths]
    figures |= {
        "what passes alone allow, over one client": most_over_one_client(
            costs, options.prompt, bench.lengths
        ),
        "what fewer rows in deep blocks alone take, three depths": least_over_prediction(
            costs, exits
        ),
    }
    write_result(
        options.out,
        bench.model,
        figures,
        {
            "samples": {
                name: [vars(each) for each in taken] for name, taken in runs.samples.items()
            },
            "seconds_between_tokens": gaps,
            "pass_processor_seconds": costs,
            "prompt_tokens": options.prompt,
        },
    )
    return 0


def judge(
    runs: Runs, gaps: dict[str, list[float]], depths: Sequence[Exit], blocks: int
) -> dict[str, float]:
    """The figures that have a bar."""
    run = sum(blocks if depth == "full" else depth for depth in depths) / (len(depths) * blocks)
    with_prompt = sorted(gaps["with_a_long_prompt"])
    p99 = with_prompt[int(0.99 * (len(with_prompt) - 1))]
    full, mixed = "engine, 12 at full depth", "engine, 12 at three depths"
    return {
        "engine over static batches of 16, tokens/s (at least 1)": runs.rate("engine, 16 slots")
        / runs.rate("static batches of 16"),
        "engine over one client, tokens/s (at least 6 on the demo)": runs.rate("engine, 16 slots")
        / runs.rate("one client"),
        "three depths over what they predict, processor time (at most 1.15)": runs.processor(mixed)
        / (run * runs.processor(full)),
        "p99 between tokens over their median, with a long prompt (at most 3)": p99
        / statistics.median(gaps["with_a_long_prompt"]),
        "the same without one": sorted(gaps["alone"])[int(0.99 * (len(gaps["alone"]) - 1))]
        / statistics.median(gaps["alone"]),
    }


if __name__ == "__main__":
    sys.exit(main())
