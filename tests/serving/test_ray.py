"""Ray Serve with replicas that come, go and die; `make ray` runs it.

Ray's own processes talk to each other on every interface that there is, so these tests want a place
that has loopback alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest

import ojfa_export
from ojfa_export.errors import BackendError, OverloadedError, UsageError
from ojfa_export.runtime.model import Model

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
serve = pytest.importorskip("ray.serve", reason="ray is not installed: make ray")
ray = pytest.importorskip("ray")

from ojfa_export.serving import ray_app  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENS, PORT = 900, 18_000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        set(psutil.net_if_addrs()) != {"lo"}, reason="there is more than loopback: make ray"
    ),
]


@dataclass
class Stream:
    """A stream that a thread of its own reads.

    Attributes:
        text: That has come.
        whole: Whether it came to its end.
        error: How it broke off.
    """

    prompt: str
    text: str = ""
    whole: bool = False
    error: Exception | None = None
    begun: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        body = {
            "prompt": self.prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        try:
            with httpx.stream("POST", url("/v1/completions"), json=body, timeout=120) as answer:
                assert answer.status_code == 200
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        self.whole = True
                    elif line.startswith("data: "):
                        self.text += httpx.Response(200, text=line[6:]).json()["choices"][0]["text"]
                        self.begun.set()
        except Exception as error:
            self.error = error


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def deploy(cluster: None, long_bundle: Path) -> Iterator[Callable[..., None]]:
    """Deploys a bundle as "demo", with options of Ray."""

    def make(bundle: Path = long_bundle, **options: Any) -> None:
        args = {"bundles": {"demo": str(bundle)}, "max_sequences": 8}
        options = {"max_ongoing_requests": 16, "graceful_shutdown_timeout_s": 60.0} | options
        serve.run(ray_app.bundles.options(**options).bind(args), name="ojfa", route_prefix="/")

    yield make
    serve.delete("ojfa")


@pytest.fixture(scope="module")
def model(long_bundle: Path) -> Model:
    return ojfa_export.load(long_bundle)


@pytest.fixture(scope="module")
def wanted(model: Model) -> Callable[[str], str]:
    """What full depth says after a prompt."""
    known: dict[str, str] = {}

    def say(prompt: str) -> str:
        if prompt not in known:
            done = model.generate(prompt, exit="full", max_new_tokens=TOKENS, ignore_eos=True)
            known[prompt] = done.prompts[0].text
        return known[prompt]

    return say


@pytest.fixture
def streams() -> Iterator[Callable[[int], list[Stream]]]:
    """Begins streams; all have begun when it returns."""
    with ThreadPoolExecutor(16) as pool:

        def begin(count: int) -> list[Stream]:
            made = [Stream(f"def function_{number}(") for number in range(count)]
            done = [pool.submit(each.read) for each in made]
            for stream, future in zip(made, done, strict=True):
                while not stream.begun.wait(0.1):
                    assert not future.done(), stream.error
            return made

        yield begin


def test_a_replica_dies_in_the_middle_of_streams(deploy, streams, wanted):
    deploy(num_replicas=2)
    running = streams(8)
    dying, other = replicas()
    os.kill(dying, signal.SIGKILL)
    # Meanwhile requests go to the other one; what was on its way to the dead one is tried again.
    client = openai.OpenAI(base_url=url("/v1"), api_key="none", max_retries=5)
    for _ in range(8):
        made = client.completions.create(
            model="demo", prompt="import ", temperature=0, max_tokens=8, extra_body={"exit": 6}
        )
        assert made.usage.completion_tokens == 8
    wait_for(lambda: all(each.whole or each.error for each in running), "streams end")
    whole = [each for each in running if each.whole]
    broken = [each for each in running if not each.whole]
    assert whole
    assert broken
    for each in whole:
        assert each.text == wanted(each.prompt)
    for each in broken:  # an error of the protocol, after tokens that are right
        assert isinstance(each.error, httpx.RemoteProtocolError | httpx.ReadError)
        assert wanted(each.prompt).startswith(each.text)
    wait_for(lambda: len(replicas()) == 2, "another replica takes its place")
    assert other in replicas()
    assert dying not in replicas()


def test_another_bundle_takes_over_while_requests_run(deploy, streams, wanted, served_bundle):
    deploy(num_replicas=2)
    running, ended, failures = streams(4), threading.Event(), []

    def ask() -> None:
        while not ended.is_set():
            answer = httpx.post(
                url("/v1/completions"), json={"prompt": "x", "max_tokens": 2}, timeout=60
            )
            if answer.status_code != 200:
                failures.append((answer.status_code, answer.text))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        deploy(served_bundle, num_replicas=2)
    finally:
        ended.set()
        asking.join()
    assert not failures
    assert {blocks() for _ in range(8)} == {4}
    wait_for(lambda: all(each.whole or each.error for each in running), "streams end")
    assert [each.text for each in running] == [wanted(each.prompt) for each in running]
    assert all(each.whole for each in running)


def test_a_queue_brings_another_replica(deploy, streams, wanted):
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5, "metrics_interval_s": 0.2, "look_back_period_s": 1.0,
    }  # fmt: skip
    deploy(autoscaling_config=scaling)
    assert len(replicas()) == 1
    running = streams(8)
    wait_for(lambda: len(replicas()) == 2, "another replica starts")
    wait_for(lambda: all(each.whole or each.error for each in running), "streams end")
    assert [each.text for each in running] == [wanted(each.prompt) for each in running]


def test_a_client_that_leaves_has_its_request_cancelled(deploy):
    deploy()
    body = {"prompt": "import ", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url("/v1/completions"), json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # it is kept, as the answer is closed with it
        next(lines)
        wait_for(lambda: is_running() == 1, "it runs")
    wait_for(lambda: is_running() == 0, "it is cancelled")
    text = httpx.get(url("/metrics")).text
    assert 'finished_reason="abort",model_name="demo"} 1.0' in text


def test_the_file_of_the_documentation(long_bundle, tmp_path):
    """`serve run` on it, with another bundle and address."""
    import yaml

    settings = yaml.safe_load((ROOT / "docs" / "ray.yaml").read_text(encoding="utf-8"))
    settings["http_options"]["port"] = PORT + 1
    (application,) = settings["applications"]
    application["args"]["bundles"] = {"demo": str(long_bundle)}
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 1}
    file = tmp_path / "ray.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    serve_run = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(serve_run, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: is_answered(PORT + 1) or process.poll() is not None, "it is ready")
            assert process.poll() is None, (tmp_path / "log").read_text()
            answer = httpx.get(url("/v1/models", PORT + 1)).json()["data"]
            assert [each["id"] for each in answer] == ["demo"]
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "args: bundles: field required"),
        ({"bundles": {}}, "args: bundles"),
        ({"bundles": {"a": "/a"}, "exits": 6}, "args: exits: extra inputs are not permitted"),
        ({"bundles": {"a": "a.ojfa"}}, "a.ojfa is no absolute path"),
        ({"bundles": {"a": "/a"}, "exit": "some"}, "args: exit"),
    ],
)
def test_wrong_arguments_are_told(args, message):
    with pytest.raises(UsageError, match=message):
        ray_app.app(args)


@pytest.mark.parametrize(
    ("failed", "answer", "raises"),
    [(0, BackendError("no device"), False), (1, BackendError("no device"), True),
     (1, OverloadedError("busy"), False)],
)  # fmt: skip
def test_an_engine_that_gives_no_token_is_found(failed, answer, raises):
    class Failing:
        def stats(self) -> Any:
            return SimpleNamespace(finished={"error": failed})

        def submit(self, *_: Any, **__: Any) -> Any:
            raise answer

    replica = object.__new__(ray_app.Replica)
    replica._failed = {"demo": 0}
    replica._catalogue = SimpleNamespace(served={"demo": SimpleNamespace(engine=Failing())})
    for _ in range(2):  # another look asks only where more have failed
        try:
            asyncio.run(replica.check_health())
        except BackendError:
            assert raises
            raises = False
    assert not raises


def url(path: str, port: int = PORT) -> str:
    return f"http://127.0.0.1:{port}{path}"


def blocks() -> int:
    return httpx.get(url("/v1/models")).json()["data"][0]["ojfa"]["blocks"]


def is_running() -> int:
    return httpx.get(url("/health")).json()["models"]["demo"]["running"]


def is_answered(port: int) -> bool:
    try:
        return httpx.get(url("/health", port), timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def replicas() -> list[int]:
    """Processes of replicas that Ray counts as running."""
    deployments = serve.status().applications["ojfa"].deployments
    count = deployments["bundles"].replica_states.get("RUNNING", 0)
    found = [
        each.pid
        for each in psutil.Process().children(recursive=True)
        if each.name().startswith("ray::ServeRepli")
    ]
    return found if len(found) == count else []


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)
