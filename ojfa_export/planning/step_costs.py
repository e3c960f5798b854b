"""What a step costs on this machine: its blocks, heads, checks, and tokens that catch up."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.checks import checking
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.exits import nearest_exit
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.drafting import LayerDrafting
from ojfa_export.planning.traffic import block_bytes
from ojfa_export.planning.turns import PAST, Clock, Step, Turns
from ojfa_export.promises.measures import MEASURES
from ojfa_export.promises.outcomes import Costs
from ojfa_export.system.progress import Progress

# Tokens that a block runs at once where some waited.
AT_ONCE = (2, 3, 5, 9)
# Of each kind, in a turn.
STEPS = 8
# Of those that ask every exit, which are many checks each.
ASKING_STEPS = 2
# Exits whose steps are timed; those between two of them lie on a line.
MOST_EXITS = 16

Float64 = NDArray[np.float64]
Kind = tuple[str, Hashable]
Times = Mapping[Kind, float]


class StepCosts(BaseModel):
    """Milliseconds of steps of one sequence.

    A step at an exit is timed where steps at that exit follow each other, as they do in generated
    text: where engines begin a step before the token before it is known, so they do here. That is
    right for any mixture of exits too, as far as caches forget what was used longest ago: what a
    block costs depends on how many blocks ran since it ran last, and over a whole text the sum of
    these costs is that of the exits, each by itself.

    Attributes:
        exits: [L] a step at each exit: embedding, blocks, head, choice of the token. Of exits that
            there are not, what lies between those.
        exit_head: The exit head on one row; where blocks stand behind exits, such a block as well.
        final_head: The model's own head on one row.
        final_row: What another row adds to that.
        decide: What a policy adds to a step, whatever it asks.
        checks: Asking one exit that doesn't stop, by the measure of confidence.
        leaving: What a token that stops at an exit takes beside its check: the exit head, where a
            check head was asked before it, without a block that stands before both.
        catch_up: What a block costs more when it runs any tokens that waited.
        waiting: What each of them adds to that.
        late_pass: What a pass costs more than those two say, timed at half depth, where tokens
            waited before the last block alone.
        drafting: Of the draft layer, if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exits: tuple[float, ...]
    exit_head: float
    final_head: float
    final_row: float
    decide: float
    checks: dict[Measure, float]
    catch_up: float
    waiting: float
    late_pass: float = 0.0
    leaving: float = 0.0
    drafting: LayerDrafting | None = None

    @classmethod
    def of_steps(cls, exits: tuple[float, ...]) -> StepCosts:
        """Steps at each exit, [L], and all else for nothing: no way costs less than by these."""
        return cls(
            exits=exits, exit_head=0.0, final_head=0.0, final_row=0.0, decide=0.0,
            checks=dict.fromkeys(MEASURES, 0.0), catch_up=0.0, waiting=0.0,
        )  # fmt: skip

    @property
    def full(self) -> float:
        """A step of full depth."""
        return self.exits[-1]

    def catching_up(self, blocks: int, waited: int) -> float:
        """What a pass of full depth costs more if tokens waited before its last blocks.

        Between one block and half of them, where it was timed, what a pass costs whatever it runs
        is taken to fade from `late_pass` to nothing.

        Args:
            blocks: How many blocks run the tokens that waited.
            waited: How many tokens did.
        """
        half = len(self.exits) - len(self.exits) // 2
        fading = max(0.0, 1 - (blocks - 1) / max(half - 1, 1))
        return blocks * (self.catch_up + self.waiting * waited) + self.late_pass * fading

    def of_policies(self) -> Costs:
        """Costs of a token whose depth is decided."""
        heads = [*[self.exit_head] * (len(self.exits) - 1), self.final_head]
        depths = [ms - head + self.decide for ms, head in zip(self.exits, heads, strict=True)]
        return Costs(
            tuple(depths), self.checks, self.final_head, catch_up=self.catch_up,
            waiting=self.waiting, leaving=self.leaving,
        )  # fmt: skip


def measure_costs(
    spec: ModelSpec,
    engines: Engines,
    max_length: int,
    *,
    rounds: int,
    seconds: float,
    progress: Progress,
    most_bytes: float = float("inf"),
    clock: Clock = time.perf_counter,
) -> StepCosts:
    """Times steps of every kind, the kinds taking turns.

    Args:
        spec: The model.
        engines: Its engines.
        max_length: Tokens that the cache may hold.
        rounds: Turns of each kind.
        seconds: No new round is begun after so many, but for the first three.
        progress: Shows rounds.
        most_bytes: Of weights in fp32 to load: of a larger model, the first blocks are timed, two
            at least, and the others taken to cost as much.
        clock: Seconds; another than the wall's where the machine is shared.
    """
    depth = int(min(spec.blocks, max(2.0, most_bytes / block_bytes(spec))))
    served = _served(engines)
    if served is not None and depth < spec.blocks:  # the second exit that there is, or a later one
        depth = max((exit for exit in served if exit <= depth), default=served[0])
        depth = max(depth, served[min(1, len(served) - 1)])
    steps = _Steps(spec, engines, depth, max_length, clock)
    steps.time(rounds, seconds, progress)
    return steps.costs()


