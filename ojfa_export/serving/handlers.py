"""The paths that generate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ojfa_export.engine.request import RequestResult
from ojfa_export.serving import asked
from ojfa_export.serving.answers import Form, usage_of
from ojfa_export.serving.asked import Asked
from ojfa_export.serving.catalogue import Catalogue
from ojfa_export.serving.errors import HttpError, draining
from ojfa_export.serving.metrics import Metrics
from ojfa_export.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Generating,
    StreamOptions,
    TokenizeRequest,
    parse,
)
from ojfa_export.serving.running import Running, all_tokens
from ojfa_export.serving.settings import Settings
from ojfa_export.serving.stream import Receive, Send, Stream

# Encoding a longer body is left to a thread, as others wait for this one; so is any chat, whose
# template may take seconds before it is stopped.
_LONG_BODY = 16 << 10


class Handlers:
    """Answers what clients ask of the models.

    Args:
        catalogue: The bundles.
        settings: Of the server.
        metrics: Of the server.
    """

    def __init__(self, catalogue: Catalogue, settings: Settings, metrics: Metrics) -> None:
        self._catalogue, self._settings, self._metrics = catalogue, settings, metrics

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._generate(request, CompletionRequest, asked.completion)

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, ChatRequest, asked.chat)

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        body = parse(TokenizeRequest, await self._read(request))
        served = self._catalogue.find(body.model)
        ids = await asyncio.to_thread(asked.tokens, served.model, body)
        length = served.model.manifest.cache.max_length
        return JSONResponse({"count": len(ids), "max_model_len": length, "tokens": ids})

    async def models(self, _: Request) -> Response:
        """`GET /v1/models`."""
        self._catalogue.must_be_ready()
        found = [each.about(self._settings.exit) for each in self._catalogue.served.values()]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        served = self._catalogue.find(request.path_params["name"])
        return JSONResponse(served.about(self._settings.exit))

    async def _generate(
        self,
        request: Request,
        kind: type[CompletionRequest] | type[ChatRequest],
        ask: Callable[..., Asked],
    ) -> Response:
        self._catalogue.must_be_ready()
        data = await self._read(request)
        body = parse(kind, data)
        served = self._catalogue.find(body.model)
        if len(data) > _LONG_BODY or isinstance(body, ChatRequest):
            wanted = await asyncio.to_thread(ask, served.model, body, self._settings.exit)
        else:
            wanted = ask(served.model, body, self._settings.exit)
        running = Running(served, wanted, self._settings.timeout)
        mark = request.scope["ojfa"]
        mark["facts"] |= {"model": served.name, "stream": bool(body.stream)}
        if self._settings.log_prompts:
            mark["facts"]["body"] = body.model_dump(exclude_none=True)
        form = Form(
            served.model,
            served.name,
            mark["id"],
            is_chat=isinstance(body, ChatRequest),
            has_logprobs=_has_logprobs(body),
            has_details=bool(body.token_details),
        )
        if body.stream:
            return _Streaming(self, body, running, form, mark["facts"])
        return await self._whole(request, running, form, mark["facts"])

    async def _whole(
        self, request: Request, running: Running, form: Form, facts: dict[str, Any]
    ) -> Response:
        """The answer in one piece; a client that leaves before has its requests cancelled."""
        leaving = asyncio.create_task(_cancel_when_gone(request, running))
        with running:
            try:
                results = await running.results()
            finally:
                leaving.cancel()
        if any(each.finish_reason == "cancelled" for each in results):
            raise draining()
        self._ended(running, results, facts)
        tokens = [all_tokens(each) for each in running.requests]
        parts = list(zip(results, tokens, running.echoed, strict=True))
        if self._settings.log_prompts:
            facts["answers"] = [result.text for result in results]
        return JSONResponse(form.whole(parts, running.prompts))

    async def stream(
        self,
        body: Generating,
        running: Running,
        form: Form,
        facts: dict[str, Any],
        receive: Receive,
        send: Send,
        send_body: Send,
    ) -> None:
        """The answer as events; see `Stream.run`."""
        wanted = body.stream_options or StreamOptions()
        stream = Stream(
            running,
            form,
            self._metrics.latencies(running.served.name),
            keep_alive=self._settings.keep_alive,
            with_usage=bool(wanted.include_usage),
            with_counts=bool(wanted.continuous_usage_stats),
            headers=[],
        )
        with running:
            results = await stream.run(receive, send, send_body)
        if results is not None:
            self._ended(running, results, facts)
            if self._settings.log_prompts:
                facts["answers"] = [result.text for result in results]
        else:
            facts["ended"] = "client left" if stream.gone else "failed"

    def _ended(self, running: Running, results: list[RequestResult], facts: dict[str, Any]) -> None:
        """Takes what is to be known of requests that have ended."""
        running.watch(results)
        latencies = self._metrics.latencies(running.served.name)
        latencies.end(max(each.seconds for each in results))
        usage = usage_of(results, running.prompts)
        facts |= {
            "prompt_tokens": usage["prompt_tokens"],
            "new_tokens": usage["completion_tokens"],
            "blocks_per_token": round(usage["blocks_per_token"], 2),
            "time_to_first_token": results[0].time_to_first_token,
            "ended": ",".join(sorted({each.finish_reason for each in results})),
        }

    async def _read(self, request: Request) -> bytes:
        """The body, if it isn't too large."""
        most = self._settings.max_body_bytes
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > most:
            raise _too_large(most)
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                raise _too_large(most)
        return bytes(data)


class _Streaming(Response):
    """A response that is made while it is sent."""

    def __init__(
        self,
        handlers: Handlers,
        body: Generating,
        running: Running,
        form: Form,
        facts: dict[str, Any],
    ) -> None:
        self._parts = (body, running, form, facts)
        self._handlers = handlers
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._handlers.stream(*self._parts, receive, send, scope["ojfa"]["send"])


def _has_logprobs(body: CompletionRequest | ChatRequest) -> bool:
    if isinstance(body, ChatRequest):
        return bool(body.logprobs)
    return body.logprobs is not None


async def _cancel_when_gone(request: Request, running: Running) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    running.cancel()


def _too_large(most: int) -> HttpError:
    return HttpError(
        413,
        f"the body is larger than {most} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
