"""The yardstick for the chain: all graphs of a model merged into one, on the same weight files.

Operators, weights, thread pool and the in-place cache are those of the chain, so that whatever
time the chain takes beyond this is the price of being able to stop after every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from bench.cpu.compiled import Compiled, Float32
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.bundle.names import block_name
from ojfa_export.graphs.graph import IR_VERSION

TABLES = ("rotary_cos_table", "rotary_sin_table")
SHARED = ("last_positions", "total_length", "query_lengths", "unpack", "pack", *TABLES)


def merge(compiled: Compiled) -> onnx.ModelProto:
    """Merges embed, every block and final_head; the last token's logits come out.

    Cache inputs are called past_key_N and past_value_N, the outputs key_N and value_N.
    """
    spec = compiled.spec
    merged = onnx.GraphProto(name="monolithic")
    opsets: dict[str, int] = {}

    def add(name: str, renamed: Mapping[str, str]) -> onnx.GraphProto:
        model = onnx.load(compiled.engines[name], load_external_data=False)
        opsets.update({opset.domain: opset.version for opset in model.opset_import})
        graph = model.graph
        _rename(graph, f"{name}/", renamed)
        merged.node.extend(graph.node)
        merged.initializer.extend(graph.initializer)
        present = {value.name for value in merged.input}
        inputs = (value for value in graph.input if value.name not in present | {"hidden_in"})
        merged.input.extend(inputs)
        return graph

    same = {name: name for name in SHARED}
    add("embed", {"token_ids": "token_ids", "positions": "positions", "hidden": "embedded"})
    merged.node.append(_packed(merged, spec.hidden_size))
    for block in range(spec.blocks):
        caches = {name: f"{name}_{block}" for name in ("past_key", "past_value", "key", "value")}
        ends = {"hidden": f"hidden_{block}", "hidden_out": f"hidden_{block + 1}"}
        graph = add(block_name(block), {**same, **caches, **ends})
        merged.output.extend(value for value in graph.output if value.name in caches.values())
    merged.node.append(_last_token(merged, f"hidden_{spec.blocks}"))
    merged.output.extend(add("final_head", {"hidden": "last_hidden", "logits": "logits"}).output)
    _keep_inputs(merged)
    opset_imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = helper.make_model(merged, opset_imports=opset_imports)
    model.ir_version = IR_VERSION
    return model


def _rename(graph: onnx.GraphProto, prefix: str, renamed: Mapping[str, str]) -> None:
    """Renames every value: the given ones as told, all others with the graph's prefix."""

    def new(name: str) -> str:
        return renamed.get(name, prefix + name) if name else name

    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = new(value.name)


def _packed(graph: onnx.GraphProto, width: int) -> onnx.NodeProto:
    """[1, tokens, H] of the embedding to the blocks' [tokens, H]."""
    shape = onnx.numpy_helper.from_array(np.array([-1, width], np.int64), "packed_shape")
    graph.initializer.append(shape)
    return helper.make_node("Reshape", ["embedded", shape.name], ["hidden_0"])


def _last_token(graph: onnx.GraphProto, hidden: str) -> onnx.NodeProto:
    """[tokens, H] to [1, H]."""
    index = onnx.numpy_helper.from_array(np.array([-1], np.int64), "last_token")
    graph.initializer.append(index)
    return helper.make_node("Gather", [hidden, index.name], ["last_hidden"], axis=0)


def _keep_inputs(graph: onnx.GraphProto) -> None:
    """Drops the inputs that another graph's output has become."""
    made = {name for node in graph.node for name in node.output}
    kept = [value for value in graph.input if value.name not in made]
    del graph.input[:]
    graph.input.extend(kept)


class MonolithicModel:
    """One session for the whole model, batch 1, with its cache bound in place."""

    def __init__(self, compiled: Compiled, path: Path, capacity: int) -> None:
        spec = compiled.spec
        path.write_bytes(merge(compiled).SerializeToString())
        self._session = open_session(path.read_bytes(), "monolithic", compiled.weights)
        self._inputs = {value.name for value in self._session.get_inputs()}
        shape = (1, spec.kv_heads, capacity, spec.head_dim)
        self._cache = {
            f"{name}_{block}": np.zeros(shape, np.float32)
            for block in range(spec.blocks)
            for name in ("key", "value")
        }
        self._rotary = dict(zip(TABLES, compiled.rotary or (), strict=False))
        self._logits = np.empty((1, spec.vocab_size), np.float32)
        self._decode_feeds = self._feeds(1)
        self._decode = self._bind(self._decode_feeds)

    def prefill(self, token_ids: list[int]) -> Float32:
        """Runs a prompt from position 0; logits [1, V] after its last token."""
        feeds = self._feeds(len(token_ids))
        self._set(feeds, token_ids, 0)
        self._session.run_with_iobinding(self._bind(feeds))
        return self._logits

    def decode(self, token_id: int, position: int) -> Float32:
        """Runs one token; logits [1, V], valid until the next call."""
        self._set(self._decode_feeds, [token_id], position)
        self._session.run_with_iobinding(self._decode)
        return self._logits

    def _feeds(self, tokens: int) -> dict[str, np.ndarray]:
        return {
            "token_ids": np.empty((1, tokens), np.int32),
            "positions": np.empty((1, tokens), np.int32),
            "last_positions": np.empty(1, np.int32),
            "total_length": np.empty((), np.int32),
            "query_lengths": np.full(1, tokens, np.int32),
            "unpack": np.arange(tokens)[None],
            "pack": np.arange(tokens),
        }

    def _set(self, feeds: dict[str, np.ndarray], token_ids: list[int], start: int) -> None:
        end = start + len(token_ids)
        feeds["token_ids"][0] = token_ids
        feeds["positions"][0] = range(start, end)
        feeds["last_positions"][0] = end - 1
        feeds["total_length"][...] = end

    def _bind(self, feeds: dict[str, np.ndarray]) -> ort.IOBinding:
        past = {f"past_{name}": array for name, array in self._cache.items()}
        binding = self._session.io_binding()
        for name, array in {**feeds, **self._rotary, **past}.items():
            if name in self._inputs:
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in {**self._cache, "logits": self._logits}.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding
