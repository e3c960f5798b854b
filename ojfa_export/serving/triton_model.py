"""What Triton's Python backend runs: an engine, and requests that stream from it.

Triton imports it in a process of its own, through the repository's model.py, and calls the three
methods of `TritonPythonModel`. Requests run together in the engine; Triton batches nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from ojfa_export.engine.engine import Engine
from ojfa_export.engine.request import Request, RequestResult
from ojfa_export.errors import OjfaError
from ojfa_export.runtime.model import Model
from ojfa_export.serving import logs
from ojfa_export.serving.asked import Asked, chat, completion
from ojfa_export.serving.catalogue import open_served
from ojfa_export.serving.errors import HttpError, of_engine, refused
from ojfa_export.serving.protocol import ChatRequest, CompletionRequest, parse
from ojfa_export.serving.running import check_time
from ojfa_export.serving.triton_repository import BUNDLE

_PROMPTS = ("text_input", "input_ids", "messages")
_BESIDE = ("max_tokens", "temperature", "seed")
# Fields of a body whose answers have no place among the outputs.
_ELSEWHERE = (
    "prompt", "messages", "model", "stream", "stream_options", "n", "echo", "logprobs",
    "top_logprobs", "token_details",
)  # fmt: skip
_LOOK = 0.05  # seconds between two looks at whether a client has cancelled


class TritonPythonModel:
    """One instance: a bundle, an engine, and a thread that sends tokens."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle beside model.py.

        Args:
            args: Triton's; the model's configuration and where it stands.

        Raises:
            OjfaError: It can't be opened; Triton says so and goes on without the model.
        """
        logs.write_to_standard_error()
        given = json.loads(args["model_config"])["parameters"]
        self._parameters = {name: each["string_value"] for name, each in given.items()}
        if args["model_instance_kind"] == "GPU":
            _see_one_gpu(int(args["model_instance_device_id"]))
        exit = self._parameters["exit"]
        self._exit: Any = int(exit) if exit.isdecimal() else exit
        self._timeout = float(self._parameters["timeout"])
        self._served = open_served(
            args["model_name"],
            Path(args["model_repository"], args["model_version"], BUNDLE),
            backend=self._parameters["backend"],
            exit=self._exit,
            make_engine=self._make_engine,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Takes requests and returns at once; answers are sent as tokens come.

        Args:
            requests: Triton's.
        """
        for request in requests:
            asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    def finalize(self) -> None:
        """Ends the engine; Triton calls it when nothing runs."""
        self._served.engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _answer(self, request: Any) -> None:
        sender, begun = request.get_response_sender(), time.perf_counter()
        facts: dict[str, Any] = {"id": request.request_id() or None, "model": self._served.name}
        try:
            # In a thread, as a chat's template may take long and streams go on meanwhile.
            model = self._served.model
            asked, is_streamed = await asyncio.to_thread(_asked, model, request, self._exit)
            result = await self._generate(sender, asked, is_streamed)
            facts |= {"new_tokens": result.usage.new_tokens, "ended": result.finish_reason}
        except (HttpError, OjfaError) as error:
            told = error if isinstance(error, HttpError) else of_engine(error)
            facts |= {"status": told.status, "refused": told.message}
            _fail(sender, told.message, _code(told.status))
        except Exception as error:  # Triton waits for an answer, whatever it is
            logs.failure(error, **facts)
            _fail(sender, f"the model failed on this request (a bug): {error!r}", "INTERNAL")
        logs.tell("request", **facts, seconds=round(time.perf_counter() - begun, 6))

    async def _generate(self, sender: Any, asked: Asked, is_streamed: bool) -> RequestResult:
        """Sends an answer, and its end.

        Raises:
            HttpError: No token came in time.
            OjfaError: The engine refuses the request, or failed on it.
        """
        (prompt,), ((options,),) = asked.prompts, asked.options
        with self._served.engine.submit(prompt, options, timeout=self._timeout) as request:
            looking = asyncio.create_task(_cancel_when_asked(sender, request))
            try:
                told, length = False, 0
                async for tokens in request.arrivals():
                    if is_streamed:
                        text = "".join(token.text for token in tokens)
                        reason = tokens[-1].finish_reason
                        told, length = reason is not None, length + len(text)
                        _send(
                            sender,
                            text,
                            [token.id for token in tokens],
                            [token.blocks_run for token in tokens],
                            reason,
                        )
                result = await request
            finally:
                looking.cancel()
        if result.finish_reason == "cancelled":
            _fail(sender, "the request was cancelled", "CANCELLED")
            return result
        check_time([result])
        if not is_streamed:
            blocks = list(result.exit_blocks)
            _send(sender, result.text, list(result.token_ids), blocks, result.finish_reason)
        elif not told:
            _send(sender, result.text[length:], [], [], result.finish_reason)
        sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return result

    def _make_engine(self, model: Model) -> Engine:
        given = self._parameters
        cache = given.get("kv_cache")
        return Engine(
            model,
            max_sequences=int(given["max_sequences"]),
            kv_cache_bytes=None if cache is None else int(cache),
            max_queue=int(given["max_queue"]),
        )


