"""Those that race: each decodes one token at a time, batch 1, greedily, after the same prompt."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from bench.cpu.compiled import Compiled
from bench.cpu.monolithic import MonolithicModel
from ojfa_export.runtime.session import Session


class Contestant(Protocol):
    """A way to decode.

    Attributes:
        name: In results.
        blocks: Blocks run for each token.
    """

    name: str
    blocks: int

    def start(self, prompt: list[int]) -> None:
        """Processes a prompt from scratch; not timed."""
        ...

    def rewind(self) -> None:
        """Goes back to the prompt's end; not timed."""
        ...

    def step(self) -> int:
        """Decodes one more token and picks the most likely next; this is what is timed."""
        ...


class Chain:
    """Our chain of engines at one exit; exits share a session, whose prompt ran at full depth."""

    def __init__(self, session: Session, blocks: int) -> None:
        self.blocks = blocks
        self.name = f"chain-{blocks}"
        self._session = session
        self._length = 0
        self._token = 0

    def start(self, prompt: list[int]) -> None:
        """Processes a prompt, but for a session that has already done so."""
        if self._session.tokens() != prompt:
            self._session.rewind(0)
            self._session.advance(prompt)
        self._length, self._token = len(prompt), prompt[0]

    def rewind(self) -> None:
        """Goes back to the prompt's end."""
        self._session.rewind(self._length)

    def step(self) -> int:
        """Decodes one token."""
        logits = self._session.advance([self._token], self.blocks)
        self._token = int(logits[0].argmax())
        return self._token


class Monolithic:
    """All graphs merged into one."""

    name = "monolithic"

    def __init__(self, compiled: Compiled, directory: Path, capacity: int) -> None:
        self.blocks = compiled.spec.blocks
        self._model = MonolithicModel(compiled, directory / "monolithic.onnx", capacity)
        self._length = self._position = self._token = 0

    def start(self, prompt: list[int]) -> None:
        """Processes a prompt."""
        self._model.prefill(prompt)
        self._length, self._token = len(prompt), prompt[0]
        self.rewind()

    def rewind(self) -> None:
        """Goes back to the prompt's end."""
        self._position = self._length

    def step(self) -> int:
        """Decodes one token."""
        self._token = int(self._model.decode(self._token, self._position).argmax())
        self._position += 1
        return self._token


class Transformers:
    """transformers in eager mode with its default attention and dynamic cache."""

    name = "transformers"

    def __init__(self, checkpoint: Path, threads: int) -> None:
        # Here alone: memory is measured of processes that need neither.
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._new_cache = torch, transformers.DynamicCache
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        self.blocks = self._model.config.num_hidden_layers
        self._cache: Any = None
        self._length = self._token = 0

    def start(self, prompt: list[int]) -> None:
        """Processes a prompt."""
        self._cache = self._new_cache(config=self._model.config)
        self._forward(prompt)
        self._length, self._token = len(prompt), prompt[0]

    def rewind(self) -> None:
        """Goes back to the prompt's end."""
        if extra := self._cache.get_seq_length() - self._length:
            self._cache.crop(-extra)

    def step(self) -> int:
        """Decodes one token."""
        self._token = int(self._forward([self._token])[0, -1].argmax())
        return self._token

    def _forward(self, token_ids: list[int]) -> Any:
        with self._torch.inference_mode():
            return self._model(
                self._torch.tensor([token_ids]), past_key_values=self._cache, logits_to_keep=1
            ).logits


class Genai:
    """onnxruntime-genai with the model that its own builder makes of the checkpoint.

    Args:
        checkpoint: Of a Llama.
        directory: To build in.
        blocks: Of the model.
        capacity: Tokens that a sequence may have.
        weights: "fp32", or "int4" in groups of 32 with 8-bit products.
    """

    name = "onnxruntime-genai"

    def __init__(
        self,
        checkpoint: Path,
        directory: Path,
        blocks: int,
        capacity: int,
        weights: Literal["fp32", "int4"] = "fp32",
    ) -> None:
        import onnxruntime_genai as genai

        self.blocks = blocks
        model = directory / "genai"
        _build_genai(checkpoint, model, weights)
        self._genai = genai
        self._model = genai.Model(str(model))
        self._capacity = capacity
        self._generator: Any = None
        self._prompt: list[int] = []

    def start(self, prompt: list[int]) -> None:
        """Processes a prompt."""
        parameters = self._genai.GeneratorParams(self._model)
        # With a minimal length it never ends by itself, as the others don't.
        parameters.set_search_options(
            do_sample=False, min_length=self._capacity, max_length=self._capacity
        )
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(np.array(prompt, np.int32))
        self._prompt = prompt

    def rewind(self) -> None:
        """Goes back to the prompt's end, and runs its last token again to have logits."""
        self._generator.rewind_to(len(self._prompt) - 1)
        self._generator.append_tokens(np.array(self._prompt[-1:], np.int32))
        # The first token is picked from logits that are there; every later one needs a run.
        self._generator.generate_next_token()

    def step(self) -> int:
        """Decodes one token."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def _build_genai(checkpoint: Path, model: Path, weights: str) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(model), "-p", weights, "-e", "cpu"]
    cache = model.with_name("genai-cache")
    command += ["-c", str(cache)]
    if weights == "int4":
        command += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    result = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(cache, ignore_errors=True)
    if result.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed:\n{result.stderr[-2000:]}")
