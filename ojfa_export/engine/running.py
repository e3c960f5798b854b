"""A request that has a slot, or had one: its sequence, its decoding, and what it waits for."""

from __future__ import annotations

from ojfa_export.engine.asks import Answer, Ask, Decoder, Decoding, Emitted
from ojfa_export.engine.request import FinishReason, Request, RequestToken
from ojfa_export.runtime.sequence import Sequence
from ojfa_export.runtime.text import TextStream


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
        ask: What it needs next.
        waits: Passes of others since it could have run.
        cancelled: Whether it shall end.
        cached_tokens: Of the prompt, found in the prefix cache.
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
        self._text, self._eos, self._max_length = text, eos, max_length
        self._stop_tokens = frozenset(request.options.stop_token_ids)
        self._count = 0
        self._decoding: Decoding = decoder.run()
        self.ask: Ask = self._first()

    @property
    def pending(self) -> int:
        """Tokens that have not run as deep as is needed next."""
        return self.sequence.pending(self.ask.depth)

    @property
    def entry(self) -> int:
        """The first block that has tokens of the sequence pending."""
        return self.sequence.entry

    def answer(self, answer: Answer) -> list[Emitted]:
        """Goes on from an answer to what is needed next.

        Returns:
            The tokens that it gave; after the request's last one nothing more is needed.
        """
        emitted: list[Emitted] = []
        item = self._decoding.send(answer)
        while isinstance(item, Emitted):
            emitted.append(item)
            self._put(item)
            if self.request.done:
                self.close()
                return emitted
            item = next(self._decoding)
        self.ask = item
        return emitted

    def finish(self, reason: FinishReason) -> None:
        """Ends the request early; text that was held back is given."""
        trailing = self._text.finish()
        self.request.end(reason, cached_tokens=self.cached_tokens, trailing_text=trailing)
        self.close()

    def close(self) -> None:
        """Ends the decoding."""
        self._decoding.close()

    def _first(self) -> Ask:
        item = next(self._decoding)
        assert isinstance(item, Ask)
        return item

    def _put(self, token: Emitted) -> None:
        self._count += 1
        is_end = token.id in self._eos or token.id in self._stop_tokens
        text = "" if is_end else self._text.push(token.id)
        reason = self._reason(token.id)
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
        if self._count >= self.request.options.max_new_tokens:
            return "max_new_tokens"
        # The newest token isn't in the cache, and needs room only if another follows.
        used = len(self.request.prompt_token_ids) + self._count - 1
        return "cache_full" if used >= self._max_length else None
