"""The real tritonserver of nvidia-pytriton on a repository; `make triton` runs it."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ojfa_export.runtime.model import Model
from ojfa_export.serving.triton_repository import INPUTS, TritonSettings, write_repository

pytest.importorskip("pytriton", reason="nvidia-pytriton is not installed: make triton")
grpc = pytest.importorskip("tritonclient.grpc", reason="its client is not installed: make triton")

TOKENS = 900
KINDS = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL"}
ARRAYS = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
}
pytestmark = pytest.mark.slow


class Server:
    """tritonserver in a process of its own."""

    def __init__(self, repository: Path, place: Path) -> None:
        import pytriton

        packages = Path(pytriton.__file__).parents[1]
        root = packages / "pytriton" / "tritonserver"
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        shutil.copytree(root / "backends", place / "backends")
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, place / "backends" / "python")
        self.http, self.grpc, self.log = free_port(), free_port(), place / "log"
        options = {
            "model-repository": repository, "backend-directory": place / "backends",
            "http-address": "127.0.0.1", "http-port": self.http, "grpc-address": "127.0.0.1",
            "grpc-port": self.grpc, "allow-metrics": "false",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [
                root / "bin" / "tritonserver",
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            env=os.environ
            | {
                "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OJFA_THREADS": "1",
            },
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 120
        while not self.is_ready():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.http}/v2/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ended(self, id: str) -> dict[str, Any]:
        """The line that the model logs when a request has ended."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for line in self.text().splitlines():
                if '"event": "request"' in line and f'"id": "{id}"' in line:
                    return json.loads(line)
            time.sleep(0.05)
        raise AssertionError(f"{id} did not end")

    def url(self, model: str, how: str) -> str:
        return f"http://127.0.0.1:{self.http}/v2/models/{model}/{how}"


