"""What a token costs beside its kernels: the host's part, and exits' checks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.gpu.clock import replay_time
from ojfa_export.backends.backend import Engines
from ojfa_export.decoding.exits import Exit
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.decoding import StepByStep
from ojfa_export.runtime.session import Session

if TYPE_CHECKING:
    from ojfa_export.backends.tensorrt.engines import TensorRtEngines

WARMUP = 4
# Of a setting, with the others in between: what stalls the machine for a while decides no figure.
ROUNDS = 3
GREEDY, DRAWN = Sampling(), Sampling(0.8, top_k=50, top_p=0.9)
NEVER, ALWAYS = 2.0, -1.0  # thresholds of the largest probability


def decoding(
    session: Session,
    exit: Exit | ExitPolicy,
    past: int,
    tokens: int,
    sampling: Sampling = GREEDY,
) -> list[float]:
    """Milliseconds of each token as text is generated: from one token on the host to the next."""
    generators = [sampling.generator(row) for row in range(session.batch_size)]
    decoder = StepByStep(session, exit, sampling, generators)
    pending = [[1]] * session.batch_size
    samples = []
    for step in range(WARMUP + tokens):
        start = time.perf_counter()
        chosen = decoder.step(pending, [WARMUP + tokens - step + 1] * session.batch_size)
        pending = [[token.id for token in each] for each in chosen]
        if step >= WARMUP:
            samples.append((time.perf_counter() - start) * 1e3)
    decoder.end()
    for row in range(session.batch_size):
        session.rewind(past, row)
    return samples


def prefill(engines: Engines, spec: ModelSpec, tokens: int, prompts: int = 1) -> dict[str, Any]:
    """Milliseconds of some prompts together, to the logits of their last tokens."""
    session = Session(spec, engines, prompts, tokens)
    ids = np.random.default_rng(2).integers(0, spec.vocab_size, (prompts, tokens)).tolist()
    samples = []
    for _ in range(6):
        start = time.perf_counter()
        session.advance(ids)
        samples.append((time.perf_counter() - start) * 1e3)
        for row in range(prompts):
            session.rewind(0, row)
    print(f"prefill of {prompts} x {tokens}: {np.median(samples[1:]):.1f} ms", flush=True)
    return {
        "prompts": prompts,
        "tokens": tokens,
        "ms_median": float(np.median(samples[1:])),
        "samples_ms": samples,
    }


def host_work(session: Session, engines: TensorRtEngines, past: int, tokens: int) -> list[Any]:
    """Microseconds that a token takes longer than its recording, at a few exits, batch 1.

    Of text that is generated, where the device begins with a token before the host has seen the one
    before it; of one step alone, as a service that looks at every token has it; and of one step
    with its logits.
    """
    blocks = session.spec.blocks
    rows = []
    for exit in sorted({1, blocks // 2, blocks - 1, blocks}):
        row: dict[str, Any] = {"blocks": exit, "past": past}

        def step(exit: int = exit) -> None:
            session.choose([1], exit)

        def logits(exit: int = exit) -> None:
            session.advance([1], exit)

        ways: dict[str, Callable[[], list[float]]] = {
            "step": partial(_each, session, step, past, tokens),
            "logits": partial(_each, session, logits, past, tokens),
            "sampling": partial(decoding, session, exit, past, tokens, DRAWN),
            "generating": partial(decoding, session, exit, past, tokens),
        }
        for name, run in ways.items():
            samples = run()
            device = _newest_time(engines)
            row[name] = {
                "device_us": round(device, 2),
                "host_us": round(float(np.median(samples)) * 1e3 - device, 2),
                "samples_ms": [round(sample, 4) for sample in samples],
            }
        rows.append(row)
        said = ", ".join(f"{name} {row[name]['host_us']:.0f}" for name in list(row)[2:])
        print(f"host's part at exit {exit}, us: {said}", flush=True)
    return rows


def checks(session: Session, past: int, tokens: int) -> list[Any]:
    """Milliseconds of tokens with a check after every block, and of the same depth without."""
    blocks = session.spec.blocks
    rows = []
    for depth in sorted({blocks // 4, blocks // 2, blocks - 1, blocks}):
        exits = range(1, min(depth, blocks - 1) + 1)
        last = ALWAYS if depth < blocks else NEVER
        policy = ExitPolicy(
            exits=tuple(exits), measure="top", thresholds=(*[NEVER] * (len(exits) - 1), last)
        )
        # In turns, so that the clock's drift hits both.
        plain, checked = [], []
        for _ in range(3):
            plain += decoding(session, depth, past, tokens)
            checked += decoding(session, policy, past, tokens)
        share = float(np.median(checked) / np.median(plain)) - 1
        rows.append(
            {
                "blocks": depth,
                "checks": len(exits),
                "past": past,
                "plain_ms_median": float(np.median(plain)),
                "checked_ms_median": float(np.median(checked)),
                "share": share,
                "plain_ms": [round(sample, 4) for sample in plain],
                "checked_ms": [round(sample, 4) for sample in checked],
            }
        )
        print(f"{len(exits)} checks in {depth} blocks: {share:+.1%}", flush=True)
    return rows


def _each(session: Session, step: Callable[[], None], past: int, tokens: int) -> list[float]:
    samples = []
    for turn in range(WARMUP + tokens):
        start = time.perf_counter()
        step()
        if turn >= WARMUP:
            samples.append((time.perf_counter() - start) * 1e3)
    session.rewind(past)
    return samples


def _newest_time(engines: TensorRtEngines) -> float:
    """Microseconds of the recording that was launched last."""
    graph = engines.device.recorder.newest
    assert graph is not None
    engines.device.synchronize()
    taken = replay_time(engines.device, graph)
    engines.mailbox.reset()  # the replayed answers are nobody's
    return taken
