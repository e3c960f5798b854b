"""A request to the engine: its tokens as they come, its result, and its cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol

from ojfa_export.decoding.logits import TokenLogprobs
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.engine.wakes import Wakes
from ojfa_export.errors import OjfaError
from ojfa_export.system.arguments import real_number

FinishReason = Literal[
    "end_of_text", "stop_token", "stop_string", "max_new_tokens", "cache_full", "cancelled",
    "timeout",
]  # fmt: skip


@dataclass(frozen=True)
class RequestToken:
    """One generated token.

    Attributes:
        id: Token id.
        text: Text that became certain with it, perhaps none or of several tokens.
        blocks_run: Blocks that computed it.
        finish_reason: Why this is the last token, or None.
        drafted: Whether it was drafted before the full model took it.
        logprobs: If they were asked for.
    """

    id: int
    text: str
    blocks_run: int
    finish_reason: FinishReason | None
    drafted: bool = False
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Usage:
    """What a request used.

    Attributes:
        prompt_tokens: Of the prompt.
        cached_tokens: Those of them that were in the prefix cache.
        new_tokens: Generated.
        blocks_per_token: Blocks that computed a generated token, on average.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    blocks_per_token: float


@dataclass(frozen=True)
class RequestResult:
    """What a request gave.

    Attributes:
        text: The generated text.
        token_ids: The generated tokens.
        exit_blocks: Blocks run for each token.
        finish_reason: Why it ended.
        usage: What it used.
        time_to_first_token: Seconds from `submit`, time in the queue included; None without tokens.
        seconds: From `submit` to the end.
        logprobs: Of each token, if they were asked for.
    """

    text: str
    token_ids: list[int]
    exit_blocks: list[int]
    finish_reason: FinishReason
    usage: Usage
    time_to_first_token: float | None
    seconds: float
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class _Change(threading.Condition):
    """Something that threads and asyncio tasks wait for; telling nobody costs next to nothing."""

    def __init__(self, lock: threading.RLock, wakes: Wakes) -> None:
        super().__init__(lock)
        self._threads, self._wakes = 0, wakes
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def wait(self, timeout: float | None = None) -> bool:
        """See `threading.Condition`."""
        self._threads += 1
        try:
            return super().wait(timeout)
        finally:
            self._threads -= 1

    def future(self) -> asyncio.Future[None]:
        """Is done when it is told next; with the lock."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._futures.append((loop, future))
        return future

    def tell(self) -> None:
        """Wakes who waits; with the lock."""
        if self._threads:
            self.notify_all()
        if self._futures:
            for loop, future in self._futures:
                self._wakes.wake(loop, future)
            self._futures.clear()


class Cancels(Protocol):
    """What runs requests; see `engine.engine.Engine`."""

    wakes: Wakes

    def cancel(self, request: Request) -> None:
        """Ends a request at the next pass."""
        ...


class Request:
    """Made by `Engine.submit`; its tokens come by iterating, from a thread or from asyncio.

    for token in request: ...          # or: async for token in request
    result = request.result()          # or: result = await request
    with engine.submit(...) as request: ...   # is cancelled where the block is left early

    Attributes:
        id: Counts the engine's requests.
        prompt_token_ids: The prompt.
        options: As asked, defaults resolved.
    """

    def __init__(
        self, engine: Cancels, id: int, prompt: list[int], options: GenerationOptions
    ) -> None:
        self.id, self.prompt_token_ids, self.options = id, prompt, options
        self._engine = engine
        self._submitted = time.perf_counter()
        self._lock = threading.RLock()
        self._more = _Change(self._lock, engine.wakes)
        self._over = _Change(self._lock, engine.wakes)
        self._tokens: list[RequestToken] = []
        self._reason: FinishReason | None = None
        self._error: OjfaError | None = None
        self._first: float | None = None
        self._ended: float | None = None
        self.started = False  # the engine's: whether it ever had a slot
        self._cached_tokens = 0
        self._trailing_text = ""

    def __repr__(self) -> str:
        state = self._reason or ("failed" if self._error else "running")
        return f"<ojfa_export.Request {self.id}: {len(self._tokens)} tokens, {state}>"

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs, and where it failed."""
        return self._reason

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended is not None

    def cancel(self) -> None:
        """Ends it at the engine's next pass, wherever it is; what was generated is kept."""
        self._engine.cancel(self)

    def __enter__(self) -> Request:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancels what hasn't ended: whoever wanted it has left."""
        if not self.done:
            self.cancel()

    def __await__(self) -> Generator[Any, None, RequestResult]:
        """The result, once it has ended; see `result`."""
        return self._result().__await__()

    def __iter__(self) -> Iterator[RequestToken]:
        """Tokens as they come.

        Raises:
            OjfaError: What the request failed with, after its tokens.
        """
        at = 0
        while True:
            with self._lock:
                while len(self._tokens) == at and not self.done:
                    self._more.wait()
                new = self._tokens[at:]
            yield from new
            at += len(new)
            if not new:
                self._raise()
                return

    async def __aiter__(self) -> AsyncIterator[RequestToken]:
        """Tokens as they come; a task that is cancelled here doesn't cancel the request."""
        async for new in self.arrivals():
            for token in new:
                yield token

    async def arrivals(self) -> AsyncIterator[list[RequestToken]]:
        """Tokens as they come, all together that have come since the last ones were taken.

        Raises:
            OjfaError: What the request failed with, after its tokens.
        """
        at = 0
        while True:
            with self._lock:
                new, done = self._tokens[at:], self.done
                told = None if new or done else self._more.future()
            if new:
                yield new
            at += len(new)
            if told is not None:
                await told
            elif not new:
                self._raise()
                return

    def result(self, timeout: float | None = None) -> RequestResult:
        """Waits for the end.

        Args:
            timeout: Seconds to wait; None for ever.

        Raises:
            TimeoutError: It hasn't ended; it goes on.
            OjfaError: What it failed with.
        """
        if timeout is not None:
            timeout = min(real_number("timeout", timeout, 0.0), threading.TIMEOUT_MAX)
        with self._lock:
            if not self._over.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended after {timeout} s")
        self._raise()
        assert self._reason is not None
        assert self._ended is not None
        tokens = self._tokens
        blocks = [token.blocks_run for token in tokens]
        usage = Usage(
            len(self.prompt_token_ids),
            self._cached_tokens,
            len(tokens),
            sum(blocks) / max(len(blocks), 1),
        )
        return RequestResult(
            text="".join(token.text for token in tokens) + self._trailing_text,
            token_ids=[token.id for token in tokens],
            exit_blocks=blocks,
            finish_reason=self._reason,
            usage=usage,
            time_to_first_token=self._first and self._first - self._submitted,
            seconds=self._ended - self._submitted,
            logprobs=[token.logprobs for token in tokens if token.logprobs is not None],
        )

    async def _result(self) -> RequestResult:
        with self._lock:
            told = None if self.done else self._over.future()
        if told is not None:
            await told
        return self.result()

    def put(self, token: RequestToken) -> None:
        """The engine's: gives a token."""
        with self._lock:
            if self._first is None:
                self._first = time.perf_counter()
            self._tokens.append(token)
            self._more.tell()

    def end(
        self,
        reason: FinishReason | None,
        error: OjfaError | None = None,
        *,
        cached_tokens: int = 0,
        trailing_text: str = "",
    ) -> None:
        """The engine's: ends the request, once."""
        with self._lock:
            if self.done:
                return
            self._reason, self._error = reason, error
            self._cached_tokens, self._trailing_text = cached_tokens, trailing_text
            self._ended = time.perf_counter()
            self._more.tell()
            self._over.tell()

    def _raise(self) -> None:
        if self._error is not None:
            # A new one each time: a raised exception keeps the frames that it went through.
            raise type(self._error)(self._error.message, self._error.hint)
