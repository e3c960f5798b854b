"""A bundle's model in NumPy float64, read from its weight files alone.

Neither an engine nor an SDK is involved: a second opinion wherever NumPy runs, on machines without
torch too. Quantised matrices are dequantised as `bundle.weight_format` writes it out. A few dozen
tokens of one block at a time; slow, and never on the path of a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from ojfa_export.bundle.names import block_name
from ojfa_export.bundle.weight_format import (
    PACKED,
    QuantisedMatrix,
    WeightFormat,
    dequantise,
    matrix_of,
)
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.graphs.quantised import format_of
from ojfa_export.graphs.weights import map_tensors
from ojfa_export.models.activation import activate, gated, softcapped
from ojfa_export.models.float8 import LARGEST
from ojfa_export.models.spec import SECOND, ModelSpec

Float64 = NDArray[np.float64]
Tensors = dict[str, Float64]
Weights = Mapping[str, NDArray[Any]]
# The last tensor of a block: what it hands on.
HIDDEN = "hidden"
ATTENTION_OUT, MLP_UP, MLP_DOWN = "attention.out", "mlp.up", "mlp.down"
# Queries, keys and values; and with the norms of queries and keys.
QKV, QKV_NORMED = "attention.qkv", "attention.qkv normed"
# Elements of a weight matrix that are widened at a time.
CHUNK = 1 << 22
# Tokens that `pass_on` has in flight.
TOGETHER = 512


class ExactModel:
    """The model of a directory of graphs.

    Args:
        spec: The model.
        graphs: The bundle's graphs directory: its graphs say where the weights are.
        rotary: Cosines and sines [rows, rotary_dim/2], or None for learned positions.
        fp8_cache: Whether keys and values are rounded to fp8.
    """

    def __init__(
        self,
        spec: ModelSpec,
        graphs: Path,
        rotary: tuple[Float32, Float32] | None,
        *,
        fp8_cache: bool = False,
    ) -> None:
        self._spec, self._graphs, self._rotary = spec, graphs, rotary
        self._fp8_cache = fp8_cache

    def embed(self, token_ids: Int32) -> Float64:
        """Embeds sequences [B,S] from position 0 on: [B,S,H]."""
        weights = self._weights("embed")
        hidden: Float64 = weights["token_embedding"][token_ids].astype(np.float64)
        if "position_embedding" in weights:
            hidden = hidden + weights["position_embedding"][: token_ids.shape[1]]
        return hidden

    def block(self, index: int, hidden: Float64) -> Tensors:
        """Runs a block on whole sequences, without a cache.

        Args:
            index: Which block.
            hidden: [B,S,H].

        Returns:
            Every tensor that goes into or comes out of a matrix product, in their order, queries
            and keys behind their norms where they have some, and the block's output as `HIDDEN`:
            [B,S,features] each.
        """
        return self._run_block(index, self.block_weights(index), hidden)

    def exit_block(self, graph: str, exit: int, hidden: Float64) -> Tensors:
        """Runs a block behind an exit on whole sequences, without a cache.

        Args:
            graph: Its name.
            exit: Of the shortcut's exits, from 0.
            hidden: [B,S,H] after the exit's blocks.

        Returns:
            As `block`.
        """
        weights = self._weights(graph)
        scaled = hidden * weights["exit.scale"][exit] + weights["exit.shift"][exit]
        return self._run_block(self._spec.blocks - 1, weights, scaled)

    def _run_block(self, index: int, weights: Weights, hidden: Float64) -> Tensors:
        spec, found = self._spec, Tensors()
        seen = found["attention.norm"] = self._normed(hidden, weights, "attention", "before")
        qkv = found[QKV] = _linear(seen, weights, QKV)
        if spec.qk_norm != "none":
            qkv = found[QKV_NORMED] = self._norm_queries_and_keys(qkv, weights)
        mixed = found["attention.mixed"] = self._attend(qkv, index)
        out = found[ATTENTION_OUT] = _linear(mixed, weights, ATTENTION_OUT)
        attended = hidden + self._normed(out, weights, "attention", "after")
        before = hidden if spec.parallel else attended
        seen = found["mlp.norm"] = self._normed(before, weights, "mlp", "before")
        up = found[MLP_UP] = _linear(seen, weights, MLP_UP)
        inner = found["mlp.inner"] = self._activate(up)
        down = found[MLP_DOWN] = _linear(inner, weights, MLP_DOWN)
        found[HIDDEN] = attended + self._normed(down, weights, "mlp", "after")
        return found

    def block_weights(self, index: int) -> dict[str, Any]:
        """A block's tensors by name: arrays mapped into memory, or `Dequantised`."""
        return self._weights(block_name(index))

    def pass_on(
        self, index: int, weights: Weights, hidden: Float64, matrix: Callable[[str, Float64], Any]
    ) -> None:
        """Runs a block on many sequences in little memory, a few of them at a time.

        Args:
            index: Which block.
            weights: Its tensors but for its matrices.
            hidden: [B,S,H], whose place the block's output takes.
            matrix: Gives a matrix by its name and all that it is to multiply, [B,S,inputs].
        """
        spec = self._spec

        def product(name: str, x: Float64, then: Callable[[Float64], Float64]) -> Float64:
            found = matrix(name, x)
            return _some_at_a_time(
                x, lambda some: then(add_bias(multiply(some, found), weights, name))
            )

        def attend(qkv: Float64) -> Float64:
            if spec.qk_norm != "none":
                qkv = self._norm_queries_and_keys(qkv, weights)
            return self._attend(qkv, index)

        # What is done with goes at once: each of these is as large as the text.
        x = product(QKV, self._normed(hidden, weights, "attention", "before"), attend)
        x = product(ATTENTION_OUT, x, lambda out: self._normed(out, weights, "attention", "after"))
        if spec.parallel:
            seen = self._normed(hidden, weights, "mlp", "before")
            hidden += x
        else:
            hidden += x
            seen = self._normed(hidden, weights, "mlp", "before")
        x = product(MLP_UP, seen, self._activate)
        del seen
        hidden += product(MLP_DOWN, x, lambda down: self._normed(down, weights, "mlp", "after"))

    def logits(self, hidden: Float64, blocks_run: int) -> Float64:
        """The model's own head after all blocks, else the exit head: [rows,H] to [rows,V]."""
        return softcapped(self._uncapped(hidden, blocks_run), self._spec.logit_softcap)

    def _uncapped(self, hidden: Float64, blocks_run: int) -> Float64:
        if blocks_run == self._spec.blocks:
            return self._final(hidden, self._weights("final_head"))
        weights = self._weights("exit_head")
        if "exit.scale" in weights:
            jump = self._mlp_jump(hidden, weights, blocks_run)[MLP_DOWN]
            return self._final(hidden + jump, weights)
        z = multiply(hidden, weights["project"]) + weights["project.bias"]
        if "gates" in weights:
            jump = float(weights["gates"][blocks_run - 1]) * multiply(z, weights["up"])
            return self._final(hidden + jump, weights)
        z = z / _root_mean_square(z, self._spec.norm_epsilon)
        logits: Float64 = multiply(z, _columns(weights["vocabulary"]))
        logits += weights.get("vocabulary.bias", 0)
        return logits

    def mlp_jump(self, hidden: Float64, blocks_run: int) -> Tensors:
        """What goes into and comes out of the products of an MLP shortcut; none of another."""
        weights = self._weights("exit_head")
        return self._mlp_jump(hidden, weights, blocks_run) if "exit.scale" in weights else {}

    def _mlp_jump(self, hidden: Float64, weights: Weights, blocks_run: int) -> Tensors:
        scale, bias = (weights[name][blocks_run - 1] for name in ("exit.scale", "exit.bias"))
        normed = self._norm(hidden, {"exit.weight": scale}, "exit")
        up = multiply(normed, weights["mlp.up.weight"]) + bias
        inner = self._activate(up)
        down = multiply(inner, weights["mlp.down.weight"])
        return {"mlp.norm": normed, "mlp.up": up, "mlp.inner": inner, MLP_DOWN: down}

    def _final(self, hidden: Float64, weights: Weights) -> Float64:
        return multiply(self.final_norm(hidden, weights), _columns(weights["head"]))

    def final_norm(self, hidden: Float64, weights: Weights) -> Float64:
        """What the model's own head multiplies: [...,H]."""
        return self._norm(hidden, weights, "final_norm")

    def _weights(self, graph: str) -> dict[str, Any]:
        """A graph's weights as they are stored, mapped into memory; quantised ones by their name.

        Arrays, or `Dequantised` where a matrix is.
        """
        model = onnx.load(self._graphs / f"{graph}.onnx", load_external_data=False)
        weights: dict[str, Any] = map_tensors(model, self._graphs)
        form = format_of(model)
        for name in [each.removesuffix(PACKED) for each in weights if each.endswith(PACKED)]:
            matrix = matrix_of(weights, name)
            assert matrix is not None
            assert form is not None
            weights[name] = Dequantised(matrix, form)
        return weights

    def _normed(
        self, x: Float64, weights: Weights, part: str, place: Literal["before", "after"]
    ) -> Float64:
        """What goes into a part of a block, or comes out of it: normed where the model does."""
        if not self._spec.norms_are(place):
            return x
        return self._norm(x, weights, f"{part}.{self._spec.norm_name(place)}")

    def _norm(self, x: Float64, weights: Weights, name: str) -> Float64:
        if self._spec.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        normed: Float64 = x / _root_mean_square(x, self._spec.norm_epsilon)
        scaled: Float64 = normed * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)
        return scaled

    def _norm_queries_and_keys(self, qkv: Float64, weights: Weights) -> Float64:
        """[B,S,(heads + 2 kv_heads) D], of which the values stay as they are."""
        spec, at, parts = self._spec, 0, []
        kinds = ("q_norm", spec.heads), ("k_norm", spec.kv_heads)
        for (name, heads), width in zip(kinds, spec.qk_norm_features, strict=True):
            part = qkv[..., at : (at := at + heads * spec.head_dim)]
            rows = part.reshape(*part.shape[:-1], -1, width)
            rows = rows / _root_mean_square(rows, spec.norm_epsilon)
            parts.append((rows * weights[f"attention.{name}.weight"]).reshape(part.shape))
        return np.concatenate([*parts, qkv[..., at:]], axis=-1)

    def _activate(self, up: Float64) -> Float64:
        """The MLP's activation, gated where the model's is."""
        return (gated if self._spec.gated else activate)(up, self._spec.activation)

    def _attend(self, qkv: Float64, block: int) -> Float64:
        """Causal attention of whole sequences: [B,S,(heads + 2 kv_heads) D] to [B,S,heads D]."""
        spec = self._spec
        batch, length, _ = qkv.shape
        heads = qkv.reshape(batch, length, -1, spec.head_dim).transpose(0, 2, 1, 3)
        q, k, v = np.split(heads, [spec.heads, spec.heads + spec.kv_heads], axis=1)
        if spec.rotary_dim_of(block):
            second_set = spec.rotations_of(block) == SECOND
            q, k = (self._rotate(x, second_set=second_set) for x in (q, k))
        if self._fp8_cache:
            k, v = (_as_fp8(x) for x in (k, v))
        group = spec.heads // spec.kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = spec.attention_scales[block] * (q @ k.transpose(0, 1, 3, 2))
        scores = softcapped(scores, spec.attention_softcap)
        distance = np.arange(length)[:, None] - np.arange(length)
        visible = (distance >= 0) & (distance < (spec.window_of(block) or length))
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed: Float64 = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        return mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def _rotate(self, x: Float64, *, second_set: bool) -> Float64:
        """Rotates [B,heads,S,D] by positions; with LongRoPE by its short factors."""
        assert self._rotary is not None
        rows_before = len(self._rotary[0]) // 2 if second_set else 0
        rows = slice(rows_before, rows_before + x.shape[2])
        cos, sin = (table[rows].astype(np.float64) for table in self._rotary)
        half = self._spec.rotary_dim // 2
        first, second, rest = np.split(x, [half, 2 * half], axis=-1)
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
        )


