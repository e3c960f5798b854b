"""What HTTP costs: `python -m bench.serving.http BUNDLE --out http.json`.

The engine alone and the same requests through the server take turns, the server in a process of its
own with an engine of the same size. Every figure is a ratio of medians,
or a difference of them, within the run, but for processor time: that of the server's event loop and
of the client, which others on the machine change less. Linux tells it by thread.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import ojfa_export
from bench.serving.result import write_result
from ojfa_export.engine.engine import Engine
from ojfa_export.runtime.model import Model

TEXT = Path(__file__).parents[2] / "calibration" / "text" / "code.txt"
CLIENTS, TOKENS, PROMPT = 16, 64, 32


@dataclass(frozen=True)
class Timed:
    """One request.

    Attributes:
        first: Seconds to its first token.
        between: Seconds between tokens, the mean of the request.
        tokens: Generated.
    """

    first: float
    between: float
    tokens: int


@dataclass
class Samples:
    """By what was measured.

    Attributes:
        rates: Tokens a second of all clients together.
        alone: Of one client.
        processor: Microseconds of processor time for each token of all clients together: of the
            server's thread that speaks HTTP, and of the clients.
    """

    rates: dict[str, list[float]] = field(default_factory=lambda: {"engine": [], "http": []})
    alone: dict[str, list[Timed]] = field(default_factory=lambda: {"engine": [], "http": []})
    processor: dict[str, list[float]] = field(default_factory=lambda: {"server": [], "client": []})


def prompts_of(model: Model, count: int) -> list[list[int]]:
    """Prompts that begin differently, so that no prefix is shared."""
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:40_000]).ids
    return [ids[at * PROMPT : (at + 1) * PROMPT] for at in range(count)]


def engine_together(engine: Engine, prompts: list[list[int]], tokens: int) -> int:
    """All prompts at once by the engine; gives the number of tokens."""
    requests = [
        engine.submit(ids, exit="full", max_new_tokens=tokens, ignore_eos=True) for ids in prompts
    ]
    return sum(len(request.result().token_ids) for request in requests)


def http_together(port: int, prompts: list[list[int]], tokens: int) -> int:
    """All prompts at once by HTTP, streamed, each over a connection of its own.

    One thread reads all of them: on few cores clients would take the server's time.
    """
    selector, used = selectors.DefaultSelector(), 0
    for ids in prompts:
        data = json.dumps(_body(ids, tokens)).encode()
        head = f"Host: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + data)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, bytearray())
    while selector.get_map():
        for key, _ in selector.select():
            connection = cast(socket.socket, key.fileobj)
            if piece := connection.recv(1 << 16):
                key.data.extend(piece)
                continue
            selector.unregister(connection)
            connection.close()
            found = re.search(rb'"completion_tokens": (\d+)', key.data)
            used += int(found[1]) if found else 0
    if used != tokens * len(prompts):
        raise RuntimeError(f"{used} tokens came, not {tokens * len(prompts)}")
    return used


def by_engine(engine: Engine, ids: list[int], tokens: int) -> Timed:
    """One request of the engine."""
    begun = time.perf_counter()
    times = [
        time.perf_counter()
        for _ in engine.submit(ids, exit="full", max_new_tokens=tokens, ignore_eos=True)
    ]
    return _timed(begun, times)


def by_http(port: int, ids: list[int], tokens: int) -> Timed:
    """The same by HTTP, streamed."""
    data = json.dumps(_body(ids, tokens))
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read().decode())
    times, used = [], 0
    while line := answer.readline():
        if line.startswith(b"data: {"):
            if b'"choices": []' in line:
                used = json.loads(line[6:])["usage"]["completion_tokens"]
            else:
                times.append(time.perf_counter())
    connection.close()
    if used != tokens:
        raise RuntimeError(f"{used} tokens, not {tokens}")
    return _timed(begun, times, used)


def _body(ids: list[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def _timed(begun: float, times: list[float], tokens: int | None = None) -> Timed:
    count = len(times) if tokens is None else tokens
    return Timed(times[0] - begun, (times[-1] - times[0]) / max(count - 1, 1), count)


class Started:
    """The server as a process.

    Args:
        bundle: What it serves.
        slots: Of its engine.
        options: More of the command's.
    """

    def __init__(self, bundle: Path, slots: int, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ojfa_export", "serve", str(bundle), "--port", "0",
             "--max-sequences", str(slots), "-q", *options],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if ":" not in line:
            raise RuntimeError("the server did not start")
        self.pid = self._process.pid
        self.port = int(line.rsplit(":", 1)[1])
        while not self._is_ready():
            time.sleep(0.05)

    def loop_seconds(self) -> float:
        """Processor time that its first thread, the event loop's, has taken."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat")
        return int(path.read_text(encoding="ascii").split()[0]) / 1e9

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/health")
        ready = connection.getresponse().status == 200
        connection.close()
        return ready

    def stop(self) -> int:
        """Ends it; gives its exit status."""
        self._process.terminate()
        return self._process.wait(60)


def measure(model: Model, bundle: Path, rounds: int, tokens: int = TOKENS) -> Samples:
    """Takes samples of both, in turns."""
    prompts, samples = prompts_of(model, CLIENTS), Samples()
    server = Started(bundle, CLIENTS)
    try:
        with Engine(model, max_sequences=CLIENTS, prefix_cache=False) as engine:
            for turn in range(-1, rounds):  # the first is for warming up
                # The server keeps prefixes: each round has a first token of its own.
                first = (turn + 2) % model.spec.vocab_size
                some = [[first, *ids[1:]] for ids in prompts]
                runs: dict[str, tuple[Callable[[], int], Callable[[], Timed]]] = {
                    "engine": (
                        partial(engine_together, engine, some, tokens),
                        partial(by_engine, engine, some[0], tokens),
                    ),
                    "http": (
                        partial(http_together, server.port, some, tokens),
                        partial(by_http, server.port, [0, *some[0]], tokens),
                    ),
                }
                for name, (together, one) in runs.items():
                    spent = server.loop_seconds(), time.process_time()
                    begun = time.perf_counter()
                    count = together()
                    rate = count / (time.perf_counter() - begun)
                    now = server.loop_seconds(), time.process_time()
                    timed = one()
                    if turn < 0:
                        continue
                    samples.rates[name].append(rate)
                    samples.alone[name].append(timed)
                    if name == "http":
                        for who, before, after in zip(samples.processor, spent, now, strict=True):
                            samples.processor[who].append(1e6 * (after - before) / count)
    finally:
        server.stop()
    return samples


def figures(samples: Samples) -> dict[str, float]:
    """Ratios and differences of medians."""
    rates, alone = samples.rates, samples.alone
    first = {name: statistics.median(each.first for each in runs) for name, runs in alone.items()}
    between = {
        name: statistics.median(each.between for each in runs) for name, runs in alone.items()
    }
    return {
        "share_of_engine": statistics.median(rates["http"]) / statistics.median(rates["engine"]),
        "added_to_first_token_ms": 1000 * (first["http"] - first["engine"]),
        "added_between_tokens_ms": 1000 * (between["http"] - between["engine"]),
        **{
            f"processor_us_per_token_{who}": statistics.median(each)
            for who, each in samples.processor.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = ojfa_export.load(args.bundle)
    model.engines.load_blocks(model.blocks)
    samples = measure(model, args.bundle, args.rounds)
    write_result(args.out, model, figures(samples), asdict(samples))


if __name__ == "__main__":
    main()
