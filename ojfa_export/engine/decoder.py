"""How a request decodes: step by step at an exit, by a policy, or with drafts that are verified.

A request's decoding is a generator: it yields a `NextStep`, and is sent a `StepOutput` when the
engine has run it, alone or together with others. How tokens are batched, when a prompt is run in
pieces and whose turn it is, decoding doesn't know.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import lru_cache

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
from ojfa_export.engine.next_step import NextStep, StepOutput
from ojfa_export.runtime.decoding import Chosen
from ojfa_export.runtime.sequence import Sequence
from ojfa_export.runtime.steps import stages_of

# Yields what it needs or a token; is sent the output to what it needs.
Decoding = Generator[NextStep | Chosen, StepOutput | None, None]


class Decoder:
    """Decodes one request.

    Args:
        sequence: Holds the prompt; tokens are appended to it.
        options: Of the request, its exit resolved: a number of blocks or a policy.
        exit: The exit.
        blocks: Of the model.
        max_length: Tokens that the sequence may hold.
        eos: After one of these nothing is drafted.
        has_drafts: Whether a draft layer is there.
        together: How many requests run now, itself included.
    """

    def __init__(
        self,
        sequence: Sequence,
        options: GenerationOptions,
        exit: int | ExitPolicy,
        blocks: int,
        max_length: int,
        eos: frozenset[int],
        *,
        has_drafts: bool = False,
        together: Callable[[], int] = lambda: 1,
    ) -> None:
        self._sequence, self._options, self._exit = sequence, options, exit
        self._blocks, self._max_length, self._eos = blocks, max_length, eos
        self._has_drafts, self._together = has_drafts, together
        self._sampling = options.sampling
        self._generator = self._sampling.generator(0)
        self._processor = LogitsProcessor(options, sequence.tokens)
        # Penalties, biases and log probabilities are seen to where the logits are: on the host.
        self._on_host = options.needs_logits
        self._step_sampling = GREEDY if self._on_host else sampled_by(self._sampling)
        alike = not self._on_host and options.speculation is None
        self._every_depth = exit if alike and isinstance(exit, int) else None
        self._foreseen: NextStep | None = None

    def run(self) -> Decoding:
        """The tokens, and what they need; closed by the engine when the request ends."""
        speculation = self._options.speculation
        if speculation is not None:
            return self._speculate(speculation)
        return self._step_by_step()

    def foresee(self) -> NextStep | None:
        """What is asked after the next output, whatever that is; None where that depends on it."""
        if self._foreseen is None and self._every_depth is not None:
            self._foreseen = NextStep(self._every_depth, 1, self._step_sampling, self._draw())
        return self._foreseen

    def _step_by_step(self) -> Decoding:
        exit = self._exit
        while True:
            step, self._foreseen = self._foreseen, None
            if step is None:
                depth = exit if isinstance(exit, int) else self._blocks
                step = NextStep(depth, 1, self._step_sampling, self._draw(), self._on_host)
            policy = exit if isinstance(exit, ExitPolicy) else None
            output = (yield step) if policy is None else (yield from self._decide(policy, step))
            assert output is not None
            token = self._choose(output) if self._on_host else output.token
            logprobs = self._logprobs(output, 0, token)
            yield Chosen(token, output.step.depth, False, logprobs)
            self._sequence.append([token])

    def _decide(
        self, policy: ExitPolicy, last: NextStep
    ) -> Generator[NextStep, StepOutput, StepOutput]:
        """The output of the first exit that is confident, or of the last step."""
        for stage in stages_of(policy, self._blocks):
            check = stage.check
            if check is not None:
                output = yield last._replace(depth=stage.depth, check=check)
                if output.confidence(check.measure) >= check.threshold:
                    return output
        output = yield last
        return output

    def _draw(self) -> float:
        """The random number that chooses a token; each is asked for once, in their order."""
        return self._sampling.draw(self._generator)

    def _choose(self, output: StepOutput) -> int:
        """The next token, from its logits; it counts for the penalties of those after it."""
        logits = self._processor.adjust(output.logits[0])
        token = self._sampling.pick(logits, output.step.draw)
        self._processor.push(token)
        return token

    def _logprobs(self, output: StepOutput, row: int, token: int) -> TokenLogprobs | None:
        if self._options.logprobs is None:
            return None
        return self._processor.logprobs(output.logits[row], token)

    def _speculate(self, speculation: Speculation) -> Decoding:
        """Drafts at an exit, verified by the full model: see `decoding.speculation`."""
        blocks, sequence = self._blocks, self._sequence
        exit = speculation.resolve_exit(blocks, has_layer=self._has_drafts)
        cost = speculation.draft_cost
        if cost is None:
            cost = max(1, exit) / blocks
        lengths = DraftLength(
            cost + speculation.check_cost,
            speculation.round_cost,
            speculation.acceptance,
            check_cost=speculation.check_cost,
        )
        # Sampled tokens are those of their seed, whatever runs beside them.
        greedy = not self._sampling.temperature
        logits = self._on_host or self._sampling.temperature > 0
        left, prompt = self._options.max_new_tokens, len(sequence)
        while True:
            before, limit = len(sequence), 0
            # A draft layer begins after the prompt's round, whatever was cached of the prompt.
            if exit or (before > prompt and sequence.can_draft):
                limit = min(left - 1, self._max_length - before, sequence.room_before_switch)
                together = self._together() if greedy else 1
                limit = min(limit, speculation.draft or lengths.next(together))
            drafts, proposals = yield from self._draft(exit, limit)
            output = yield NextStep(blocks, len(drafts) + 1, logits=logits)
            assert output is not None
            tokens = self._verify(drafts, proposals, output)
            accepted = len(tokens) - 1
            lengths.learn(accepted, len(drafts))
            sequence.truncate(before + accepted)
            for index, token in enumerate(tokens):
                logprobs = self._logprobs(output, index, token)
                yield Chosen(token, blocks, index < accepted, logprobs)
            left -= len(tokens)
            sequence.append([tokens[-1]])

    def _draft(
        self, exit: int, limit: int
    ) -> Generator[NextStep, StepOutput, tuple[list[int], list[Float64]]]:
        drafts: list[int] = []
        proposals: list[Float64] = []
        while len(drafts) < limit and not (drafts and drafts[-1] in self._eos):
            if self._sampling.temperature:
                output = yield NextStep(exit, logits=True)
                assert output is not None
                proposals.append(self._sampling.probabilities(output.logits[0]))
                new, ended = [draw(proposals[-1], self._generator)], False
            else:
                wanted = limit - len(drafts)
                output = yield NextStep(exit, drafts=wanted if exit == 0 else 1)
                assert output is not None
                given = output.drafts if exit == 0 else output.likeliest
                new, ended = self._counting(given[:wanted]), len(given) > 1
            drafts += new
            self._sequence.append(new)
            if ended:
                break
        return drafts, proposals

    def _counting(self, drafts: list[int]) -> list[int]:
        """Drafts up to an end of text."""
        ends = (index for index, token in enumerate(drafts) if token in self._eos)
        return drafts[: next(ends, len(drafts)) + 1]

    def _verify(self, drafts: list[int], proposals: list[Float64], output: StepOutput) -> list[int]:
        if self._sampling.temperature:
            return check(drafts, proposals, output.logits, self._sampling, self._generator)
        return agreeing(drafts, output.likeliest)


def sampled_by(sampling: Sampling) -> Sampling:
    """What samplings have in common whose seeds alone differ; the same object for all of them."""
    if not sampling.temperature:
        return GREEDY
    return _without_seed(sampling.temperature, sampling.top_k, sampling.top_p)


@lru_cache(maxsize=1024)
def _without_seed(temperature: float, top_k: int | None, top_p: float) -> Sampling:
    return Sampling(temperature, top_k, top_p)
