"""Running sequences to a depth: the passes that this takes, and the hidden states in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many

from ojfa_export.backends.backend import Engines, PagedCache
from ojfa_export.backends.draft import DraftEngines, Drafts
from ojfa_export.backends.passes import Chunk, Newest, Pass, row_ranges
from ojfa_export.decoding.arrays import Hidden
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.drafter import Drafter
from ojfa_export.runtime.exit_runner import ExitRunner
from ojfa_export.runtime.plan_passes import (
    by_context,
    decode_pass,
    parts_of,
    plan_passes,
    whole_pass,
)
from ojfa_export.runtime.sequence import Sequence


class ModelRunner:
    """Runs sequences of one KV cache.

    Args:
        spec: The model.
        engines: The opened engines.
        slots: Sequences.
        capacity: Tokens that each may hold.
        keep_final: Whether to keep the hidden states that come out of the last block.
        pages: Of the KV cache, where it has some; None for all that all slots may need.
        drafts: The draft layer, where sequences may draft with it.

    Attributes:
        drafter: Runs that layer; None without one.
        exits: Runs the blocks behind exits; None where there are none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        slots: int,
        capacity: int,
        *,
        keep_final: bool = False,
        pages: int | None = None,
        drafts: DraftEngines | None = None,
    ) -> None:
        self.spec, self.engines = spec, engines
        if pages is not None and isinstance(engines, PagedCache):
            self.executor = engines.executor(slots, capacity, pages)
        else:
            self.executor = engines.executor(slots, capacity)
        # Hidden states after so many blocks, [slots, positions, H], of tokens that stopped there.
        self.pending: dict[int, Hidden] = {}
        self._keep_final = keep_final
        self._newest = Newest()
        self.exits: ExitRunner | None = None
        if engines.exit_blocks is not None:
            self.exits = ExitRunner(
                engines.exit_blocks, self.executor, self._states_at, slots, capacity, pages
            )
        self.drafter: Drafter | None = None
        if drafts is not None:
            self.drafter = Drafter(drafts, self.executor.arrays, slots, capacity)

    def run(
        self,
        sequences: Many[Sequence],
        depth: int,
        counts: Many[int] | None = None,
        following: HeadOutput | None = None,
        stops: Many[int] | None = None,
    ) -> Hidden:
        """Brings tokens of sequences to a depth.

        Args:
            sequences: Each with tokens that are pending before the depth; each slot at most once.
            depth: Blocks to run.
            counts: How many of each sequence's newest tokens count; None for one of each.
            following: As of `plan_passes`.
            stops: As of `plan_passes`.

        Returns:
            [sum of counts, H] for the head after `depth` blocks, sequence by sequence: hidden
            states, or what a block behind the exit makes of them.
        """
        arrays, wanted = self.executor.arrays, counts or [1] * len(sequences)
        groups = by_context(sequences)
        parts: list[Hidden] = [None] * len(sequences)
        for group in groups:
            some = [sequences[index] for index in group]
            ends = [len(each) for each in some] if stops is None else [stops[i] for i in group]
            asked = self._begin_exits(some, [depth] * len(some), [wanted[i] for i in group])
            *_, (step, hidden) = self._passes(some, depth, following, ends)
            chunks = step.chunks
            if asked:
                chunks, hidden = self._run_exit(depth, some, ends, asked)
                for index in asked:
                    some[index].exits[depth] = ends[index]
                group = [group[index] for index in asked]
            newest = [
                range(rows.stop - wanted[index], rows.stop)
                for index, rows in zip(group, row_ranges(chunks), strict=True)
            ]
            taken = [row for rows in newest for row in rows]
            if len(groups) == 1:
                if len(taken) == len(hidden) == len(chunks):
                    return arrays.ascontiguousarray(hidden)
                return hidden[taken]
            # The next pass may write where it lies.
            hidden, at = hidden[taken], 0
            for index, rows in zip(group, newest, strict=True):
                parts[index] = hidden[at : at + len(rows)]
                at += len(rows)
        return arrays.concatenate([part for part in parts if part is not None])

    def run_each(
        self,
        sequences: Many[Sequence],
        depths: Many[int],
        counts: Many[int],
        stops: Many[int],
    ) -> list[tuple[list[int], Hidden]]:
        """Brings tokens of sequences to a depth of each sequence's own, in one way through.

        Args:
            sequences: Each with tokens that are pending before its depth; each slot at most once.
            depths: Blocks to run.
            counts: How many of each sequence's newest tokens count; 0 for none.
            stops: As of `plan_passes`.

        Returns:
            Of each depth, which sequences have come there, and what `run` gives for them [sum of
            counts, H]; none of which nothing counts.
        """
        results: list[tuple[list[int], Hidden]] = []
        for group in by_context(sequences):
            of_slot = {sequences[index].slot: index for index in group}
            some = [sequences[index] for index in group]
            targets = [depths[index] for index in group]
            ends = [stops[index] for index in group]
            asked = self._begin_exits(some, targets, [counts[index] for index in group])
            for step, hidden in self._passes(some, targets, None, ends):
                depth, chunks = step.blocks.stop, step.chunks
                here = [index for index in asked if targets[index] == depth]
                if here:
                    chunks, hidden = self._run_exit(depth, some, ends, here)
                there: list[int] = []
                taken: list[int] = []
                for chunk, rows in zip(chunks, row_ranges(chunks), strict=True):
                    index = of_slot[chunk.slot]
                    if counts[index] and depths[index] == depth:
                        there.append(index)
                        taken += range(rows.stop - counts[index], rows.stop)
                if there:
                    results.append((there, hidden[taken]))  # the next pass may write where it lies
            for index in asked:  # not before the model's blocks: a pass may be interrupted
                some[index].exits[targets[index]] = ends[index]
        return results

    def choose(
        self,
        sequences: Many[Sequence],
        depth: int,
        request: HeadRequest,
        following: HeadOutput | None = None,
    ) -> HeadOutput:
        """Brings sequences to a depth, and asks the head there about their newest tokens."""
        prepared = self.prepare(sequences, depth, request, following)
        if prepared is not None:
            return prepared()
        if following is None and depth == self.spec.blocks and request == HeadRequest():
            return self.check(sequences, [1] * len(sequences))
        hidden = self.run(sequences, depth, None, following)
        return self.engines.choose(hidden, depth, request)

    def check(
        self, sequences: Many[Sequence], counts: Many[int], drafts: Drafts | None = None
    ) -> HeadOutput:
        """Brings sequences to full depth, and asks the head there about their newest tokens.

        Args:
            sequences: With tokens that are pending before the last block.
            counts: How many of each sequence's newest tokens the head is asked about.
            drafts: Where the newest are drafts that are not known yet, of each sequence.

        Returns:
            What is likeliest after each of those tokens, sequence by sequence.
        """
        depth, output = self.spec.blocks, None
        step = None
        if self.drafter is not None and not any(each.exits for each in sequences):
            step = whole_pass(sequences, counts, drafts, depth)
        if self.drafter is not None and step is not None and self._states(depth) is None:
            self._newest.clear()
            output = self.drafter.check(self.executor, step, sequences)
        if output is None:
            for sequence, ids in zip(sequences, drafts.drafts() if drafts else (), strict=False):
                sequence.tokens[-len(ids) :] = ids
            hidden = self.run(sequences, depth, counts)
            return self.engines.choose(hidden, depth, HeadRequest())
        for sequence in sequences:
            sequence.marks.raise_to(len(sequence), depth)
        return output

    def prepare(
        self,
        sequences: Many[Sequence],
        depth: int,
        request: HeadRequest,
        following: HeadOutput | None = None,
    ) -> Callable[[], HeadOutput] | None:
        """What runs one token of each sequence to a depth and asks the head there.

        Args:
            sequences: Whose newest token is all that is pending.
            depth: Blocks to run.
            request: As of `Engines.choose`.
            following: As of `plan_passes`.

        Returns:
            None where it takes more than one pass, or more tokens are pending.
        """
        if any(sequence.drafting or sequence.exits for sequence in sequences):
            return None  # states are kept on the way
        if self.exits is not None and self.exits.serves(depth):
            return None  # a block follows
        step = decode_pass(sequences, depth, following)
        if step is None or (step.blocks.start and not self._newest.is_of(step)):
            return None
        states = self._states(depth)
        prepared = self.engines.prepare(self.executor, step, states, self._newest, request)

        def run() -> HeadOutput:
            choices = prepared()
            for sequence in sequences:
                sequence.marks.raise_to(len(sequence), depth)
            return choices

        return run

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies all that is known of a slot's first tokens to another.

        Those that stopped at an exit may be caught up in either slot, so their states come along.
        """
        self.executor.copy_prefix(source, target, count)
        if self.drafter is not None:
            self.drafter.executor.copy_prefix(source, target, count)
        if self.exits is not None:
            self.exits.executor.copy_prefix(source, target, count)
        for states in self.pending.values():
            states[target, :count] = states[source, :count]

    def release(self, slot: int) -> None:
        """Gives memory of a slot back whose sequence has ended."""
        self.executor.release(slot)
        if self.drafter is not None:
            self.drafter.executor.release(slot)
        if self.exits is not None:
            self.exits.executor.release(slot)

    def run_together(self, sequences: Many[Sequence]) -> bool:
        """Whether one token of each takes one pass: LongRoPE's factors are one set for that."""
        return self.spec.rotary_switch is None or len(by_context(sequences)) == 1

    def keeps(self, depth: int) -> bool:
        """Whether there is room already for what is kept after so many blocks."""
        return depth in self.pending or (depth == self.spec.blocks and not self._keep_final)

    def _passes(
        self,
        sequences: Many[Sequence],
        depth: int | Many[int],
        following: HeadOutput | None,
        stops: Many[int] | None,
    ) -> Iterator[tuple[Pass, Hidden]]:
        """Runs the passes, and gives what comes out of each."""
        for step in plan_passes(sequences, depth, following, stops):
            hidden = self._load(step)
            self._newest.clear()  # an interrupted pass leaves none
            hidden = self._run_blocks(step, hidden, sequences)
            states = self._states(step.blocks.stop)
            if states is not None:
                self.executor.store(states, step.chunks, hidden)
            self._newest.set(step, hidden)
            yield step, hidden
        # Raised together, when all is done: a pass that is interrupted can be run again.
        targets = [depth] * len(sequences) if isinstance(depth, int) else depth
        ends = stops or [len(sequence) for sequence in sequences]
        for sequence, target, stop in zip(sequences, targets, ends, strict=True):
            sequence.marks.raise_to(stop, target)

    def _run_blocks(self, step: Pass, hidden: Hidden, sequences: Many[Sequence]) -> Hidden:
        """Runs a pass; what a draft layer or blocks behind exits see is kept on the way."""
        drafter, exits = self.drafter, self.exits
        cuts = set() if drafter is None else drafter.cuts(step, sequences)
        before_exits = set() if exits is None else exits.cuts(step, sequences)
        for blocks in parts_of(step.blocks, cuts | before_exits):
            hidden = self.executor.run(blocks, hidden, step.chunks, long_context=step.long_context)
            if drafter is not None:
                drafter.keep(blocks.stop, step, hidden, sequences)
            if exits is not None and blocks.stop in before_exits:
                exits.keep(blocks.stop, step, hidden, sequences)
        return hidden

    def _begin_exits(
        self, sequences: Many[Sequence], depths: Many[int], counts: Many[int]
    ) -> list[int]:
        """Has states kept for the exits' blocks that will be asked; whose those are."""
        exits = self.exits
        if exits is None:
            return []
        asked = [
            index
            for index, (each, depth) in enumerate(zip(sequences, depths, strict=True))
            if exits.serves(depth) and (counts[index] or depth in each.asks)
        ]
        some = [sequences[index] for index in asked]

        def again(step: Pass, depth: int) -> None:
            self._newest.clear()
            hidden = self._run_blocks(step, self._load(step), some)
            self.executor.store(self._states_at(depth), step.chunks, hidden)

        exits.begin(some, [depths[index] for index in asked], again)
        return asked

    def _run_exit(
        self, depth: int, sequences: Many[Sequence], stops: Many[int], asked: Many[int]
    ) -> tuple[tuple[Chunk, ...], Hidden]:
        """Runs an exit's block for some of the sequences that have come there."""
        assert self.exits is not None
        some, ends = [sequences[i] for i in asked], [stops[i] for i in asked]
        return self.exits.run(depth, some, ends, self._newest)

    def _load(self, step: Pass) -> Hidden:
        """What goes into a pass, [tokens, H]."""
        if step.blocks.start == 0:
            return self.executor.embed(step.tokens, step.chunks)
        if self._newest.is_of(step):
            return self._newest.hidden  # still where it was computed
        return self.executor.load(self.pending[step.blocks.start], step.chunks)

    def _states(self, depth: int) -> Hidden | None:
        """Where hidden states after so many blocks are kept, if they are."""
        if depth == self.spec.blocks and not self._keep_final:
            return None
        return self._states_at(depth)

    def _states_at(self, depth: int) -> Hidden:
        if depth not in self.pending:
            self.pending[depth] = self.executor.new_states()
        return self.pending[depth]
