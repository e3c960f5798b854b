"""A small bundle with a chat template and a promise, and applications that serve it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundle.bundle_copy import BundleCopy
from vectors.cases import DIRECTORY

import ojfa_export
from ojfa_export.bundle.names import CHAT
from ojfa_export.engine.engine import Engine
from ojfa_export.runtime.model import Model
from ojfa_export.serving.app import create_app
from ojfa_export.serving.catalogue import Catalogue, Served
from ojfa_export.serving.settings import Settings

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
Client = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


def add_chat(copy: BundleCopy) -> None:
    """Gives a bundle a chat template."""
    chat = {"templates": {"default": TEMPLATE}, "special_tokens": {}}
    (copy.directory / CHAT).write_text(json.dumps(chat), encoding="utf-8")
    copy.sign(CHAT)


def add_promise(copy: BundleCopy) -> None:
    """Gives a bundle a promise about the policy that it has; the evidence is made up."""

    def change(fields: dict[str, Any]) -> None:
        domain = {
            "name": "text", "windows": 9, "tokens": 90, "disagreement": 0.1,
            "extra_surprisal": 0.1, "depth": 2.0, "p_value": 0.01,
        }  # fmt: skip
        fields["promise"] = {
            "limits": {"max_disagreement": 0.05},
            "policy": fields["auto"],
            "domains": [domain],
            "relative_cost": 0.6,
            "candidates": 1,
            "reason": "made up",
        }

    copy.edit_manifest(change, resign=True)


@pytest.fixture(scope="session")
def served_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = BundleCopy(DIRECTORY / "llama.ojfa", tmp_path_factory.mktemp("served") / "small.ojfa")
    add_chat(copy)
    add_promise(copy)
    return copy.directory


@pytest.fixture(scope="session")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, whose answers take some seconds; for slow tests."""
    bundle = tmp_path_factory.mktemp("long") / "demo.ojfa"
    checkpoint = Path(__file__).parents[2] / "calibration" / "demo" / "checkpoint"
    command = [sys.executable, "-m", "ojfa_export", "build", str(checkpoint), "-o", str(bundle)]
    quick = ["--shortcut", "ojfa", "--rank", "8", "--skip-verification"]
    sizes = ["--calibration-tokens", "2048", "--max-cache-length", "1024"]
    subprocess.run([*command, *quick, *sizes], check=True)
    return bundle


@pytest.fixture(scope="session")
def model(served_bundle: Path) -> Model:
    return ojfa_export.load(served_bundle)


@pytest.fixture(scope="session")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, max_sequences=4, max_queue=64) as engine:
        yield engine


@asynccontextmanager
async def client_of(catalogue: Catalogue, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application; nothing is sent over a network."""
    transport = httpx.ASGITransport(create_app(catalogue, Settings(**settings)))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest.fixture
def client(model: Model, engine: Engine) -> Client:
    """Makes a client of the small bundle."""

    def make(**settings: Any) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return client_of(Catalogue([Served("small", model, engine)]), **settings)

    return make


def events(text: str) -> list[Any]:
    """The events of a stream, parsed; the last is checked and left out."""
    data = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]
