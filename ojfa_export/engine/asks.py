"""What a request needs next from the model, and how its decoding goes on from the answer.

A request's decoding is a generator: it yields an `Ask`, and is sent an `Answer` when the engine has
run it, alone or together with others. How tokens are batched, when a prompt is run in pieces and
whose turn it is, decoding doesn't know.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import lru_cache
from typing import NamedTuple, Protocol

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.logits import LogitsProcessor, TokenLogprobs
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import GREEDY, Sampling
from ojfa_export.decoding.speculation import (
    DraftLength,
    Float64,
    Speculation,
    agreeing,
    check,
    draw,
)
from ojfa_export.runtime.sequence import Sequence


class Ask(NamedTuple):
    """All tokens of the request's sequence shall run to a depth.

    Attributes:
        depth: Blocks to run.
        rows: About how many of the newest tokens the head is asked; no more than have not run so
            deep.
        sampling: How the next token is chosen, where that is one: `GREEDY` or `sampled_by`.
        draw: A number from [0, 1) for that, where it is sampled.
        logits: Whether the answer must have logits: tokens and confidence are always there, and on
            a device they are all that comes to the host.
        may_go_on: Whether the answer decides if the same tokens run deeper.
    """

    depth: int
    rows: int = 1
    sampling: Sampling = GREEDY
    draw: float = 0.0
    logits: bool = False
    may_go_on: bool = False


class Heads(Protocol):
    """What a head said about the tokens of several requests; see `engine.heads.Heads`."""

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits."""
        ...

    def confidence(self, measure: Measure) -> list[float]:
        """How confident the head is of each."""
        ...

    def token(self, row: int, sampling: Sampling, draw: float) -> int:
        """The token that a request chooses."""
        ...

    def logits(self, row: int, rows: int) -> Float32:
        """Logits [rows, V] of a request that asked for them, from its first row on."""
        ...


class Answer(NamedTuple):
    """What the head said about one request's tokens.

    Attributes:
        heads: About those of all requests that ran together.
        row: The first of them that is the request's.
        ask: What it asked.
    """

    heads: Heads
    row: int
    ask: Ask

    @property
    def token(self) -> int:
        """The next token, as the ask has it."""
        return self.heads.token(self.row, self.ask.sampling, self.ask.draw)

    @property
    def likeliest(self) -> list[int]:
        """The tokens of the largest logits, [rows]."""
        return self.heads.likeliest()[self.row : self.row + self.ask.rows]

    def confidence(self, measure: Measure) -> float:
        """How confident the head is of the first."""
        return self.heads.confidence(measure)[self.row]

    @property
    def logits(self) -> Float32:
        """Logits [rows, V], where they were asked for."""
        return self.heads.logits(self.row, self.ask.rows)


class Emitted(NamedTuple):
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
        # Penalties, biases and log probabilities are seen to where the logits are: on the host.
        self._on_host = options.needs_logits
        self._asked_by = GREEDY if self._on_host else sampled_by(self._sampling)
        alike = not self._on_host and options.speculation is None
        self._every_depth = exit if alike and isinstance(exit, int) else None
        self._foreseen: Ask | None = None

    def run(self) -> Decoding:
        """The tokens, and what they need; closed by the engine when the request ends."""
        speculation = self._options.speculation
        if speculation is not None:
            return self._speculate(speculation)
        return self._step_by_step()

    def foresee(self) -> Ask | None:
        """What is asked after the next answer, whatever that is; None where that depends on it."""
        if self._foreseen is None and self._every_depth is not None:
            self._foreseen = Ask(self._every_depth, 1, self._asked_by, self._draw())
        return self._foreseen

    def _step_by_step(self) -> Decoding:
        exit = self._exit
        while True:
            ask, self._foreseen = self._foreseen, None
            if ask is None:
                depth = exit if isinstance(exit, int) else self._blocks
                ask = Ask(depth, 1, self._asked_by, self._draw(), self._on_host)
            policy = exit if isinstance(exit, ExitPolicy) else None
            answer = (yield ask) if policy is None else (yield from self._decide(policy, ask))
            assert answer is not None
            token = self._choose(answer) if self._on_host else answer.token
            logprobs = self._logprobs(answer, 0, token)
            yield Emitted(token, answer.ask.depth, False, logprobs)
            self._sequence.append([token])

    def _decide(self, policy: ExitPolicy, last: Ask) -> Generator[Ask, Answer, Answer]:
        """The answer of the first exit that is confident, or of the last ask."""
        for depth, threshold in zip(policy.exits, policy.thresholds, strict=True):
            answer = yield last._replace(depth=depth, may_go_on=True)
            if answer.confidence(policy.measure) >= threshold:
                return answer
        answer = yield last
        return answer

    def _draw(self) -> float:
        """The random number that chooses a token; each is asked for once, in their order."""
        return self._sampling.draw(self._generator)

    def _choose(self, answer: Answer) -> int:
        """The next token, from its logits; it counts for the penalties of those after it."""
        logits = self._processor.adjust(answer.logits[0])
        token = self._sampling.pick(logits, answer.ask.draw)
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
        logits = self._on_host or self._sampling.temperature > 0
        left = self._options.max_new_tokens
        while True:
            before = len(sequence)
            limit = min(left - 1, self._max_length - before, sequence.room_before_switch)
            limit = min(limit, speculation.draft or lengths.next())
            drafts, proposals = yield from self._draft(exit, limit)
            answer = yield Ask(blocks, len(drafts) + 1, logits=logits)
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
            answer = yield Ask(exit, logits=bool(self._sampling.temperature))
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


def sampled_by(sampling: Sampling) -> Sampling:
    """What samplings have in common whose seeds alone differ; the same object for all of them."""
    if not sampling.temperature:
        return GREEDY
    return _without_seed(sampling.temperature, sampling.top_k, sampling.top_p)


@lru_cache(maxsize=1024)
def _without_seed(temperature: float, top_k: int | None, top_p: float) -> Sampling:
    return Sampling(temperature, top_k, top_p)
