"""Token ids to text as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ojfa_export.models.tokenizer import decode

# What a decoder gives for bytes that are no character, or not yet.
REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one sequence, piece by piece.

    Characters that take several tokens are held back until they are whole, and text that may be
    the beginning of a stop string until it is known not to be.

    A token's text depends on its neighbours (bytes of one character, leading spaces), so that
    what a token adds is found by decoding it together with the tokens of the piece before.

    Args:
        tokenizer: The model's.
        stop: Strings that end the text; they are not part of it.
        prompt: Token ids before the text, which decide its first characters (leading spaces).
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        self._window = list(prompt)
        self._given = len(self._window)
        self._given_text = self._decode()

    def push(self, token_id: int) -> str:
        """Adds a token.

        Returns:
            The text that became certain; sets `stopped` where a stop string is complete.
        """
        self._window.append(token_id)
        text = self._decode()
        if text.endswith(REPLACEMENT) or not (piece := self._added(text)):
            return ""
        del self._window[: self._given]
        self._given = len(self._window)
        self._given_text = self._decode()
        return self._release(piece, final=False)

    def finish(self) -> str:
        """The text that was held back, once no more tokens come."""
        return "" if self.stopped else self._release(self._added(self._decode()), final=True)

    def _decode(self) -> str:
        return decode(self._tokenizer, self._window)

    def _added(self, text: str) -> str:
        """What follows the text given before, whose end may have been half a character."""
        given = self._given_text
        while not text.startswith(given):
            given = given[:-1]
        return text[len(given) :]

    def _release(self, piece: str, *, final: bool) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
