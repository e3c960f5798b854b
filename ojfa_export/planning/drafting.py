"""What a draft layer costs and gives on this machine: rounds of drafts, and how many are taken."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.draft import DraftEngines
from ojfa_export.decoding.events import DraftChecked, Event
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import MAX_DRAFT, Speculation
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.turns import Clock, Step, Turns
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator
from ojfa_export.system.progress import Progress

# Drafts of the rounds that are timed, and rounds of each in a turn.
TIMED, STEPS = (1, 2, 4), 8
# For acceptance: prompts, tokens of text in each, rounds that follow it, drafts of a round. A share
# of so many rounds, of 0.6, has a standard error of 0.03.
PROMPTS, PROMPT_TOKENS, ROUNDS, DRAFTS = 16, 48, 20, 4


class LayerDrafting(BaseModel):
    """Drafting with the draft layer of a bundle, one sequence, greedy.

    A round of K drafts, the pass that checks them included, takes `round + K each`.

    Attributes:
        round: Milliseconds of a round, whatever it drafts.
        each: What each draft adds.
        acceptance: Shares of rounds whose first 1, 2, ... drafts are all taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: float
    each: float
    acceptance: tuple[float, ...]

    def tokens(self, drafts: int) -> float:
        """Tokens of a round with so many drafts: 1 + a_1 + ... + a_K (arXiv 2211.17192).

        Beyond the chains that were counted, each is taken as often after the last as that was.
        """
        shares = [1.0, *self.acceptance]
        ratio = shares[-1] / shares[-2] if shares[-2] else 0.0
        while len(shares) <= drafts:
            shares.append(shares[-1] * ratio)
        return float(sum(shares[: drafts + 1]))


def measure_layer(
    spec: ModelSpec,
    engines: Engines,
    drafts: DraftEngines,
    acceptance: Sequence[float],
    max_length: int,
    rounds: int,
    seconds: float,
    progress: Progress,
    clock: Clock = time.perf_counter,
) -> LayerDrafting:
    """Times rounds of drafts.

    Args:
        spec: The model.
        engines: Its engines.
        drafts: The draft layer.
        acceptance: As of `measure_acceptance`.
        max_length: Tokens that the cache may hold.
        rounds: Turns of each number of drafts.
        seconds: No new turn is begun after so many, but for the first three.
        progress: Shows turns.
        clock: As of `measure_costs`.
    """
    turns = Turns(spec, engines, max_length, MAX_DRAFT + 2, clock=clock, drafts=drafts)
    kinds = {count: [round_of(turns, 0, count)] * STEPS for count in TIMED}
    times = turns.time(kinds, rounds, seconds, "timing drafts", progress)
    each, start = np.polyfit(TIMED, [float(times[count].mean()) for count in TIMED], 1)
    return LayerDrafting(
        round=max(0.0, float(start)), each=max(0.0, float(each)), acceptance=tuple(acceptance)
    )


def round_of(turns: Turns, exit: int, drafts: int) -> Step:
    """A round of so many drafts at an exit, 0 for the draft layer, and the pass that checks."""
    speculation = Speculation(exit=exit, draft=drafts)
    generators = [np.random.default_rng(0)]
    speculator = Speculator(turns.session, speculation, Sampling(), generators, ahead=False)
    return lambda: speculator.step([[turns.token()]], [MAX_DRAFT + 1])


def measure_acceptance(
    spec: ModelSpec,
    engines: Engines,
    drafts: DraftEngines,
    prompts: Sequence[Sequence[int]],
    max_length: int,
    progress: Progress,
) -> tuple[float, ...]:
    """How many drafts of a round are taken, where the model goes on from prompts.

    Args:
        spec: The model.
        engines: Its engines.
        drafts: The draft layer.
        prompts: Token ids of each. What follows ends where the model ends the text.
        max_length: Tokens that the cache may hold: prompts are cut to leave room for a round.
        progress: Shows rounds.

    Returns:
        Shares of rounds whose first 1, 2, ... drafts are all taken; none where there was no room.
    """
    taken: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, DraftChecked) and event.drafted == DRAFTS:
            taken.append(event.accepted)

    speculation = Speculation(exit=0, draft=DRAFTS)
    longest = min(max_length, spec.rotary_switch or max_length)
    with progress.task("counting drafts", len(prompts) * ROUNDS, "rounds") as task:
        for prompt in prompts:
            pending = list(prompt[: max(1, longest - 4 * (DRAFTS + 1))])
            length = min(longest, len(pending) + (ROUNDS + 1) * (DRAFTS + 1))
            session = Session(spec, engines, 1, length, drafts=drafts)
            session.on_event = note
            speculator = Speculator(
                session, speculation, Sampling(), [np.random.default_rng(0)], spec.eos_token_ids
            )
            for turn in range(ROUNDS + 1):  # the first drafts nothing
                if session.lengths[0] + len(pending) + DRAFTS <= length:
                    [chosen] = speculator.step([pending], [DRAFTS + 1])
                    pending = [chosen[-1].id]
                    if any(each.id in spec.eos_token_ids for each in chosen):
                        task.advance(ROUNDS - max(0, turn - 1))
                        break
                if turn:
                    task.advance()
    counts = np.array(taken)
    return tuple(float((counts >= j).mean()) for j in range(1, DRAFTS + 1)) if taken else ()
