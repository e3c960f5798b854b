"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from ojfa_export.decoding.exits import Exit


@dataclass(frozen=True)
class Settings:
    """How a server behaves; the engines have settings of their own.

    Attributes:
        api_keys: One of them must come with a request; none for no keys.
        timeout: Seconds that a request may take, its time in the queue included.
        exit: Blocks to run where a request names no exit: a number, "full" or "auto".
        shadow_share: The probability that a token is compared with the full model.
        log_prompts: Whether logs hold what clients send and get.
        max_body_bytes: Of a request; a larger one is refused.
        keep_alive: Seconds of silence in a stream after which a comment is sent.
        drain_timeout: Seconds that running requests have when the server ends.
    """

    api_keys: tuple[str, ...] = ()
    timeout: float = 600.0
    exit: Exit | str = "full"
    shadow_share: float = 0.0
    log_prompts: bool = False
    max_body_bytes: int = 4 << 20
    keep_alive: float = 15.0
    drain_timeout: float = 30.0
