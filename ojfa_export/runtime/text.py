"""Token ids to text as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ojfa_export.models.tokenizer import decode

# What a decoder gives for bytes that are no character, or not yet.
REPLACEMENT = "\ufffd"
# Marks of characters that a caller gets, and of those that only stop strings are looked for in.
SHOWN, HIDDEN = "+", "-"
# Last tokens of a prompt that are decoded with the first one after it: bytes of one character, and
# the spaces around it.
NEIGHBOURS = 16


class TextStream:
    """The text of one sequence, piece by piece.

    Special tokens are no part of it, but a stop string may name them ("<|im_end|>").

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
        self._special = _named(tokenizer, self._stop)
        # Text that may begin a stop string, and which of its characters are to be shown.
        self._held, self._shown = "", ""
        self._window, self._given_text = self._end_of(prompt)
        self._given = len(self._window)

    def push(self, token_id: int) -> str:
        """Adds a token.

        Returns:
            The text that became certain; sets `stopped` where a stop string is complete.
        """
        self._window.append(token_id)
        if token_id in self._special:
            return self._release("", final=False, hidden=self._special[token_id])
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

    def _end_of(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        """A prompt's last tokens, as many as begin with a whole character, and their text."""
        count = NEIGHBOURS
        while True:
            window = list(prompt[-count:])
            text = decode(self._tokenizer, window)
            if (text and REPLACEMENT not in text) or count >= len(prompt):
                return window, text
            count *= 2

    def _decode(self) -> str:
        return decode(self._tokenizer, self._window)

    def _added(self, text: str) -> str:
        """What follows the text given before, whose end may have been half a character."""
        given = self._given_text
        while not text.startswith(given):
            given = given[:-1]
        return text[len(given) :]

    def _release(self, piece: str, *, final: bool, hidden: str = "") -> str:
        """What is certain of the text held back, a new piece, and a special token's name."""
        if not self._stop:
            return piece
        text = self._held + piece + hidden
        shown = self._shown + SHOWN * len(piece) + HIDDEN * len(hidden)
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, keep = True, len(text) - min(ends)
        else:
            keep = 0 if final else max(_overlap(text, stop) for stop in self._stop)
        certain = len(text) - keep
        self._held, self._shown = text[certain:], shown[certain:]
        return "".join(
            each for each, mark in zip(text[:certain], shown, strict=False) if mark == SHOWN
        )


def _named(tokenizer: Tokenizer, stop: Sequence[str]) -> dict[int, str]:
    """Special tokens that stop strings name, by id."""
    if not stop:
        return {}
    return {
        token_id: token.content
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and any(token.content in each for each in stop)
    }


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
