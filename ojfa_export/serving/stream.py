"""Answers as server-sent events, while the engine works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from ojfa_export.engine.request import RequestResult
from ojfa_export.errors import OjfaError
from ojfa_export.serving.answers import Form, event
from ojfa_export.serving.errors import HttpError, of_engine
from ojfa_export.serving.metrics import Latencies
from ojfa_export.serving.running import Running

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies shall hand tokens on at once
]


class Stream:
    """The stream of one request of HTTP, which may have several choices.

    Chunks go to the server's `send` directly: a token costs no more than its text and that.

    Args:
        running: The engine's requests.
        form: Of the chunks.
        latencies: Told when tokens come.
        keep_alive: Seconds of silence after which a comment is sent.
        with_usage: Whether a chunk at the end says what was used.
        with_counts: Whether each chunk says what its choice has used so far.
        headers: Beside those of any stream.
    """

    def __init__(
        self,
        running: Running,
        form: Form,
        latencies: Latencies,
        *,
        keep_alive: float,
        with_usage: bool,
        with_counts: bool,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._running, self._form, self._latencies = running, form, latencies
        self._keep_alive, self._with_usage, self._headers = keep_alive, with_usage, headers
        self._with_counts = with_counts
        self._sent = time.perf_counter()
        self.gone = False  # whether the client left

    async def run(
        self, receive: Receive, send: Send, send_body: Send
    ) -> list[RequestResult] | None:
        """Sends everything; what the client doesn't wait for is cancelled.

        Args:
            receive: Tells when the client leaves.
            send: Takes the start of the answer.
            send_body: Takes its chunks; may be nearer to the connection.

        Returns:
            The results, or None where a request failed or the client has gone.
        """

        async def body(data: bytes, more: bool = True) -> None:
            self._sent = time.perf_counter()
            await send_body({"type": "http.response.body", "body": data, "more_body": more})

        await send(
            {"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *self._headers]}
        )
        beside = [
            asyncio.create_task(self._notice_leaving(receive)),
            asyncio.create_task(self._keep_awake(body)),
        ]
        try:
            return await self._send_all(body)
        finally:
            for task in beside:
                task.cancel()

    async def _send_all(self, body: Callable[..., Awaitable[None]]) -> list[RequestResult] | None:
        running, results = self._running, None
        try:
            choices = (self._follow(index, body) for index in range(len(running.requests)))
            results = await asyncio.gather(*choices)
            if not self.gone and any(each.finish_reason == "cancelled" for each in results):
                raise HttpError(503, "the server ended before the answer did", code="draining")
        except (OjfaError, HttpError) as error:
            running.cancel()
            told = error if isinstance(error, HttpError) else of_engine(error)
            await body(event(told.body()) + DONE, False)
            return None
        if self.gone:
            return None
        usage = self._form.usage(results, running.prompts) if self._with_usage else b""
        await body(usage + DONE, False)
        return results

    async def _follow(self, index: int, body: Callable[..., Awaitable[None]]) -> RequestResult:
        """Sends the chunks of one choice."""
        running, form, latencies = self._running, self._form, self._latencies
        request, echoed = running.requests[index], running.echoed[index]
        length, count, told = len(echoed), 0, False
        first = form.first(index, echoed)
        before = running.begun
        async for tokens in request.arrivals():
            now = time.perf_counter()
            latencies.tokens(now - before, len(tokens), is_first=not count)
            before, count = now, count + len(tokens)
            told = tokens[-1].finish_reason is not None
            used = (len(request.prompt_token_ids), count) if self._with_counts else None
            chunk = form.chunk(index, tokens, length, used)
            length += sum(len(token.text) for token in tokens)
            if first is not None:  # goes out together with the first token
                chunk, first = first + (chunk or b""), None
            if chunk is not None and not self.gone:
                await body(chunk)
        result = await request
        if not told and not self.gone and result.finish_reason != "cancelled":
            rest = result.text[length - len(echoed) :]
            used = (len(request.prompt_token_ids), count) if self._with_counts else None
            last = form.last(index, rest, result.finish_reason, used)
            await body((first or b"") + last)
        return result

    async def _notice_leaving(self, receive: Receive) -> None:
        """Cancels the requests when the client goes."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._running.cancel()

    async def _keep_awake(self, body: Callable[..., Awaitable[None]]) -> None:
        """Sends comments while nothing else is sent, so that nobody between takes it for dead."""
        while True:
            left = self._sent + self._keep_alive - time.perf_counter()
            await asyncio.sleep(max(left, 0.01))
            if time.perf_counter() - self._sent >= self._keep_alive and not self.gone:
                with suppress(OSError):
                    await body(_COMMENT)
