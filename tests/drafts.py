"""Random draft layers, and a reference for them in torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from chain import Chain

from ojfa_export.backends.draft import DraftLayer
from ojfa_export.backends.onnxruntime.build import build_engine
from ojfa_export.backends.onnxruntime.draft import OnnxRuntimeDraft
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.draft_shortcut import DraftShortcut, rotations
from ojfa_export.bundle.names import DRAFT_GRAPHS
from ojfa_export.decoding.head_output import HeadRequest, HostHeadOutput
from ojfa_export.graphs.export import Exporter
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec


def random_draft(
    hidden: int = 16,
    vocabulary: int = 40,
    seed: int = 0,
    *,
    depths: tuple[int, ...] = (1, 2, 4),
    own_head: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    width: int = 24,
) -> DraftShortcut:
    """A draft layer whose products keep the size of what goes in."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * shape[0] ** -0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.3 * rng.normal(size=hidden)).astype(np.float32)

    frequent = np.sort(rng.permutation(vocabulary)[: max(1, vocabulary // 2)]).astype(np.int32)
    return DraftShortcut(
        depths=depths,
        fuse=normal(len(depths) * hidden, hidden),
        embedding_norm=norm(),
        state_norm=norm(),
        qkv=normal(2 * hidden, (heads + 2 * kv_heads) * head_dim),
        out=normal(heads * head_dim, hidden),
        mlp_norm=norm(),
        up=normal(hidden, 2 * width),
        down=normal(width, hidden),
        final_norm=norm(),
        head=normal(hidden, len(frequent)).T.copy() if own_head else None,
        tokens=frequent if own_head else None,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=10_000.0,
        epsilon=1e-5,
    )


def draft_for(spec: ModelSpec, seed: int = 0, *, own_head: bool = True) -> DraftShortcut:
    """A random one of a tiny model, of sizes that ONNX Runtime takes."""
    return random_draft(
        spec.hidden_size,
        spec.vocab_size,
        seed,
        depths=(1, 2, spec.blocks),
        own_head=own_head,
        head_dim=16,
    )


def open_draft(chain: Chain, draft: DraftShortcut, directory: Path) -> OnnxRuntimeDraft:
    """Exports a draft layer beside a chain's graphs, and opens its engines."""
    return open_beside(
        chain.graphs, chain.spec, chain.max_length, draft, directory, chain.precision
    )


def draft_layer(chain: Chain, draft: DraftShortcut, engines: dict[str, Path]) -> DraftLayer:
    """A draft layer that was exported beside a chain's graphs, to be opened."""
    return _layer(chain.graphs, chain.spec, chain.max_length, draft, engines)


def open_beside(
    graphs: Path,
    model: ModelSpec,
    max_length: int,
    draft: DraftShortcut,
    directory: Path,
    precision: Precision = "fp32",
) -> OnnxRuntimeDraft:
    """Exports a draft layer beside a model's graphs, and opens its engines."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint: Any = SimpleNamespace(spec=model)
    Exporter(checkpoint, graphs, precision, max_length).draft(draft)
    spec = draft.spec_within(model)
    files = {name: directory / f"{name}.onnx" for name in DRAFT_GRAPHS}
    for name, file in files.items():
        build_engine(spec, graphs / f"{name}.onnx", file)
    return OnnxRuntimeDraft(_layer(graphs, model, max_length, draft, files))


def _layer(
    graphs: Path,
    model: ModelSpec,
    max_length: int,
    draft: DraftShortcut,
    engines: dict[str, Path],
) -> DraftLayer:
    cos, sin = rotations(draft.rope_theta, draft.head_dim, 0, max_length)
    return DraftLayer(
        depths=draft.depths,
        spec=draft.spec_within(model),
        vocab_size=model.vocab_size,
        tokens=draft.tokens,
        weights=graphs,
        engines=engines,
        rotary=(cos.astype(np.float32), sin.astype(np.float32)),
    )


class GoodDrafts:
    """A draft layer that is often right about texts that it was told; see `backends.draft`.

    The layer runs all the same; what its head says comes from the text whose tokens the layer was
    given, but for the first, which it never sees. In every third position it is wrong.

    Args:
        layer: The layer.
        texts: Prompts and what follows them.
    """

    def __init__(self, layer: OnnxRuntimeDraft, texts: list[list[int]]) -> None:
        self.layer, self.depths, self.texts = layer, layer.depths, texts
        self.token_bytes, self.takes_whole = layer.token_bytes, layer.takes_whole
        self.heard: dict[bytes, list[int]] = {}

    def executor(self, slots: int, capacity: int) -> Listening:
        return Listening(self, slots, capacity)

    def logits(self, hidden: np.ndarray, blocks_run: int) -> np.ndarray:
        logits = np.zeros_like(self.layer.logits(hidden, blocks_run))
        for row, state in zip(logits, hidden, strict=True):
            known = self.heard[state.tobytes()]
            count = len(known) + 1
            for text in self.texts:
                if text[1:count] == known and count < len(text):
                    row[(text[count] + (count % 3 == 0)) % len(row)] = 8.0
        return logits

    def choose(self, hidden: np.ndarray, blocks_run: int, request: HeadRequest) -> HostHeadOutput:
        return HostHeadOutput(self.logits(hidden, blocks_run), request)


class Listening:
    """Notes the tokens that an executor is given, by slot and position."""

    def __init__(self, drafts: GoodDrafts, slots: int, capacity: int) -> None:
        self._drafts, self._executor = drafts, drafts.layer.executor(slots, capacity)
        self._tokens: list[dict[int, int]] = [{} for _ in range(slots)]
        self.keep, self.release = self._executor.keep, self._executor.release

    def begin(self, tokens: list[int], chunks: list[Chunk]) -> np.ndarray:
        return self._heard(self._executor.begin(tokens, chunks), tokens, chunks)

    def go_on(self, hidden: np.ndarray, tokens: list[int], chunks: list[Chunk]) -> np.ndarray:
        return self._heard(self._executor.go_on(hidden, tokens, chunks), tokens, chunks)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        self._executor.copy_prefix(source, target, count)
        self._tokens[target] = dict(self._tokens[source])

    def _heard(self, hidden: np.ndarray, tokens: list[int], chunks: list[Chunk]) -> np.ndarray:
        given = iter(tokens)
        for state, (slot, start, count) in zip(hidden, chunks, strict=True):
            for position in range(start + 1, start + count + 1):
                self._tokens[slot][position] = next(given)
            known = [self._tokens[slot][at] for at in range(1, start + count + 1)]
            self._drafts.heard[state.tobytes()] = known
        return hidden


class GoodChains:
    """A device's draft layer that is often right about texts that it was told.

    The layer runs all the same; then its drafts are overwritten where the device keeps them.

    Args:
        layer: The layer.
        texts: Prompts and what follows them.
    """

    def __init__(self, layer: Any, texts: list[list[int]]) -> None:
        self._layer, self._texts = layer, texts
        self.depths, self.logits, self.choose = layer.depths, layer.logits, layer.choose
        self.token_bytes, self.takes_whole = layer.token_bytes, layer.takes_whole

    def executor(self, slots: int, capacity: int) -> Any:
        executor = self._layer.executor(slots, capacity)
        chain, heard = executor.chain, [[-1] * (capacity + 1) for _ in range(slots)]

        def good(tokens: list[int], chunks: list[Chunk], count: int) -> Any:
            drafts, given = chain(tokens, chunks, count), iter(tokens)
            rows = []
            for slot, start, length in chunks:
                for position in range(start + 1, start + length + 1):
                    heard[slot][position] = next(given)
                known = heard[slot][1 : start + length + 1]
                rows.append([self._after(known, at) for at in range(count)])
            return _overwritten(executor, drafts, rows)

        executor.chain = good
        return executor

    def _after(self, known: list[int], further: int) -> int:
        count = len(known) + 1
        for text in self._texts:
            if text[1:count] == known and count + further < len(text):
                return text[count + further] if (count + further) % 4 else 0
        return 0


def _overwritten(executor: Any, drafts: Any, rows: list[list[int]]) -> Any:
    """The same drafts with other tokens, on the device too."""
    both = [(first, *row) for first, row in zip(drafts.first, rows, strict=True)]
    drafts.drafts()  # the device is done with its own
    executor._device.upload(np.array(both, np.int32), drafts.pointer)
    outputs = [
        SimpleNamespace(likeliest=lambda each=each: list(each)) for each in zip(*rows, strict=True)
    ]
    return replace(drafts, outputs=outputs)


def by_torch(draft: DraftShortcut, memory: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """The layer's outputs [T, H] by torch and transformers' rotation, in float64, past included."""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float64))

    def normed(x: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
        return rms_norm(x, (len(weight),), tensor(weight), draft.epsilon)

    s, e, size = tensor(memory), tensor(embeddings), draft.head_dim
    both = torch.cat([normed(e, draft.embedding_norm), normed(s, draft.state_norm)], dim=-1)
    projected = linear(both, tensor(draft.qkv.T)).view(len(s), -1, size).transpose(0, 1)[None]
    q, k, v = projected.split([draft.heads, draft.kv_heads, draft.kv_heads], dim=1)
    config = LlamaConfig(
        hidden_size=size, num_attention_heads=1, head_dim=size, rope_theta=draft.rope_theta
    )
    cos, sin = LlamaRotaryEmbedding(config)(v, torch.arange(len(s))[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    h = s + linear(mixed[0].transpose(0, 1).reshape(len(s), -1), tensor(draft.out.T))
    gate, up = linear(normed(h, draft.mlp_norm), tensor(draft.up.T)).chunk(2, dim=-1)
    return (h + linear(silu(gate) * up, tensor(draft.down.T))).numpy()
