"""Random bodies: whatever comes, the server answers, and never with a fault of its own."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ojfa_export.serving.protocol import ChatRequest, CompletionRequest

FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tools", "user"})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-1, 5)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["full", "auto", "user", "text", "small"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)


def check(client, bodies) -> None:
    async def main():
        async with client(timeout=5.0) as http:
            for path, body in bodies:
                answer = await http.post(path, content=body)
                assert answer.status_code in (200, 400, 404), (path, body, answer.text)
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"]

    asyncio.run(main())


def bodies_of(body):
    """One that is mostly wrong, and two with what must be there."""
    good = {"max_tokens": 2, "prompt": "x"}
    yield "/v1/completions", json.dumps({**good, **body})
    yield (
        "/v1/chat/completions",
        json.dumps({"max_tokens": 2, "messages": [{"role": "user", "content": "x"}], **body}),
    )
    yield "/tokenize", json.dumps(body)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(BODIES)
def test_random_fields(client, body):
    check(client, bodies_of(body))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode()))
def test_random_bytes(client, data):
    check(client, [("/v1/completions", data), ("/v1/chat/completions", data)])


@pytest.mark.slow
@settings(
    max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(BODIES)
def test_many_random_fields(client, body):
    check(client, bodies_of(body))
