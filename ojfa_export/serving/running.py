"""The engine's requests behind one request of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType

from ojfa_export.engine.request import Request, RequestResult, RequestToken
from ojfa_export.errors import OjfaError
from ojfa_export.serving.asked import Asked
from ojfa_export.serving.catalogue import Served
from ojfa_export.serving.errors import HttpError, of_engine


class Running:
    """All choices of all prompts, submitted together; `with` cancels what is left.

    Args:
        served: The bundle.
        asked: What was asked for.
        timeout: Seconds that they may take.

    Raises:
        HttpError: The engine refused one of them; none runs.

    Attributes:
        requests: Choice by choice, prompt by prompt.
        echoed: What the text of each begins with.
    """

    def __init__(self, served: Served, asked: Asked, timeout: float) -> None:
        self.served, self.prompts = served, len(asked.prompts)
        self.requests: list[Request] = []
        self.echoed: list[str] = []
        self.begun = time.perf_counter()
        served.burst.came()
        try:
            for prompt, options, echoed in zip(
                asked.prompts, asked.options, asked.echoed, strict=True
            ):
                for each in options:
                    self.requests.append(served.engine.submit(prompt, each, timeout=timeout))
                    self.echoed.append(echoed)
        except OjfaError as error:
            self.cancel()
            raise of_engine(error) from error

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends what hasn't ended."""
        for request in self.requests:
            if not request.done:
                request.cancel()

    async def results(self) -> list[RequestResult]:
        """All results.

        Raises:
            HttpError: A request failed, or its time was up before its first token.
        """
        try:
            results = await asyncio.gather(*(_result(request) for request in self.requests))
        except OjfaError as error:
            raise of_engine(error) from error
        check_time(results)
        return results

    def watch(self, results: Sequence[RequestResult]) -> None:
        """Gives what has ended to the watch of the promise."""
        if self.served.watch is not None:
            for request, result in zip(self.requests, results, strict=True):
                self.served.watch.consider(request, result)


async def _result(request: Request) -> RequestResult:
    return await request


def check_time(results: Sequence[RequestResult]) -> None:
    """Refuses what gave nothing within its time.

    Raises:
        HttpError: 504.
    """
    if any(each.finish_reason == "timeout" and not each.token_ids for each in results):
        raise HttpError(
            504, "no token came within the server's timeout; try again later", code="timeout"
        )


def all_tokens(request: Request) -> list[RequestToken]:
    """The tokens of a request that has ended."""
    return list(request)
