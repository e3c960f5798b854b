"""What a request needs next from the model, and how its decoding goes on from the answer.

A request's decoding is a generator: it yields an `Ask`, and is sent an `Answer` when the engine has
run it, alone or together with others. How tokens are batched, when a prompt is run in pieces and
whose turn it is, decoding doesn't know.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import HeadOutput, HostHeadOutput
from ojfa_export.decoding.logits import LogitsProcessor, TokenLogprobs
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import (
    DraftLength,
    Float64,
    Speculation,
    agreeing,
    check,
    draw,
)
from ojfa_export.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Ask:
    """All tokens of the request's sequence shall run to a depth.

    Attributes:
        depth: Blocks to run.
        count: About how many of the newest tokens the head is asked; no more than have not run so
            deep.
        logits: Whether the answer must have logits: likeliest tokens and confidence are always
            there, and on a device they are all that comes to the host.
    """

    depth: int
    count: int = 1
    logits: bool = False


class Heads:
    """What a head said about the tokens of several requests; asked for once each.

    Args:
        output: Of all of them.
    """

    def __init__(self, output: HeadOutput) -> None:
        self.output = output
        self._confidence: dict[Measure, list[float]] = {}

    @cached_property
    def likeliest(self) -> list[int]:
        """The tokens of the largest logits."""
        return self.output.likeliest()

    def confidence(self, measure: Measure) -> list[float]:
        """How confident the head is of each."""
        if measure not in self._confidence:
            self._confidence[measure] = self.output.confidence(measure)
        return self._confidence[measure]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the head said about one request's tokens.

    Attributes:
        heads: About those of all requests that ran together.
        rows: Which of them are the request's.
    """

    heads: Heads
    rows: slice

    @property
    def likeliest(self) -> list[int]:
        """The tokens of the largest logits, [count]."""
        return self.heads.likeliest[self.rows]

    def confidence(self, measure: Measure) -> float:
        """How confident the head is of the first."""
        confidence: float = self.heads.confidence(measure)[self.rows.start]
        return confidence

    @property
    def logits(self) -> Float32:
        """Logits [count, V], where they were asked for."""
        assert isinstance(self.heads.output, HostHeadOutput)
        logits: Float32 = self.heads.output.logits[self.rows]
        return logits


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token that decoding gives.

    Attributes:
        id: Token id.
        blocks_run: Blocks that computed it.
        drafted: Whether it was drafted before the full model took it.
        logprobs: If they were asked for.
    """

    id: int
    blocks_run: int
    drafted: bool = False
    logprobs: TokenLogprobs | None = None


# Yields what it needs or a token; is sent the answer to what it needs.
Decoding = Generator[Ask | Emitted, Answer | None, None]


class Decoder:
    """Decodes one request.

    Args:
        sequence: Holds the prompt; tokens are appended to it.
        options: Of the request, its exit resolved: a number of blocks or a policy.
        exit: The exit.
        blocks: Of the model.
        max_length: Tokens that the sequence may hold.
        eos: After one of these nothing is drafted.
    """

    def __init__(
        self,
        sequence: Sequence,
        options: GenerationOptions,
        exit: int | ExitPolicy,
        blocks: int,
        max_length: int,
        eos: frozenset[int],
    ) -> None:
        self._sequence, self._options, self._exit = sequence, options, exit
        self._blocks, self._max_length, self._eos = blocks, max_length, eos
        self._sampling = options.sampling
        self._generator = self._sampling.generator(0)
        self._processor = LogitsProcessor(options, sequence.tokens)

    def run(self) -> Decoding:
        """The tokens, and what they need; closed by the engine when the request ends."""
        speculation = self._options.speculation
        if speculation is not None:
            return self._speculate(speculation)
        return self._step_by_step()

    def _step_by_step(self) -> Decoding:
        while True:
            answer, depth = yield from self._next_answer()
            token = self._choose(answer)
            logprobs = self._logprobs(answer, 0, token)
            yield Emitted(token, depth, False, logprobs)
            self._sequence.append([token])

    def _next_answer(self) -> Generator[Ask, Answer, tuple[Answer, int]]:
        exit = self._exit
        if isinstance(exit, ExitPolicy):
            for depth, threshold in zip(exit.exits, exit.thresholds, strict=True):
                answer = yield self._ask(depth)
                if answer.confidence(exit.measure) >= threshold:
                    return answer, depth
        depth = exit if isinstance(exit, int) else self._blocks
        answer = yield self._ask(depth)
        return answer, depth

    def _ask(self, depth: int, count: int = 1) -> Ask:
        options = self._options
        return Ask(depth, count, logits=options.needs_logits or options.temperature > 0)

    def _choose(self, answer: Answer) -> int:
        """The next token; it counts for the penalties of those after it."""
        if self._options.temperature or self._options.adjusts_logits:
            logits = self._processor.adjust(answer.logits[0])
            token = self._sampling.choose(logits, self._generator)
        else:
            token = answer.likeliest[0]
        self._processor.push(token)
        return token

    def _logprobs(self, answer: Answer, row: int, token: int) -> TokenLogprobs | None:
        if self._options.logprobs is None:
            return None
        return self._processor.logprobs(answer.logits[row], token)

    def _speculate(self, speculation: Speculation) -> Decoding:
        """Drafts at an exit, verified by the full model: see `decoding.speculation`."""
        blocks, sequence = self._blocks, self._sequence
        exit = speculation.resolve_exit(blocks)
        cost = exit / blocks if speculation.draft_cost is None else speculation.draft_cost
        lengths = DraftLength(
            cost + speculation.check_cost, speculation.round_cost, speculation.acceptance
        )
        left = self._options.max_new_tokens
        while True:
            before = len(sequence)
            limit = min(left - 1, self._max_length - before, sequence.room_before_switch)
            limit = min(limit, speculation.draft or lengths.next())
            drafts, proposals = yield from self._draft(exit, limit)
            answer = yield self._ask(blocks, len(drafts) + 1)
            assert answer is not None
            tokens = self._verify(drafts, proposals, answer)
            accepted = len(tokens) - 1
            lengths.learn(accepted, len(drafts))
            sequence.truncate(before + accepted)
            for index, token in enumerate(tokens):
                logprobs = self._logprobs(answer, index, token)
                yield Emitted(token, blocks, index < accepted, logprobs)
            left -= len(tokens)
            sequence.append([tokens[-1]])

    def _draft(
        self, exit: int, limit: int
    ) -> Generator[Ask, Answer, tuple[list[int], list[Float64]]]:
        drafts: list[int] = []
        proposals: list[Float64] = []
        while len(drafts) < limit and not (drafts and drafts[-1] in self._eos):
            answer = yield self._ask(exit)
            if self._sampling.temperature:
                proposals.append(self._sampling.probabilities(answer.logits[0]))
                token = draw(proposals[-1], self._generator)
            else:
                token = answer.likeliest[0]
            drafts.append(token)
            self._sequence.append([token])
        return drafts, proposals

    def _verify(self, drafts: list[int], proposals: list[Float64], answer: Answer) -> list[int]:
        if self._sampling.temperature:
            return check(drafts, proposals, answer.logits, self._sampling, self._generator)
        return agreeing(drafts, answer.likeliest)
