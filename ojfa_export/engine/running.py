"""A request that has a slot, or had one: its sequence, its decoding, and what it waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.engine.decoder import Decoder, Decoding
from ojfa_export.engine.next_step import NextStep, StepOutput
from ojfa_export.engine.request import FinishReason, Request, RequestToken
from ojfa_export.errors import OjfaError
from ojfa_export.runtime.decoding import Chosen
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.sequence import Sequence
from ojfa_export.runtime.text import TextStream

NO_SLOT = -1


class Running:
    """A request in the engine.

    Args:
        request: The request.
        sequence: Its tokens.
        decoder: Gives its tokens.
        text: Turns them into text.
        eos: The model's end-of-text tokens.
        max_length: Tokens that a sequence may hold.
        deadline: When it must have ended, by `time.perf_counter`; None for never.

    Attributes:
        step: What it needs next.
        waits: Passes of others since it could have run.
        cancelled: Whether it shall end.
        cached_tokens: Of the prompt, found in the prefix cache.
        over: Whether it has had its last token, or failed; its request may not know yet.
        reason: Why it is over; None where it failed.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        decoder: Decoder,
        text: TextStream,
        eos: frozenset[int],
        max_length: int,
        deadline: float | None,
    ) -> None:
        self.request, self.sequence, self.deadline = request, sequence, deadline
        self.waits = 0
        self.cancelled = False
        self.cached_tokens = 0
        self.over = False
        self.reason: FinishReason | None = None
        # Tokens that the request hasn't been told of, and whether each ends it.
        self._untold: list[tuple[Chosen, FinishReason | None]] = []
        self._text, self._eos = text, eos
        self._stop_tokens = frozenset(request.options.stop_token_ids)
        self._ends = eos | self._stop_tokens
        self._count = 0
        # The newest token isn't in the cache, and needs room only if another follows.
        room = max_length - len(request.prompt_token_ids) + 1
        self._most = min(request.options.max_new_tokens, room)
        self._decoder = decoder
        self._decoding: Decoding = decoder.run()
        self.step: NextStep = self._first()

    @classmethod
    def of(
        cls,
        model: Model,
        request: Request,
        exit: int | ExitPolicy,
        max_length: int,
        deadline: float | None,
        together: Callable[[], int],
    ) -> Running:
        """A request that has no slot yet, its exit resolved; `together` says how many run."""
        spec, prompt, options = model.spec, request.prompt_token_ids, request.options
        eos = frozenset() if options.ignore_eos else frozenset(spec.eos_token_ids)
        drafts, speculation, depth = model.drafts, options.speculation, None
        if drafts is not None and speculation is not None and speculation.exit == 0:
            depth = drafts.depths[-1]
        asks = asked_exits(model, exit, speculation)
        sequence = Sequence(NO_SLOT, spec.blocks, spec.rotary_switch, depth, asks)
        sequence.append(list(prompt))
        has_drafts = depth is not None
        decoder = Decoder(
            sequence,
            options,
            exit,
            spec.blocks,
            max_length,
            eos,
            has_drafts=has_drafts,
            together=together,
        )
        text = TextStream(model.tokenizer, options.stop, prompt)
        return cls(request, sequence, decoder, text, eos, max_length, deadline)

    @property
    def pending(self) -> int:
        """Tokens that have not run as deep as is needed next."""
        return self.sequence.pending(self.step.depth)

    @property
    def entry(self) -> int:
        """The first block that has tokens of the sequence pending."""
        return self.sequence.entry

    @property
    def is_at_last_token(self) -> bool:
        """Whether it ends with its next token, whatever that is."""
        return self._count + 1 >= self._most

    def foresee(self) -> NextStep | None:
        """What is needed after the next token, whatever that is; None where that depends on it."""
        # LongRoPE's switch has all tokens run again, so they must be known.
        return self._decoder.foresee() if self.sequence.room_before_switch else None

    def advance(self, output: StepOutput) -> list[Chosen]:
        """Goes on from a step's output to the next step.

        The request is told of its tokens by `tell`: making text of them may wait until the device
        has something to do.

        Returns:
            The tokens that it gave; after the request's last one nothing more is needed.
        """
        emitted: list[Chosen] = []
        item = self._decoding.send(output)
        while isinstance(item, Chosen):
            emitted.append(item)
            self._put(item)
            if self.over:
                self.close()
                return emitted
            item = next(self._decoding)
        self.step = item
        return emitted

    def finish(self, reason: FinishReason) -> None:
        """Ends the request early; text that was held back is given."""
        try:
            self.tell()
            trailing = self._text.finish()
        except OjfaError as error:
            self.fail(error)
            return
        self.over, self.reason = True, reason
        self.request.end(reason, cached_tokens=self.cached_tokens, trailing_text=trailing)
        self.close()

    def close(self) -> None:
        """Ends the decoding."""
        self._decoding.close()

    def _first(self) -> NextStep:
        item = next(self._decoding)
        assert isinstance(item, NextStep)
        return item

    def tell(self) -> None:
        """Tells the request of its new tokens, with their text.

        Raises:
            OjfaError: The tokenizer can't make text of them.
        """
        while self._untold:
            token, reason = self._untold.pop(0)
            self._give(token, self._text_of(token.id), reason)

    def fail(self, error: OjfaError) -> None:
        """Ends the request with an error, after the tokens that it had."""
        self.over = True
        with suppress(Exception):  # the error is told, whatever becomes of the text before it
            self.tell()
        self._untold.clear()
        self.request.end(None, error)
        self.close()

    def _put(self, token: Chosen) -> None:
        self._count += 1
        if not self.request.options.stop:
            reason = self._reason(token.id)
            self._untold.append((token, reason))
        else:  # whether it goes on is seen by its text
            text = self._text_of(token.id)
            reason = self._reason(token.id)
            self._give(token, text, reason)
        if reason is not None:
            self.over, self.reason = True, reason

    def _text_of(self, token: int) -> str:
        return "" if token in self._ends else self._text.push(token)

    def _give(self, token: Chosen, text: str, reason: FinishReason | None) -> None:
        if reason is not None:
            text += self._text.finish()
        self.request.put(
            RequestToken(token.id, text, token.blocks_run, reason, token.drafted, token.logprobs)
        )
        if reason is not None:
            self.request.end(reason, cached_tokens=self.cached_tokens)

    def _reason(self, token: int) -> FinishReason | None:
        if token in self._eos:
            return "end_of_text"
        if token in self._stop_tokens:
            return "stop_token"
        if self._text.stopped:
            return "stop_string"
        if self._count < self._most:
            return None
        is_all = self._count >= self.request.options.max_new_tokens
        return "max_new_tokens" if is_all else "cache_full"


def asked_exits(
    model: Model, exit: int | ExitPolicy, speculation: Speculation | None
) -> frozenset[int]:
    """The exits with a block behind them that a request will ask."""
    behind = model.engines.exit_blocks
    if behind is None:
        return frozenset()
    drafting = () if speculation is None or not speculation.exit else (speculation.exit,)
    asked = exit.exits if isinstance(exit, ExitPolicy) else (exit,)
    return frozenset(each for each in (*asked, *drafting) if each in behind.exits)
