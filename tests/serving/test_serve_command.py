"""The real command, over loopback, by clients that are not ours."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner
from serving.started import Started

from ojfa_export import backends
from ojfa_export.cli.app import app
from ojfa_export.errors import UsageError
from ojfa_export.runtime.model import Model
from ojfa_export.serving.catalogue import names_of, open_served
from ojfa_export.serving.keys import Keys, read_keys


@pytest.fixture(scope="module")
def server(served_bundle: Path) -> Iterator[Started]:
    started = Started(str(served_bundle), "--max-sequences", "2")
    yield started
    started.kill()


def test_it_listens_on_this_machine_alone(server):
    listening = [
        each.laddr.ip
        for each in psutil.Process(server.process.pid).net_connections()
        if each.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_the_client_of_openai(server, model: Model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    wanted = model.generate("import ", exit=2, max_new_tokens=8).prompts[0].text
    made = client.completions.create(
        model="small", prompt="import ", temperature=0, max_tokens=8, extra_body={"exit": 2}
    )
    assert made.choices[0].text == wanted
    messages = [{"role": "user", "content": "hello"}]
    wanted = model.chat(messages, max_new_tokens=8).text
    stream = client.chat.completions.create(
        model="small", messages=messages, temperature=0, max_tokens=8, stream=True
    )
    assert "".join(each.choices[0].delta.content or "" for each in stream) == wanted
    assert [each.id for each in client.models.list()] == ["small"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="small", prompt="x", temperature=9)


def test_sigterm_lets_a_stream_finish(server, model: Model):
    wanted = model.generate("import ", exit="full", max_new_tokens=50, ignore_eos=True)
    body = {
        "prompt": "import ", "temperature": 0, "max_tokens": 50, "ignore_eos": True,
        "stream": True, "token_details": True,
    }  # fmt: skip
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        text += next(lines)
        server.process.send_signal(signal.SIGTERM)
        text += "\n".join(lines)
    assert text.rstrip().endswith("[DONE]")
    assert text.count('"blocks_run"') == len(wanted.prompts[0].token_ids)
    assert server.process.wait(30) == 0
    assert any('"drained"' in line for line in server.log)
    assert not any("import " in line for line in server.log), "a prompt is in the log"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.ojfa"], "there is no bundle"),
        (["a", "--api-key-file", "nowhere"], "nowhere"),
        (["a", "--exit", "some"], "exit"),
        (["a", "--kv-cache", "much"], "a size in bytes"),
        ([], "BUNDLES"),
    ],
)
def test_wrong_usage_is_told(arguments, message):
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code in (1, 2)
    assert message.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told(served_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", str(served_bundle), "--port", port])
    assert done.exit_code == 2
    assert "can't listen on 127.0.0.1" in done.stderr


def test_keys_and_names(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    keys = Keys(read_keys(file))
    assert keys.accept(b"Bearer one")
    assert keys.accept(b"bearer two")
    assert not keys.accept(b"Bearer on")
    assert not keys.accept(b"Basic one")
    assert not keys.accept(None)
    assert Keys(()).accept(None)
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="has no key"):
        read_keys(file)
    assert names_of([Path("x/a.ojfa"), Path("b")]) == ["a", "b"]
    with pytest.raises(UsageError, match="two bundles"):
        names_of([Path("x/a.ojfa"), Path("y/a.ojfa")])


@pytest.mark.parametrize(("exit", "depths"), [("full", ()), (2, (2,)), ("auto", None)])
def test_a_device_is_warmed_up_for_the_exit_of_requests(
    served_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch, exit, depths
):
    asked: list[tuple[bool, tuple[int, ...]]] = []

    class Watched:
        def __init__(self, model: Model) -> None: ...

        def warm_up(self, *, sampled: bool, exits: tuple[int, ...]) -> None:
            asked.append((sampled, tuple(exits)))

    monkeypatch.setattr(backends, "DEFAULT", "another")  # as if the CPU were a device
    open_served("small", served_bundle, backend="onnxruntime", exit=exit, make_engine=Watched)
    if depths is None:
        depths = model.auto_policy().exits
        assert depths
    assert asked == [(True, depths)]
