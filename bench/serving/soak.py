"""Many requests of all kinds: `python -m bench.serving.soak BUNDLE --requests 10000`.

Bursts of five times what the server holds, clients that leave, bodies that are wrong. Says how many
answers there were of each kind, how many had other tokens than the model's own, and what became of
the server's memory; fails where a token is wrong, a client isn't answered, or the server fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
from collections import Counter
from pathlib import Path

import ojfa_export
from bench.serving.http import Started, prompts_of
from bench.serving.result import write_result

SLOTS, QUEUE, TOKENS, PATIENCE = 4, 16, 12, 120.0
BURST = 5 * (SLOTS + QUEUE)


class Soak:
    """One run.

    Args:
        bundle: Served.
        seed: Of everything that is random.
    """

    def __init__(self, bundle: Path, seed: int = 0) -> None:
        self.model = model = ojfa_export.load(bundle)
        self._random = random.Random(seed)
        self._prompts = prompts_of(model, 16)
        self._wanted = [
            model.generate([ids], exit="full", max_new_tokens=TOKENS, ignore_eos=True)
            .prompts[0]
            .text
            for ids in self._prompts
        ]
        self.server = Started(bundle, SLOTS, "--max-queue", str(QUEUE))
        self.outcomes: Counter[str] = Counter()
        self.memory: list[int] = []

    async def run(self, requests: int) -> None:
        """Sends so many, burst by burst."""
        usage = Path(f"/proc/{self.server.pid}/statm")
        for _ in range(0, requests, BURST):
            ways = [self._random.choice(("good", "good", "leaves", "bad")) for _ in range(BURST)]
            await asyncio.gather(*(self._one(way) for way in ways))
            self.memory.append(int(usage.read_text().split()[1]) * resource.getpagesize())

    async def _one(self, way: str) -> None:
        which = self._random.randrange(len(self._prompts))
        body = {"prompt": self._prompts[which], "max_tokens": TOKENS, "temperature": 0}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        if way == "bad":
            wrong = (data[: self._random.randrange(len(data))], b'{"prompt": "x", "n": -1}')
            data = self._random.choice(wrong)
        try:
            answer = await asyncio.wait_for(self._ask(data, leaves=way == "leaves"), PATIENCE)
        except (asyncio.TimeoutError, OSError) as error:
            self.outcomes[f"no answer: {type(error).__name__}"] += 1
            return
        if answer is None:
            self.outcomes["left"] += 1
            return
        head, _, content = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1].decode() if head else "none"
        if status != "200":
            told = b'"message"' in content
            self.outcomes[status if told else f"not told: {status}"] += 1
            return
        right = json.loads(content)["choices"][0]["text"] == self._wanted[which]
        self.outcomes["200" if right else "wrong tokens"] += 1

    async def _ask(self, data: bytes, *, leaves: bool) -> bytes | None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = f"Host: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + data)
        try:
            await writer.drain()
            if leaves:
                await asyncio.sleep(self._random.random() * 0.05)
                return None
            return await reader.read()
        finally:
            writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    soak = Soak(args.bundle)
    try:
        asyncio.run(soak.run(args.requests))
        status = soak.server.stop()
    except BaseException:
        soak.server.stop()
        raise
    tenth = max(len(soak.memory) // 10, 1)
    mib = [soak.memory[at] / 2**20 for at in (tenth - 1, -1)]
    figures: dict[str, float] = dict(sorted(soak.outcomes.items()))
    figures |= {"memory after a tenth, MiB": mib[0], "memory at the end, MiB": mib[1]}
    write_result(args.out, soak.model, figures, {"requests": args.requests, "memory": soak.memory})
    bad = {each for each in soak.outcomes if each not in ("200", "400", "429", "left")}
    if bad or status:
        sys.exit(f"failed: {', '.join(sorted(bad)) or f'exit status {status}'}")


if __name__ == "__main__":
    main()
