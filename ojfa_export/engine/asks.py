"""What a request needs next from the model, and how its decoding goes on from the answer.

A request's decoding is a generator: it yields an `Ask`, and is sent an `Answer` when the engine has
run it, alone or together with others. How tokens are batched, when a prompt is run in pieces and
whose turn it is, decoding doesn't know.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import confidence
from ojfa_export.decoding.logits import LogitsProcessor, TokenLogprobs
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import DraftLength, Speculation, agreeing, check, draw
from ojfa_export.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Ask:
    """All tokens of the request's sequence shall run to a depth.

    Attributes:
        depth: Blocks to run.
        count: For how many of the newest tokens logits are wanted; no more than have not run so
            deep.
        may_stop: Whether the request may be done with its token here: an exit that is checked.
    """

    depth: int
    count: int = 1
    may_stop: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the head said.

    Attributes:
        logits: [count, V].
    """

    logits: Float32


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
            logits, depth = yield from self._next_logits()
            token = self._choose(logits)
            yield Emitted(token, depth, False, self._processor.logprobs(logits, token))
            self._sequence.append([token])

    def _next_logits(self) -> Generator[Ask, Answer, tuple[Float32, int]]:
        exit = self._exit
        if isinstance(exit, ExitPolicy):
            for depth, threshold in zip(exit.exits, exit.thresholds, strict=True):
                answer = yield Ask(depth, may_stop=True)
                if confidence(answer.logits, exit.measure)[0] >= threshold:
                    return answer.logits[0], depth
        depth = exit if isinstance(exit, int) else self._blocks
        answer = yield Ask(depth)
        return answer.logits[0], depth

    def _choose(self, logits: Float32) -> int:
        """The next token; it counts for the penalties of those after it."""
        token = self._sampling.choose(self._processor.adjust(logits), self._generator)
        self._processor.push(token)
        return token

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
            answer = yield Ask(blocks, len(drafts) + 1)
            assert answer is not None
            tokens = self._verify(drafts, proposals, answer.logits)
            accepted = len(tokens) - 1
            lengths.learn(accepted, len(drafts))
            sequence.truncate(before + accepted)
            for index, token in enumerate(tokens):
                logprobs = self._processor.logprobs(answer.logits[index], token)
                yield Emitted(token, blocks, index < accepted, logprobs)
            left -= len(tokens)
            sequence.append([tokens[-1]])

    def _draft(
        self, exit: int, limit: int
    ) -> Generator[Ask, Answer, tuple[list[int], list[np.ndarray]]]:
        drafts: list[int] = []
        proposals: list[np.ndarray] = []
        while len(drafts) < limit and not (drafts and drafts[-1] in self._eos):
            answer = yield Ask(exit)
            logits = answer.logits[0]
            if self._sampling.temperature:
                proposals.append(self._sampling.probabilities(logits))
                token = draw(proposals[-1], self._generator)
            else:
                token = int(logits.argmax())
            drafts.append(token)
            self._sequence.append([token])
        return drafts, proposals

    def _verify(self, drafts: list[int], proposals: list[np.ndarray], logits: Float32) -> list[int]:
        if self._sampling.temperature:
            return check(drafts, proposals, logits, self._sampling, self._generator)
        return agreeing(drafts, logits.argmax(axis=-1).tolist())
