"""The server in this process: its answers against the engine's and the model's own."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundle.bundle_copy import BundleCopy
from serving.conftest import client_of, events

import ojfa_export
from ojfa_export.bundle.names import CHAT as CHAT_FILE
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.engine.engine import Engine
from ojfa_export.models import template_limits
from ojfa_export.serving import burst
from ojfa_export.serving.catalogue import Catalogue, Served
from ojfa_export.serving.promise_watch import PromiseWatch

PROMPT = "def parse("
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
DASHBOARD = Path(__file__).parents[2] / "docs" / "serving-dashboard.json"
# Metrics that are there where a promise is watched.
OF_PROMISES = {"ojfa:promise_alarm", "ojfa:promise_max_disagreement", "ojfa:disagreement"}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("exit", [2, "full", "auto"])
def test_completions_are_those_of_the_model(client, model, exit):
    wanted = model.generate(PROMPT, exit=exit, max_new_tokens=12, ignore_eos=True).prompts[0]

    async def main():
        async with client() as http:
            body = {**GREEDY, "exit": exit, "token_details": True}
            whole = (await http.post(COMPLETIONS, json=body)).json()
            counts = {"include_usage": True, "continuous_usage_stats": True}
            body |= {"stream": True, "stream_options": counts}
            return whole, events((await http.post(COMPLETIONS, json=body)).text)

    whole, chunks = asyncio.run(main())
    choice = whole["choices"][0]
    assert choice["text"] == wanted.text
    assert [each["blocks_run"] for each in choice["tokens"]] == wanted.exit_blocks
    assert all(0 < each["confidence"] <= 1 for each in choice["tokens"])
    assert "".join(each["choices"][0]["text"] for each in chunks[:-1]) == wanted.text
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    so_far = [each["usage"]["completion_tokens"] for each in chunks]
    assert so_far == sorted(so_far)
    assert so_far[-2] == 12
    assert {each["usage"]["prompt_tokens"] for each in chunks} == {whole["usage"]["prompt_tokens"]}
    assert chunks[-1]["usage"]["completion_tokens"] == 12 == whole["usage"]["completion_tokens"]


def test_chats_are_those_of_the_model(client, model):
    wanted = model.chat(MESSAGES, max_new_tokens=9)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]

    async def main():
        async with client() as http:
            body = {"messages": MESSAGES, "temperature": 0, "max_completion_tokens": 9}
            whole = (await http.post(CHAT, json=body)).json()
            same = (await http.post(CHAT, json={**body, "messages": parts})).json()
            stream = await http.post(CHAT, json={**body, "stream": True})
            return whole, same, events(stream.text)

    whole, same, chunks = asyncio.run(main())
    assert whole["choices"][0]["message"]["content"] == wanted.text
    assert same["choices"][0]["message"] == whole["choices"][0]["message"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in chunks) == wanted.text


def test_a_template_without_end_stops_nobody_else(served_bundle, tmp_path, monkeypatch):
    copy = BundleCopy(served_bundle, tmp_path / "endless.ojfa")
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chat = {"templates": {"default": loop}, "special_tokens": {}}
    copy.own(CHAT_FILE).write_text(json.dumps(chat), encoding="utf-8")
    copy.sign(CHAT_FILE)
    monkeypatch.setattr(template_limits, "SECONDS", 1.0)  # a completion takes a part of it
    answered: list[str] = []

    async def post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
        answer = await http.post(path, json=body)
        answered.append(path)
        return answer

    async def main():
        model = ojfa_export.load(copy.directory)
        with Engine(model, max_sequences=2) as engine:
            async with client_of(Catalogue([Served("endless", model, engine)])) as http:
                return await asyncio.gather(
                    post(http, CHAT, {"messages": MESSAGES}), post(http, COMPLETIONS, GREEDY)
                )

    refused, other = asyncio.run(main())
    assert refused.status_code == 400
    assert "it takes more than 1 s" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "messages"
    assert other.status_code == 200
    assert answered == [COMPLETIONS, CHAT]


def test_requests_of_a_burst_begin_together(model, monkeypatch):
    """As many passes as the requests have tokens; seconds in place of fractions of them."""
    for name in ("_ALONE", "_QUIET", "_MOST"):
        monkeypatch.setattr(burst, name, 0.3)
    bodies = [{**GREEDY, "prompt": [first, 3]} for first in (4, 5, 6)]

    async def main():
        with Engine(model, max_sequences=4) as engine:
            async with client_of(Catalogue([Served("small", model, engine)])) as http:
                answers = await asyncio.gather(
                    *(http.post(COMPLETIONS, json=body) for body in bodies)
                )
            return engine.stats(), [each.json()["usage"] for each in answers]

    stats, used = asyncio.run(main())
    assert stats.passes == used[0]["completion_tokens"] == stats.new_tokens // 3


def test_many_prompts_with_several_answers_each(client, model):
    prompts = [PROMPT, [3, 4, 5]]
    options = GenerationOptions(
        temperature=1.0, sample=True, max_new_tokens=6, ignore_eos=True, exit="full"
    )
    wanted = [
        model.generate([prompt], options, seed=seed).prompts[0].text
        for prompt in (PROMPT, [3, 4, 5])
        for seed in (7, 8)
    ]

    async def main():
        async with client() as http:
            body = {"temperature": 1, "max_tokens": 6, "ignore_eos": True, "seed": 7, "n": 2}
            one = await http.post(COMPLETIONS, json={**body, "prompt": PROMPT})
            ids = await http.post(COMPLETIONS, json={**body, "prompt": [[3, 4, 5]]})
            two = await http.post(
                COMPLETIONS, json={**body, "prompt": [model.encode(PROMPT), prompts[1]]}
            )
            return one.json(), ids.json(), two.json()

    one, ids, two = asyncio.run(main())
    assert [each["text"] for each in one["choices"] + ids["choices"]] == wanted
    assert [each["text"] for each in two["choices"]] == wanted


def test_logprobs_stops_echo_and_tokenize(client, model):
    text = model.generate(PROMPT, exit="full", max_new_tokens=12, ignore_eos=True).prompts[0].text
    stop = next(each for each in text[3:] if each.strip())

    async def main():
        async with client() as http:
            stopped = (await http.post(COMPLETIONS, json={**GREEDY, "stop": stop})).json()
            echoed = (await http.post(COMPLETIONS, json={**GREEDY, "echo": True})).json()
            found = (await http.post(COMPLETIONS, json={**GREEDY, "logprobs": 2})).json()
            body = {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
            chat = (await http.post(CHAT, json=body)).json()
            tokens = (await http.post("/tokenize", json={"prompt": PROMPT})).json()
            return stopped, echoed, found, chat, tokens

    stopped, echoed, found, chat, tokens = asyncio.run(main())
    assert stopped["choices"][0]["text"] == text[: text.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert echoed["choices"][0]["text"] == PROMPT + text
    logprobs = found["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 12
    assert max(logprobs["top_logprobs"][0].values()) == logprobs["token_logprobs"][0]
    assert all(len(e["top_logprobs"]) == 2 for e in chat["choices"][0]["logprobs"]["content"])
    assert tokens["tokens"] == model.encode(PROMPT)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 5}, "temperature"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"exit": 99}, "exit"),
        ({"exit": "some"}, "exit"),
        ({"exit": 2, "speculate": True}, "speculate"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"n": 99}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"min_tokens": 3, "ignore_eos": False}, "min_tokens"),
        ({"stream_options": {}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
        ),
        ({"max_disagreement": 0.1, "exit": "auto"}, "max_disagreement"),
    ],
)
def test_wrong_fields_are_named(client, change, param):
    async def main():
        async with client() as http:
            data = json.dumps({**GREEDY, **change})
            return await http.post(COMPLETIONS, content=data)

    answer = asyncio.run(main())
    assert answer.status_code == 400
    if change.get("prompt") != "\ud800":  # which is no JSON for some readers
        assert answer.json()["error"]["param"].split(".")[0] == param, answer.text


def test_harmless_fields_change_nothing(client):
    async def main():
        async with client() as http:
            one = await http.post(COMPLETIONS, json=GREEDY)
            more = {"user": "me", "metadata": {"a": 1}, "tools": [], "suffix": None, "best_of": 1}
            two = await http.post(COMPLETIONS, json={**GREEDY, **more, "model": "small"})
            return one.json(), two.json()

    one, two = asyncio.run(main())
    assert one["choices"] == two["choices"]


def test_statuses_and_headers(client):
    async def main():
        async with client(api_keys=("secret",), max_body_bytes=500) as http:
            good = {"Authorization": "Bearer secret", "X-Request-ID": "mine-1"}
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/v1/models")).status_code == 401
            wrong = {"Authorization": "Bearer secre"}
            assert (await http.get("/v1/models", headers=wrong)).status_code == 401
            models = await http.get("/v1/models", headers=good)
            assert models.headers["x-request-id"] == "mine-1"
            listed = models.json()["data"][0]
            assert (listed["id"], listed["ojfa"]["promise"]["max_disagreement"]) == ("small", 0.05)
            body = {**GREEDY, "model": "other"}
            answer = await http.post(COMPLETIONS, json=body, headers=good)
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
            body = {**GREEDY, "prompt": "x" * 600}
            answer = await http.post(COMPLETIONS, json=body, headers=good)
            assert answer.status_code == 413
            for path, status in (("/nope", 404), (COMPLETIONS, 405)):
                answer = await http.get(path, headers=good)
                assert answer.status_code == status
                assert "error" in answer.json()
            answer = await http.post(COMPLETIONS, content=b"{", headers=good)
            assert answer.status_code == 400

    asyncio.run(main())


def test_loading_and_draining_are_told(model, engine):
    async def main():
        catalogue = Catalogue()
        async with client_of(catalogue) as http:
            assert (await http.get("/health")).status_code == 503
            assert (await http.post(COMPLETIONS, json=GREEDY)).status_code == 503
            catalogue.add(Served("small", model, engine))
            catalogue.state = "ready"
            assert (await http.get("/health")).status_code == 200
            catalogue.state = "draining"
            answer = await http.post(COMPLETIONS, json=GREEDY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")

    asyncio.run(main())


def test_a_full_queue_is_told(model):
    async def main(engine):
        async with client_of(Catalogue([Served("small", model, engine)])) as http:
            body = {**GREEDY, "max_tokens": 50}
            answers = await asyncio.gather(*(http.post(COMPLETIONS, json=body) for _ in range(12)))
            statuses = [each.status_code for each in answers]
            assert set(statuses) == {200, 429}
            late = answers[statuses.index(429)]
            assert late.headers["retry-after"] == "1"
            assert len({e.json()["choices"][0]["text"] for e in answers if e.is_success}) == 1

    with Engine(model, max_sequences=1, max_queue=2) as engine:
        asyncio.run(main(engine))


def test_a_client_that_leaves_has_its_request_cancelled(model):
    async def main(engine):
        from ojfa_export.serving.app import create_app

        app = create_app(Catalogue([Served("small", model, engine)]))
        data = json.dumps({**GREEDY, "max_tokens": 60, "stream": True}).encode()
        messages = [{"type": "http.request", "body": data}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http", "method": "POST", "path": COMPLETIONS, "headers": [],
            "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)
        assert app.open == 0

    with Engine(model, max_sequences=1) as engine:
        asyncio.run(main(engine))
        assert engine.stats().finished.get("cancelled") == 1


def test_a_promise_chooses_the_exit_and_is_watched(model):
    async def main(engine):
        watch = PromiseWatch(engine, model.manifest.promise, 1.0, seed=0)
        async with client_of(Catalogue([Served("small", model, engine, watch)])) as http:
            running = asyncio.create_task(watch.run())
            body = {**GREEDY, "token_details": True}
            for limit, exit in ((0.04, "full"), (0.05, "auto")):
                answer = await http.post(COMPLETIONS, json={**body, "max_disagreement": limit})
                wanted = model.generate(PROMPT, exit=exit, max_new_tokens=12, ignore_eos=True)
                tokens = answer.json()["choices"][0]["tokens"]
                assert [each["blocks_run"] for each in tokens] == wanted.prompts[0].exit_blocks
            ids, blocks = wanted.prompts[0].token_ids, wanted.prompts[0].exit_blocks
            while watch.done < 1:
                await asyncio.sleep(0.01)
            differ, start = 0, model.encode(PROMPT)
            for place, token in enumerate(ids):  # by a session, not by the engine
                logits = model.session().advance([*start, *ids[:place]], exit="full")[0]
                differ += blocks[place] < model.blocks and int(logits.argmax()) != token
            assert watch.checks == sum(each < model.blocks for each in blocks) > 0
            assert watch.disagreements == differ
            assert watch.state.estimate == pytest.approx(differ / 12)
            text = (await http.get("/metrics")).text
            assert f'ojfa:shadow_checks_total{{model_name="small"}} {watch.checks}.0' in text
            assert dashboard_names() > OF_PROMISES
            for name in OF_PROMISES:
                assert f"\n{name}{{" in text, name
            running.cancel()

    with Engine(model, max_sequences=4) as engine:
        asyncio.run(main(engine))


def dashboard_names() -> set[str]:
    """Of the metrics that the dashboard for Grafana asks for."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    return set(re.findall(r"ojfa:\w+", " ".join(asked)))


def test_metrics_have_the_names_that_the_dashboard_asks_for(client):
    async def main():
        async with client() as http:
            await http.post(COMPLETIONS, json={**GREEDY, "stream": True})
            return (await http.get("/metrics")).text

    text = asyncio.run(main())
    for name in dashboard_names() - OF_PROMISES:
        assert f"\n{name}{{" in text, name