@pytest.fixture(scope="module")
def server(
    long_bundle: Path, served_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("triton")
    models = place / "models"
    write_repository(long_bundle, models, TritonSettings(max_sequences=2, max_queue=2), name="long")
    write_repository(
        served_bundle, models, TritonSettings(max_sequences=4), name="small", link=True
    )
    started = Server(models, place)
    yield started
    started.process.terminate()
    assert started.process.wait(60) == 0


@pytest.fixture
def call(server: Server) -> Iterator[Callable[..., Any]]:
    """Begins a stream over gRPC; its answers come by a queue."""
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:

        def begin(model: str, id: str = "", **inputs: Any) -> tuple[Any, queue.Queue[Any]]:
            answers: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(
                model,
                [tensor(name, value) for name, value in inputs.items()],
                request_id=id,
                enable_empty_final_response=True,
            )
            return client, answers

        yield begin
        client.stop_stream()


def test_tokens_stream_over_http(server, model: Model):
    wanted = model.generate("import ", exit=2, max_new_tokens=20, ignore_eos=True).prompts[0]
    body = {
        "text_input": "import ", "max_tokens": 20, "temperature": 0, "exit": "2", "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    with httpx.stream("POST", server.url("small", "generate_stream"), json=body) as answer:
        found = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert "".join(each["text_output"] for each in found) == wanted.text
    assert [id for each in found for id in flat(each["token_ids"])] == list(wanted.token_ids)
    assert {blocks for each in found for blocks in flat(each["blocks_run"])} == {2}
    assert [each["finish_reason"] for each in found][-1] == "max_new_tokens"


def test_whole_answers_over_http(server, model: Model):
    ids = model.encode("import ")
    wanted = model.generate([ids], exit="full", max_new_tokens=9).prompts[0]
    found = post(server, "small", input_ids=ids, max_tokens=9, temperature=0).json()
    assert found["text_output"] == wanted.text
    assert flat(found["token_ids"]) == list(wanted.token_ids)
    messages = [{"role": "user", "content": "hello"}]
    found = post(server, "small", messages=json.dumps(messages), max_tokens=9, temperature=0).json()
    assert found["text_output"] == model.chat(messages, max_new_tokens=9).text


def test_tokens_stream_over_grpc(call, model: Model):
    options = {"sample": True, "temperature": 0.5, "seed": 7, "max_new_tokens": 20}
    wanted = model.generate("x = ", exit="full", ignore_eos=True, **options).prompts[0]
    _, answers = call(
        "small", text_input="x = ", max_tokens=20, temperature=0.5, seed=7, stream=True,
        options='{"ignore_eos": true, "stop": ["never"]}',
    )  # fmt: skip
    text, ids = b"", []
    while True:
        result, error = answers.get(timeout=60)
        assert error is None
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
        text += result.as_numpy("text_output")[0]
        ids += result.as_numpy("token_ids").tolist()
    assert text.decode() == wanted.text
    assert ids == list(wanted.token_ids)


def test_many_at_once(server, model: Model):
    prompts = [f"def f{number}(" for number in range(32)]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(
            lambda prompt: post(server, "small", text_input=prompt, max_tokens=8, temperature=0),
            prompts,
        )
        texts = [each.json()["text_output"] for each in found]
    done = [model.generate(prompt, exit="full", max_new_tokens=8) for prompt in prompts]
    assert texts == [each.prompts[0].text for each in done]


def test_a_full_queue_says_so(server):
    """Two run, two wait; those refused may come again."""
    with ThreadPoolExecutor(12) as pool:
        found = list(
            pool.map(
                lambda number: post(
                    server, "long", text_input=f"def f{number}(", max_tokens=300, ignore_eos=True
                ),
                range(12),
            )
        )
    refused = [each for each in found if each.status_code != 200]
    assert 0 < len(refused) <= 8
    assert all("try again later" in each.json()["error"] for each in refused)


def test_a_client_cancels_over_grpc(server, call):
    client, answers = call(
        "long", "by-grpc", text_input="import ", max_tokens=TOKENS, stream=True,
        options='{"ignore_eos": true}',
    )  # fmt: skip
    assert answers.get(timeout=60)[1] is None
    client.stop_stream(cancel_requests=True)
    ended = server.ended("by-grpc")
    assert ended["ended"] == "cancelled"
    assert 0 < ended["new_tokens"] < TOKENS


def test_a_client_leaves_over_http(server):
    body = {
        "id": "by-http", "text_input": "import ", "max_tokens": TOKENS, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    with httpx.stream("POST", server.url("long", "generate_stream"), json=body) as answer:
        lines = answer.iter_lines()  # it is kept, as the answer is closed with it
        next(lines)
    ended = server.ended("by-http")
    assert ended["ended"] == "cancelled"
    assert 0 < ended["new_tokens"] < TOKENS


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give one of text_input, input_ids, messages"),
        ({"text_input": "x", "input_ids": [1]}, "give one of"),
        ({"text_input": "x", "max_tokens": -1}, "max_tokens"),
        ({"text_input": "x", "temperature": 9.0}, "temperature"),
        ({"text_input": "x", "exit": "some"}, "exit"),
        ({"text_input": "x", "exit": "77"}, "exit"),
        ({"text_input": "x", "top_p": 7.0}, "top_p"),
        ({"text_input": "x", "n": 2}, "n: only over OpenAI's protocol"),
        ({"text_input": "x", "suffix": "y"}, "suffix"),
        ({"text_input": "x", "options": "{"}, "options: it is no JSON"),
        ({"text_input": "x", "options": "[]"}, "options: it must be an object"),
        ({"text_input": "x", "options": '{"seed": 1}'}, "seed: give it as an input"),
        ({"input_ids": [1, 320]}, "prompt"),
        ({"input_ids": [-1]}, "prompt"),
        ({"messages": "{}"}, "messages"),
    ],
)
def test_wrong_inputs_are_told(server, body, message):
    answer = httpx.post(server.url("small", "generate"), json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert post(server, "small", text_input="x", max_tokens=1).status_code == 200


def test_wrong_inputs_are_told_over_grpc(call):
    _, answers = call("small", text_input="x", max_tokens=0)
    _, error = answers.get(timeout=60)
    assert "max_tokens" in error.message()


def tensor(name: str, value: Any) -> Any:
    type = INPUTS[name][0]
    kind = KINDS.get(type, type.removeprefix("TYPE_"))
    array = np.array([value.encode() if isinstance(value, str) else value], dtype=ARRAYS[kind])
    made = grpc.InferInput(name, [1], kind)
    made.set_data_from_numpy(array)
    return made


def post(server: Server, model: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url(model, "generate"), json=body, timeout=60)


def flat(value: Any) -> list[int]:
    """Triton writes a list of one number as that number."""
    return value if isinstance(value, list) else [value]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
