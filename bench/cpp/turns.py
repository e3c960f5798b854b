"""The C++ and the Python runtime side by side: they generate in turns, on one bundle and GPU."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from bench.cpp.ways import Way
from ojfa_export.decoding.exits import Exit
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.runtime.decoding import Decoder, StepByStep
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.speculator import Speculator


@dataclass(frozen=True)
class Generated:
    """What a way of decoding gave.

    Attributes:
        tokens: Ids.
        blocks_run: Of each.
        ms: From each token to the next, the prompt's time at first.
    """

    tokens: list[int]
    blocks_run: list[int]
    ms: list[float]


def in_python(model: Model, way: Way, prompt: list[int], tokens: int) -> Generated:
    """Generates in this process; no token ends a text."""
    session = model.session()
    generators = [way.sampling.generator(0)]
    decoder: Decoder
    if way.speculation is None:
        exit: Exit | ExitPolicy = "full" if way.exit is None else way.exit
        decoder = StepByStep(session, exit, way.sampling, generators)
    else:
        decoder = Speculator(session, way.speculation, way.sampling, generators)
    result = Generated([], [], [])
    pending = [prompt]
    start = time.perf_counter()
    while (wanted := tokens - len(result.tokens)) > 0:
        [chosen] = decoder.step(pending, [wanted])
        chosen = chosen[:wanted]
        now = time.perf_counter()
        # As in C++: a step's first token has its time, those that came with it none.
        result.ms.extend([(now - start) * 1e3] + [0.0] * (len(chosen) - 1))
        start = now
        result.tokens.extend(token.id for token in chosen)
        result.blocks_run.extend(token.blocks_run for token in chosen)
        pending = [[chosen[-1].id]]
    decoder.end()
    return result


class InCpp:
    """ojfa-turns on a bundle, as long as the context lasts.

    Args:
        program: The program.
        bundle: What it opens.
        options: More of its options.

    Attributes:
        loading: What it tells of the loading.
    """

    def __init__(self, program: Path, bundle: Path, *options: str) -> None:
        command = [str(program), str(bundle), *options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loading = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() and error is None:
            raise RuntimeError(f"ojfa-turns ended with status {self._process.returncode}")

    def generate(self, way: Way, prompt: list[int], tokens: int) -> Generated:
        """Generates; see `in_python`."""
        asked: dict[str, Any] = {
            "ids": prompt,
            "max_new_tokens": tokens,
            "temperature": way.sampling.temperature,
            "top_k": way.sampling.top_k,
            "top_p": way.sampling.top_p,
            "seed": way.sampling.seed,
        }
        if isinstance(way.exit, ExitPolicy):
            asked["exit"] = way.exit.model_dump(mode="json")
        elif way.exit is not None:
            asked["exit"] = way.exit
        if way.speculation is not None:
            exit, draft = way.speculation.exit, way.speculation.draft
            asked["speculation"] = {"exit": exit or 0, "draft": draft or 0}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Generated(answer["tokens"], answer["blocks_run"], answer["ms"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"ojfa-turns ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