def _root_mean_square(x: Float64, epsilon: float) -> Float64:
    result: Float64 = np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return result


def _some_at_a_time(x: Float64, function: Callable[[Float64], Float64]) -> Float64:
    """A function of sequences [B,S,features] that knows each alone."""
    step = max(1, TOGETHER // x.shape[1])
    first = function(x[:step])
    result = np.empty((len(x), *first.shape[1:]))
    result[:step] = first
    for start in range(step, len(x), step):
        result[start : start + step] = function(x[start : start + step])
    return result


def add_bias(y: Float64, weights: Weights, name: str) -> Float64:
    """A product with its bias, where it has one."""
    biased: Float64 = y + weights.get(f"{name}.bias", 0)
    return biased


def _linear(x: Float64, weights: Weights, name: str) -> Float64:
    return add_bias(multiply(x, weights[f"{name}.weight"]), weights, name)


class Dequantised:
    """A quantised matrix x @ W, as float64 where columns are taken of it.

    Args:
        matrix: Its numbers.
        form: Its format.
    """

    def __init__(self, matrix: QuantisedMatrix, form: WeightFormat) -> None:
        self._matrix, self._form = matrix, form
        outputs, groups = matrix.scales.shape
        self.shape = form.inputs_of(groups), outputs

    def __getitem__(self, key: tuple[slice, slice]) -> Float64:
        return dequantise(self._matrix.rows(key[1]), self._form, np.float64).T


def _columns(head: Any) -> Any:
    """A head [V, features] as a matrix x @ W; quantised ones are that already."""
    return head if isinstance(head, Dequantised) else head.T


def multiply(x: Float64, matrix: Any) -> Float64:
    """x @ matrix, the matrix widened some columns at a time: of fp16 that takes the most time."""
    rows, columns = matrix.shape
    step = max(1, CHUNK // rows)
    flat = x.reshape(-1, rows)
    result = np.empty((len(flat), columns))

    def multiply_some(start: int) -> None:
        part = slice(start, start + step)
        result[:, part] = flat @ matrix[:, part].astype(np.float64)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(multiply_some, range(0, columns, step)))
    return result.reshape(*x.shape[:-1], columns)


def _as_fp8(x: Float64) -> Float64:
    """Rounded to OCP's e4m3, larger numbers to its largest."""
    rounded: Float64 = np.clip(x, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(x.dtype)
    return rounded