def measure_exits(
    spec: ModelSpec,
    engines: Engines,
    max_length: int,
    *,
    rounds: int,
    seconds: float,
    progress: Progress,
    clock: Clock = time.perf_counter,
) -> tuple[float, ...]:
    """Times steps at each exit alone, [L] milliseconds: the least of what `measure_costs` times.

    Args:
        spec: The model.
        engines: Its engines.
        max_length: As of `measure_costs`, and so the others.
        rounds: Turns of each exit.
        seconds: No new round is begun after so many, but for the first three.
        progress: Shows rounds.
        clock: Seconds.
    """
    steps = _Steps(spec, engines, spec.blocks, max_length, clock)
    steps.time(rounds, seconds, progress, only_exits=True)
    return tuple(steps.exits().tolist())


class _Steps:
    """Every kind of step, and what a step of it took (milliseconds)."""

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        depth: int,
        max_length: int,
        clock: Clock,
    ) -> None:
        served = _served(engines)
        self._spec, self._engines, self._depth = spec, engines, depth
        max_length = min(max_length, spec.rotary_switch or max_length)
        self._sizes = [size for size in AT_ONCE if size <= max_length]
        room = max([1, *self._sizes])
        self._turns = Turns(spec, engines, max_length, room, depth, clock)
        there = [exit for exit in served or range(1, spec.blocks) if exit <= depth]
        self._exits = _spread(sorted({*there, depth}), MOST_EXITS)
        # The last check of a policy always stops, so that no block beyond `depth` is needed.
        self._asked = there
        self._shallow = nearest_exit(depth // 2, served)
        # Where the last block isn't the one after half depth, and the cache has room.
        late = depth - 1 > self._shallow and depth - 1 in there
        self._late = self._sizes[:1] if late else []
        self._typical: dict[Kind, float] = {}

    def time(
        self, rounds: int, seconds: float, progress: Progress, *, only_exits: bool = False
    ) -> None:
        """Times all kinds in turns, or steps at exits alone."""
        kinds = dict(self._at_exits() if only_exits else self._make_kinds())
        times = self._turns.time(kinds, rounds, seconds, "timing blocks and heads", progress)
        self._typical = {
            kind: float(each.sum()) / (ASKING_STEPS if kind[0] == "every" else STEPS)
            for kind, each in times.items()
        }

    def _at_exits(self) -> list[tuple[Kind, list[Step]]]:
        """Steps at exits, STEPS of each."""
        steps = self._turns.steps
        return [(("exit", exit), steps([exit] * STEPS)) for exit in self._exits.tolist()]

    def _make_kinds(self) -> list[tuple[Kind, list[Step]]]:
        """Every kind's steps: STEPS, or what does as much at once; ASKING_STEPS of "every"."""
        turns = self._turns
        shallow, depth = self._shallow, self._depth
        rows = np.random.default_rng(0).normal(size=(AT_ONCE[-1], self._spec.hidden_size))
        hidden = rows.astype(np.float32)

        def asking(exits: Sequence[int], measure: Measure, count: int) -> list[Step]:
            never_but_last = (*[2.0] * (len(exits) - 1), -1e9)
            policy = ExitPolicy(exits=tuple(exits), measure=measure, thresholds=never_but_last)
            return turns.steps([policy] * count)

        def catching_up(size: int, exit: int = shallow) -> list[Step]:
            return [turns.in_a_row([*[exit] * (size - 1), depth])] * STEPS

        behind = self._engines.exit_blocks
        past = min(PAST, self._turns.session.max_length - 1)
        executor = None if behind is None else behind.executor(1, past + 1)

        def behind_exit() -> object:
            assert executor is not None
            exit, chunk = self._asked[0], Chunk(0, past, 1)
            y = executor.run(exit, hidden[:1], [chunk], long_context=False)
            return self._engines.choose(y, exit, HeadRequest()).tokens()

        def head(count: int, blocks_run: int) -> list[Step]:
            def run() -> object:
                return self._engines.choose(hidden[:count], blocks_run, HeadRequest()).tokens()

            return [run] * STEPS

        return [
            *self._at_exits(),
            *((("every", m), asking(self._asked, m, ASKING_STEPS)) for m in MEASURES),
            (("ask", "one"), asking(self._asked[-1:], "top", STEPS)),
            *((("at once", size), catching_up(size)) for size in self._sizes),
            *((("late", size), catching_up(size, depth - 1)) for size in self._late),
            (("head", "exit"), head(1, 1) if executor is None else [behind_exit] * STEPS),
            (("head", "final"), head(1, self._spec.blocks)),
            (("head", "rows"), head(len(hidden), self._spec.blocks)),
        ]

    def exits(self) -> Float64:
        """A step at each exit, [L]; beyond the timed blocks without the model's own head."""
        return self._all_exits([self._typical["exit", int(e)] for e in self._exits])

    def costs(self) -> StepCosts:
        """What the times say."""
        typical = self._typical
        exit_head, final_head = typical["head", "exit"], typical["head", "final"]
        rows = AT_ONCE[-1] - 1
        exits = self.exits()
        if self._depth < self._spec.blocks:
            exits[-1] += final_head - exit_head
        last, asked = self._asked[-1], len(self._asked)
        one = typical["ask", "one"]
        checks = {m: (typical["every", m] - one) / max(asked - 1, 1) for m in MEASURES}
        leaving = 0.0
        if checking(self._engines) is not None:  # an exit's block has run for the check already
            leaving = exit_head if self._engines.exit_blocks is None else final_head
        if asked == 1:  # nothing to tell the check from the rest of the step
            checks = dict.fromkeys(MEASURES, exit_head - leaving)
        decide = one - exits[last - 1] + exit_head - leaving - checks["top"]
        catch_up, waiting = self._catching_up(exits, typical)
        return StepCosts(
            exits=tuple(exits.tolist()),
            exit_head=exit_head,
            final_head=final_head,
            final_row=max(0.0, (typical["head", "rows"] - final_head) / rows),
            decide=max(0.0, decide),
            checks={measure: max(0.0, ms) for measure, ms in checks.items()},
            catch_up=catch_up,
            waiting=waiting,
            late_pass=self._late_pass(exits, typical, catch_up + waiting),
            leaving=leaving,
        )

    def _late_pass(self, exits: Float64, typical: Times, block: float) -> float:
        """What a pass of two tokens through the last block costs beyond `block`."""
        alone = float(exits[self._depth - 2] + exits[self._depth - 1])
        return max([0.0, *(typical["late", size] - alone - block for size in self._late)])

    def _all_exits(self, measured: list[float]) -> Float64:
        """A step at each exit of the model; beyond the timed blocks all cost the same."""
        first, last, start = float(measured[0]), float(measured[-1]), int(self._exits[0])
        slope = (last - first) / max(self._depth - start, 1)
        if self._depth == start:  # one exit alone
            slope = (first - self._typical["head", "exit"]) / start
        blocks = np.arange(1, self._spec.blocks + 1)
        beyond = np.maximum(blocks - self._depth, 0) * slope
        result: Float64 = np.interp(blocks, self._exits, measured) + beyond
        return result

    def _catching_up(self, exits: Float64, typical: Times) -> tuple[float, float]:
        """The line through what blocks cost more on several tokens.

        Where there is one exit alone within what is timed, nothing is known of that: a token that
        waited is taken to cost a block whole.
        """
        if self._depth == self._shallow:
            step = float(exits[self._depth - 1]) - typical["head", "exit"]
            return 0.0, max(0.0, step / self._depth)
        deep, shallow = exits[self._depth - 1], exits[self._shallow - 1]
        blocks = self._depth - self._shallow
        extra = [
            (typical["at once", size] - (size - 1) * shallow - deep) / blocks
            for size in self._sizes
        ]
        if len(extra) < 2:
            return max(0.0, sum(extra)), 0.0
        slope, start = np.polyfit(np.array(self._sizes) - 1, extra, 1)
        return max(0.0, float(start)), max(0.0, float(slope))


def _served(engines: Engines) -> tuple[int, ...] | None:
    """The exits before the last block that there are; None for all."""
    return None if engines.exit_blocks is None else engines.exit_blocks.exits


def _spread(exits: Sequence[int], most: int) -> NDArray[np.int64]:
    """So many of some rising exits at most, the first and the last among them."""
    chosen = np.linspace(1, len(exits), min(len(exits), most)).round().astype(int) - 1
    spread: NDArray[np.int64] = np.unique(np.array(exits)[chosen])
    return spread
