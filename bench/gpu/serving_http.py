"""Llama-2-7B's shape through HTTP, and the same client of vLLM's server.

    python -m bench.gpu.serving_http serve --port 8000                    # random weights, fp16
    python -m bench.gpu.serving_http vllm-model DIRECTORY                 # for vLLM's server
    python -m vllm.entrypoints.openai.api_server --model DIRECTORY --load-format dummy --port 8001
    python -m bench.gpu.serving_http ask --server ours=8000 --server vllm=8001 --out http.json

Clients ask at once for a completion of a prompt of 512 random tokens, streamed, each over a
connection of its own. Written are the milliseconds between a client's tokens, to its first, and the
tokens of all clients a second; servers take turns.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import selectors
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from bench.commit import commit
from bench.gpu.machine import nvidia_smi

SHAPE, PAST, NEW = "llama2-7b", 512, 128
VOCABULARY = 32_000
READY_SECONDS = 300


@dataclass(frozen=True)
class Asked:
    """Clients that asked at once.

    Attributes:
        tokens_per_second: Of all together, from the first question to the last token.
        between_ms: A client's mean time between tokens, the median of the clients.
        first_ms: To a client's first token, the median of the clients.
    """

    tokens_per_second: float
    between_ms: float
    first_ms: float


@dataclass
class Stream:
    """An answer that comes: what has, and when its first token did and its last."""

    received: bytearray
    first: float = 0.0
    last: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves, or asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    serving = actions.add_parser("serve")
    serving.add_argument("--port", type=int, default=8000)
    serving.add_argument("--sequences", type=int, default=64)
    model = actions.add_parser("vllm-model")
    model.add_argument("directory", type=Path)
    asking = actions.add_parser("ask")
    asking.add_argument("--server", action="append", metavar="NAME=PORT", required=True)
    asking.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    asking.add_argument("--rounds", type=int, default=4)
    asking.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.action == "serve":
        serve_shape(options.port, options.sequences)
    elif options.action == "vllm-model":
        write_vllm_model(options.directory)
    else:
        ask(options)


def serve_shape(port: int, sequences: int) -> None:
    """Serves random weights of the shape until a signal comes."""
    from bench.gpu import serving, shapes
    from bench.gpu.tensorrt import build
    from ojfa_export.backends.tensorrt.backend import BACKEND
    from ojfa_export.engine.engine import Engine
    from ojfa_export.serving.catalogue import Served
    from ojfa_export.serving.server import open_socket, serve
    from ojfa_export.serving.settings import Settings

    spec = shapes.SHAPES[SHAPE]
    with tempfile.TemporaryDirectory(prefix="ojfa-gpu-") as folder:
        directory = Path(folder)
        graphs = shapes.RandomGraphs(spec, directory / "graphs", serving.LENGTH)
        graphs.write()
        plans, _ = build(spec, directory)

        def load() -> Served:
            engines = BACKEND.open_engines(spec, directory / "graphs", plans, graphs.rotary)
            engines.load_blocks(spec.blocks)
            model = serving.ShapeModel(spec, engines, serving.LENGTH)
            engine = Engine(model, max_sequences=sequences, prefix_cache=False)
            engine.warm_up()
            return Served(SHAPE, model, engine)

        serve(open_socket("127.0.0.1", port), [load], Settings())


def write_vllm_model(directory: Path) -> None:
    """The same shape and tokenizer for vLLM's server, which makes weights up itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from bench.gpu.serving_vllm import CONFIG

    directory.mkdir(parents=True, exist_ok=True)
    words = {f"w{index} ": index for index in range(VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="w0 ")).save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0 "}
    for name, value in {"config": CONFIG, "tokenizer_config": described}.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def ask(options: argparse.Namespace) -> None:
    """Asks all servers in turns, and writes one JSON file."""
    ports = {name: int(port) for name, _, port in (each.partition("=") for each in options.server)}
    for port in ports.values():
        wait_until_ready(port)
    rows = []
    for clients in options.clients:
        found: dict[str, list[Asked]] = {name: [] for name in ports}
        for turn in range(-1, options.rounds):  # the first is for warming up
            for name, port in ports.items():
                asked = asked_at_once(port, clients)
                if turn >= 0:
                    found[name].append(asked)
        for name, samples in found.items():
            medians = {
                key: float(np.median([getattr(each, key) for each in samples]))
                for key in Asked.__dataclass_fields__
            }
            row = {"server": name, "clients": clients, **medians}
            rows.append(row | {"samples": [asdict(each) for each in samples]})
            print(
                "{server}, {clients} clients: {tokens_per_second:.0f} tokens/s, {between_ms:.2f} "
                "ms between tokens, {first_ms:.1f} ms to the first".format(**row),
                flush=True,
            )
    described = {"commit": commit(), "gpu": nvidia_smi(), "prompt": PAST, "new": NEW}
    options.out.write_text(json.dumps(described | {"rows": rows}) + "\n", encoding="utf-8")


def wait_until_ready(port: int) -> None:
    """Waits for a server whose /health says so."""
    begun = time.monotonic()
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.monotonic() - begun > READY_SECONDS:
            raise SystemExit(f"no server is ready at port {port}")
        time.sleep(0.5)


def asked_at_once(port: int, clients: int) -> Asked:
    """What so many clients see; one thread reads for all of them."""
    rng = np.random.default_rng()
    selector, streams = selectors.DefaultSelector(), []
    begun = time.perf_counter()
    for _ in range(clients):
        body = {
            "prompt": rng.integers(3, VOCABULARY, PAST).tolist(), "max_tokens": NEW,
            "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = "Host: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + data)
        connection.setblocking(False)
        streams.append(Stream(bytearray()))
        selector.register(connection, selectors.EVENT_READ, streams[-1])
    while selector.get_map():
        for key, _ in selector.select():
            _read(selector, cast(socket.socket, key.fileobj), key.data)
    seconds = max(stream.last for stream in streams) - begun
    between = [(stream.last - stream.first) / (NEW - 1) for stream in streams]
    return Asked(
        clients * NEW / seconds,
        1e3 * float(np.median(between)),
        1e3 * float(np.median([stream.first - begun for stream in streams])),
    )


def _read(selector: selectors.BaseSelector, connection: socket.socket, stream: Stream) -> None:
    """What has come of an answer; when it is over, whether it is whole."""
    if piece := connection.recv(1 << 16):
        stream.received.extend(piece)
        if b'"choices":[{' in piece.replace(b": ", b":"):
            stream.last = time.perf_counter()
            stream.first = stream.first or stream.last
        return
    selector.unregister(connection)
    connection.close()
    used = re.search(rb'"completion_tokens": ?(\d+)', stream.received)
    if not used or int(used[1]) != NEW:
        raise SystemExit(f"no whole answer came: {bytes(stream.received[:500])!r}")


if __name__ == "__main__":
    main()