def _asked(model: Model, request: Any, exit: Any) -> tuple[Asked, bool]:
    """What a request asks for, and whether it wants tokens as they come.

    Raises:
        HttpError: Something is wrong.
    """
    given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    prompts = [name for name in _PROMPTS if name in given]
    if len(prompts) != 1:
        raise HttpError(400, f"give one of {', '.join(_PROMPTS)}")
    # What is no input comes as a parameter, by HTTP at least; Triton's own begin as it does.
    beside = json.loads(request.parameters() or "{}")
    body = {name: value for name, value in beside.items() if not name.startswith("triton_")}
    body |= _object(given["options"]) if "options" in given else {}
    for name in (*_ELSEWHERE, *_BESIDE, "exit"):
        if name in body:
            is_input = name in (*_BESIDE, "exit", "stream")
            raise refused(
                name, "give it as an input" if is_input else "only over OpenAI's protocol"
            )
    (name,) = prompts
    values = given[name].reshape(-1)
    if name == "input_ids":
        body["prompt"] = [int(value) for value in values]
    elif name == "messages":
        body["messages"] = _json("messages", _text("messages", values))
    else:
        body["prompt"] = _text("text_input", values)
    for name in _BESIDE:
        if name in given:
            body[name] = given[name].reshape(-1)[0].item()
    if "exit" in given:
        wanted = _text("exit", given["exit"].reshape(-1))
        body["exit"] = int(wanted) if wanted.isdecimal() and len(wanted) < 10 else wanted
    kind, ask = (ChatRequest, chat) if "messages" in body else (CompletionRequest, completion)
    is_streamed = "stream" in given and bool(given["stream"].reshape(-1)[0])
    return ask(model, parse(kind, json.dumps(body).encode()), exit), is_streamed


def _object(values: Any) -> dict[str, Any]:
    read = _json("options", _text("options", values.reshape(-1)))
    if not isinstance(read, dict):
        raise refused("options", "it must be an object of JSON")
    return read


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise refused(name, f"it is no JSON: {error}") from None


def _text(name: str, values: Any) -> str:
    if len(values) != 1:
        raise refused(name, "it must be one text")
    try:
        return str(values[0], "utf-8")
    except UnicodeDecodeError:
        raise refused(name, "it is no UTF-8") from None


async def _cancel_when_asked(sender: Any, request: Request) -> None:
    """Cancels a request when its client has; Triton tells it to who asks."""
    while not sender.is_cancelled():
        await asyncio.sleep(_LOOK)
    request.cancel()


def _send(sender: Any, text: str, ids: list[int], blocks: list[int], reason: str | None) -> None:
    tensors = [
        triton.Tensor("text_output", np.array([text.encode()], dtype=np.object_)),
        triton.Tensor("token_ids", np.array(ids, dtype=np.int32)),
        triton.Tensor("blocks_run", np.array(blocks, dtype=np.int32)),
        triton.Tensor("finish_reason", np.array([(reason or "").encode()], dtype=np.object_)),
    ]
    sender.send(triton.InferenceResponse(output_tensors=tensors))


def _fail(sender: Any, message: str, code: str) -> None:
    error = triton.TritonError(message, getattr(triton.TritonError, code))
    sender.send(
        triton.InferenceResponse(output_tensors=[], error=error),
        flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )


def _code(status: int) -> str:
    """Triton's code for a status of HTTP."""
    if status in (429, 503, 504):
        return "UNAVAILABLE"
    return "INVALID_ARG" if status < 500 else "INTERNAL"


def _see_one_gpu(number: int) -> None:
    """Makes the instance's GPU the only one of its process; it counts among those of Triton's."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = seen.split(",") if seen else []
    os.environ["CUDA_VISIBLE_DEVICES"] = found[number] if number < len(found) else str(number)
