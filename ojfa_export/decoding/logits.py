"""From logits to a token, with everything that a request may ask for; on the host."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.options import GenerationOptions


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's distribution before any adjustment.

    Attributes:
        logprob: Of the chosen token.
        top: The likeliest tokens' ids and log probabilities, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class LogitsProcessor:
    """Adjusts the logits of one request, as its penalties and biases say.

    In this order, which is that of the servers that people know: bias, repetition penalty, presence
    and frequency penalty, min-p; temperature, top-k and top-p follow when a token is drawn.

    Args:
        options: Of the request.
        prompt: Its token ids.
    """

    def __init__(self, options: GenerationOptions, prompt: list[int]) -> None:
        self._options = options
        self._seen = set(prompt)
        self._generated: Counter[int] = Counter()
        self._biased = np.array(list(options.logit_bias), np.int64)
        self._biases = np.array(list(options.logit_bias.values()), np.float32)

    def push(self, token: int) -> None:
        """Takes a token that was generated."""
        self._seen.add(token)
        self._generated[token] += 1

    def adjust(self, logits: Float32) -> Float32:
        """Adjusted logits [V]; the same array where nothing is asked for."""
        options = self._options
        if not options.adjusts_logits:
            return logits
        logits = logits.copy()
        if len(self._biased):
            logits[self._biased] += self._biases
        if options.repetition_penalty not in (None, 1):
            seen = np.fromiter(self._seen, np.int64)
            values = logits[seen]
            penalty = np.float32(options.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._generated and (options.presence_penalty or options.frequency_penalty):
            tokens = np.fromiter(self._generated, np.int64)
            counts = np.fromiter(self._generated.values(), np.float32)
            logits[tokens] -= options.presence_penalty + options.frequency_penalty * counts
        if options.min_p and options.temperature:
            # p_i / p_max = exp((l_i - l_max) / temperature)
            least = logits.max() + options.temperature * math.log(options.min_p)
            logits[logits < least] = -np.inf
        return logits

    def logprobs(self, logits: Float32, token: int) -> TokenLogprobs | None:
        """Log probabilities of the unadjusted logits [V], if they are asked for."""
        count = self._options.logprobs
        if count is None:
            return None
        below = logits.astype(np.float64) - logits.max()
        total = math.log(np.exp(below).sum())
        top = np.argsort(-logits, kind="stable")[:count]
        return TokenLogprobs(
            float(below[token] - total),
            tuple((int(each), float(below[each] - total)) for each in top),
        )
