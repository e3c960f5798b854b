"""Our kernels in NumPy, by name, with their parameters by the names in the CUDA sources.

They show that the backend's own logic is right, and nothing about the kernels.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import re
import types
from typing import Any

import ml_dtypes
import numpy as np

from ojfa_export.backends.cuda.sources import ACTIVATIONS, SOURCES, source_directory
from stand_in.quantised import Layout, layout_of, stored_words

PAGE = 64  # as in tiles.cuh
MOST_FREED = 64 << 20  # bytes


class Allocations:
    """What is allocated, so that a kernel that goes beyond it, or uses what was freed, fails.

    What was freed keeps its memory for a while, so that nothing else comes to lie there.
    """

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.held: dict[int, tuple[Any, int]] = {}
        self.freed: collections.OrderedDict[int, int] = collections.OrderedDict()

    def add(self, start: int, buffer: Any, size: int) -> None:
        bisect.insort(self.starts, start)
        self.held[start] = buffer, size

    def drop(self, start: int) -> None:
        if start not in self.held or start in self.freed:
            raise AssertionError(f"{start:#x} is freed, and is no allocation")
        self.freed[start] = self.held[start][1]
        while sum(self.freed.values()) > MOST_FREED:
            oldest, _ = self.freed.popitem(last=False)
            del self.held[oldest], self.starts[bisect.bisect_left(self.starts, oldest)]

    def check(self, pointer: int, size: int) -> None:
        """Of memory that isn't the device's, such as a scalar's, nothing is known."""
        at = bisect.bisect_right(self.starts, pointer) - 1
        if at < 0:
            return
        start = self.starts[at]
        end = start + self.held[start][1]
        if pointer >= end:
            return
        if end < pointer + size:
            raise AssertionError(f"a kernel goes {pointer + size - end} bytes beyond an allocation")
        if start in self.freed:
            raise AssertionError(f"memory is used that was freed: {size} bytes at {pointer:#x}")


ALLOCATIONS = Allocations()


def view(pointer: int, dtype: Any, *shape: int) -> np.ndarray:
    """Memory as an array; for a scalar parameter's pointer too."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    ALLOCATIONS.check(pointer, size)
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype).reshape(shape)


PARAMETERS: dict[str, list[str]] = {}
for _source in SOURCES:
    _text = (source_directory() / _source).read_text().replace("\\\n", "\n")
    for _found in re.finditer(
        r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?"
        r"(\w+?)(?:##KIND##)?(?:_##TOKENS)?\(([^)]*)\)",
        _text,
    ):
        PARAMETERS[_found[1]] = re.findall(r"(\w+)\s*(?:,|$)", _found[2].strip())
# Kernels that return where they are called off.
CALLED_OFF = {"norm_linear", "norm_up", "linear", "tiled_linear", "tiled_up", "attention"}
CALLED_OFF |= {"add_normed", "attention_of_all", "wide_attention_of_all"}
CALLED_OFF |= {"wide_attention", "narrow_linear", "norm_narrow_linear", "norm_narrow_up"}
CALLED_OFF |= {"quantised_linear", "norm_quantised_linear", "norm_quantised_up"}
CALLED_OFF |= {"quantised_batch_linear", "quantised_batch_up"}
PARAMETERS["exit_check_beside"] = PARAMETERS["exit_check"]
for _name in ("attention", "wide_attention", "attention_of_all", "wide_attention_of_all"):
    PARAMETERS[_name] = PARAMETERS["NAME"]


class StandInKernels:
    """The kernels of engines/kernels for one model, in NumPy."""

    def __init__(self, macros: dict[str, int]) -> None:
        self.m = types.SimpleNamespace(**macros)
        narrow = ml_dtypes.bfloat16 if self.m.BFLOAT else np.float16
        self.element = np.dtype(narrow if self.m.HALF else np.float32)
        self.cached = np.dtype(ml_dtypes.float8_e4m3fn) if self.m.FP8_CACHE else self.element
        self.called_off = False

    def run(
        self, name: str, grid: tuple[int, int, int], values: tuple[Any, ...], threads: int
    ) -> None:
        kind, _, tokens = name.rpartition("_")
        if not tokens.isdigit():
            kind, tokens = name, "0"
        named = dict(zip(PARAMETERS[kind], values, strict=True))
        if self.called_off and kind in CALLED_OFF:
            return
        with np.errstate(over="ignore", invalid="ignore"):  # as on a GPU
            getattr(self, kind)(
                types.SimpleNamespace(**named, grid=grid, threads=threads, count=int(tokens))
            )

    def _floats(self, pointer: int, *shape: int) -> np.ndarray:
        return view(pointer, np.float32, *shape)

    def _elements(self, pointer: int, *shape: int) -> np.ndarray:
        return view(pointer, self.element, *shape)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self.element).astype(np.float32)

    def transpose(self, a: Any) -> None:
        self._elements(a.out, a.columns, a.rows)[...] = self._elements(
            getattr(a, "in"), a.rows, a.columns
        ).T

    def embed(self, a: Any) -> None:
        count = a.grid[0]
        positions = view(a.positions, np.int32, count) + a.steps
        view(a.positions_out, np.int32, count)[...] = positions
        for token, (id_, position) in enumerate(
            zip(view(a.ids, np.int32, count), positions, strict=True)
        ):
            out = self._floats(a.hidden + 4 * token * a.features, a.features)
            size = self.element.itemsize * a.features
            named = (
                int(id_) if id_ >= 0 else int(view(a.chosen - 4 * (1 + int(id_)), np.int32, 1)[0])
            )
            out[...] = self._elements(a.table + named * size, a.features)
            if a.learned:
                out += self._elements(a.learned + int(position) * size, a.features)

    def _normed(self, a: Any, width: int, columns: int) -> np.ndarray:
        hidden = self._floats(a.hidden, a.count, width).astype(np.float64)
        if self.m.NORM_LAYER and a.norm_weight:
            hidden = hidden - hidden.mean(axis=1, keepdims=True)
        y = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + a.epsilon)
        if a.norm_weight:
            y = y * self._floats(a.norm_weight, width)
        if a.norm_bias:
            y = y + self._floats(a.norm_bias, width)
        result = np.zeros((a.count, columns), np.float32)
        result[:, :width] = y
        return self._rounded(result)

    def _product(self, x: np.ndarray, a: Any, outputs: int) -> np.ndarray:
        matrix = self._elements(a.matrix, outputs, a.columns).astype(np.float32)
        bias = self._floats(a.bias, outputs) if a.bias else np.float32(0)
        return x @ matrix.T + bias

    def norm_linear(self, a: Any) -> None:
        x = self._normed(a, a.width, a.columns)
        self._floats(a.out, a.count, a.outputs)[...] = self._product(x, a, a.outputs)

    def norm_up(self, a: Any) -> None:
        self._up(a, self._normed(a, a.columns, a.columns))

    def _up(self, a: Any, x: np.ndarray) -> None:
        width = a.width_out
        y = self._product(x, a, width * (2 if self.m.GATED else 1))
        self._elements(a.inner, a.count, width)[...] = self._activated(y, width)

    def _activated(self, y: np.ndarray, width: int) -> np.ndarray:
        """Activation, and gate, of the MLP's first products."""
        gate = y[:, :width].astype(np.float64)
        kind = {number: name for name, number in ACTIVATIONS.items()}[self.m.ACTIVATION]
        if kind == "silu":
            inner = gate / (1 + np.exp(-gate))
        elif kind == "relu":
            inner = np.maximum(gate, 0)
        else:
            cubic = np.tanh(0.79788456 * (gate + 0.044715 * gate**3))
            inner = 0.5 * gate * (1 + cubic)
        return inner * y[:, width:] if self.m.GATED else inner

    def _layout(self, rows: int, columns: int, paired: bool) -> Layout:
        return layout_of(rows, columns, paired, *self._format())

    def _format(self) -> tuple[int, int, bool]:
        return self.m.WEIGHT_BITS, self.m.WEIGHT_GROUP, bool(self.m.WEIGHT_FLOAT)

    def lay_out_quantised(self, a: Any) -> None:
        layout = self._layout(a.rows, a.columns, bool(a.paired))
        numbers, words = stored_words(a, *self._format(), view)
        out = view(a.out, np.uint32, layout.number_words + layout.scale_words)
        layout.put(out, numbers, words)

    def _quantised(self, a: Any, rows: int, *, paired: bool) -> np.ndarray:
        """[rows, columns], the columns as they lie."""
        layout = self._layout(rows, a.columns, paired)
        return layout.take(view(a.matrix, np.uint32, layout.number_words + layout.scale_words))

    def dequantise(self, a: Any) -> None:
        found = self._quantised(a, a.rows, paired=bool(a.paired))
        order = view(a.order, np.int32, a.columns) if a.order else slice(None)
        self._elements(a.elements, a.rows, a.columns)[:, order] = found

    def _quantised_product(self, a: Any, x: np.ndarray, rows: int, *, paired: bool) -> np.ndarray:
        ordered = getattr(a, "places", 0)
        places = view(ordered, np.int32, a.columns) if ordered else slice(None)
        matrix = self._quantised(a, rows, paired=paired)[:, places]
        return x @ matrix.T + (self._floats(a.bias, rows) if a.bias else np.float32(0))

    def quantised_linear(self, a: Any) -> None:
        x = self._elements(a.x, a.tokens, a.columns).astype(np.float32)
        y = self._quantised_product(a, x, a.outputs, paired=False)
        if a.residual:
            y = y + self._floats(a.residual, a.tokens, a.outputs)
        self._floats(a.out, a.tokens, a.outputs)[...] = y

    quantised_batch_linear = quantised_linear

    def gather_columns(self, a: Any) -> None:
        shape = a.grid[0], a.columns
        order = view(a.order, np.int32, a.columns)
        self._elements(a.out, *shape)[...] = self._elements(a.x, *shape)[:, order]

    def quantised_batch_up(self, a: Any) -> None:
        x = self._elements(a.x, a.tokens, a.columns).astype(np.float32)
        self._quantised_up(a, x)

    def _quantised_up(self, a: Any, x: np.ndarray) -> None:
        gated = bool(self.m.GATED)
        y = self._quantised_product(a, x, a.width_out * (2 if gated else 1), paired=gated)
        inner = self._elements(a.inner, a.tokens, a.width_out)
        inner[...] = self._activated(y, a.width_out)

    def norm_quantised_linear(self, a: Any) -> None:
        a.count = a.tokens
        y = self._quantised_product(a, self._normed(a, a.width, a.columns), a.outputs, paired=False)
        self._floats(a.out, a.tokens, a.outputs)[...] = y

    def norm_quantised_up(self, a: Any) -> None:
        a.count = a.tokens
        self._quantised_up(a, self._normed(a, a.width, a.columns))

    def activate_products(self, a: Any) -> None:
        count, whole = a.grid[1], a.width * (2 if self.m.GATED else 1)
        y = self._elements(a.products, count, whole).astype(np.float32)
        if a.bias:
            y = y + self._floats(a.bias, whole)
        self._elements(a.inner, count, a.width)[...] = self._activated(y, a.width)

    def normalize(self, a: Any) -> None:
        a.count = a.grid[0]
        self._elements(a.x, a.count, a.columns)[...] = self._normed(a, a.width, a.columns)

    def add_normed(self, a: Any) -> None:
        shape = a.grid[0], a.width
        y = self._floats(a.y, *shape).astype(np.float64)
        normed = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + a.epsilon)
        normed *= self._floats(a.norm_weight, a.width)
        self._floats(a.out, *shape)[...] = self._floats(a.residual, *shape) + normed

    def cap_logits(self, a: Any) -> None:
        logits = self._floats(a.logits, a.numbers)
        logits[...] = np.tanh(logits / a.cap) * a.cap

    def tiled_up(self, a: Any) -> None:
        a.count = a.tokens
        self._up(a, self._elements(a.x, a.count, a.columns).astype(np.float32))

    def tiled_linear(self, a: Any) -> None:
        a.count = a.tokens
        self.linear(a)

    narrow_linear = tiled_linear

    def norm_narrow_linear(self, a: Any) -> None:
        a.count = a.tokens
        self.norm_linear(a)

    def norm_narrow_up(self, a: Any) -> None:
        a.count = a.tokens
        self._up(a, self._normed(a, a.width, a.columns))

    def linear(self, a: Any) -> None:
        x = self._elements(a.x, a.count, a.columns).astype(np.float32)
        y = self._product(x, a, a.outputs)
        if a.residual:
            y = y + self._floats(a.residual, a.count, a.outputs)
        self._floats(a.out, a.count, a.outputs)[...] = y

    def norm_queries_and_keys(self, a: Any) -> None:
        m, tokens = self.m, a.grid[0]
        qkv = self._floats(a.qkv, tokens, m.HEADS + 2 * m.KV_HEADS, m.HEAD_DIM)
        for weight, heads in (
            (a.query_weight, qkv[:, : m.HEADS]),
            (a.key_weight, qkv[:, m.HEADS : m.HEADS + m.KV_HEADS]),
        ):
            square = (heads.astype(np.float64) ** 2).mean(axis=-1, keepdims=True)
            heads[...] = heads / np.sqrt(square + a.epsilon) * self._floats(weight, m.HEAD_DIM)

    def _rotated(self, heads: np.ndarray, a: Any, position: int) -> np.ndarray:
        half = self.m.ROTARY_DIM // 2
        if not half or (self.m.UNROTATED and not a.cosines):
            return heads
        cosines = self._floats(a.cosines + 4 * position * half, half)
        sines = self._floats(a.sines + 4 * position * half, half)
        first, second = heads[..., :half], heads[..., half : 2 * half]
        turned = [first * cosines - second * sines, second * cosines + first * sines]
        return np.concatenate([*turned, heads[..., 2 * half :]], axis=-1)

    def _chunks(self, a: Any, count: int) -> list[range]:
        """The tokens of a launch, by chunk."""
        if not a.chunks:
            return [range(i * a.tokens, (i + 1) * a.tokens) for i in range(count)]
        listed = view(a.chunks, np.int32, count, 2)
        return [range(first, first + number) for first, number in listed.tolist()]

    def _token(self, a: Any, token: int) -> tuple[np.ndarray, int]:
        """Heads of a token's q, k and v, and its position."""
        heads = self.m.HEADS + 2 * self.m.KV_HEADS
        qkv = self._floats(a.qkv + 4 * token * heads * self.m.HEAD_DIM, heads, self.m.HEAD_DIM)
        return qkv, int(view(a.positions + 4 * token, np.int32, 1)[0])

    def _pages(self, a: Any, token: int, positions: int) -> tuple[list[np.ndarray], ...]:
        """Pages of keys and of values [KV_HEADS, PAGE, HEAD_DIM] of a token's sequence."""
        sequence = int(view(a.sequences + 4 * token, np.int32, 1)[0])
        count = -(-positions // PAGE)
        at = a.table + 4 * sequence * a.most_pages
        shape = (self.m.KV_HEADS, PAGE, self.m.HEAD_DIM)
        size = int(np.prod(shape)) * self.cached.itemsize
        return tuple(
            [
                view(cache + int(page) * size, self.cached, *shape)
                for page in view(at, np.int32, count)
            ]
            for cache in (a.keys, a.values)
        )

    def append(self, a: Any) -> None:
        self._append(a, range(a.grid[0]))

    def _append(self, a: Any, tokens: range) -> None:
        for token in tokens:
            if view(a.sequences + 4 * token, np.int32, 1)[0] < 0:
                continue
            qkv, position = self._token(a, token)
            keys, values = (pages[-1] for pages in self._pages(a, token, position + 1))
            _, k, v = np.split(qkv, [self.m.HEADS, self.m.HEADS + self.m.KV_HEADS])
            row = position % PAGE
            new = np.stack([self._rotated(k, a, position), v])
            if self.m.FP8_CACHE:  # larger ones become the largest
                new = np.clip(new, -448, 448)
            keys[:, row], values[:, row] = new

    def attention(self, a: Any) -> None:
        for tokens in self._chunks(a, a.grid[2]):
            assert len(tokens) <= a.tokens
            if len(tokens) <= a.most_new:
                self._append(a, tokens)
            self._attend(a, tokens)

    wide_attention = attention

    def attention_of_all(self, a: Any) -> None:
        assert self.m.WINDOWS_DIFFER
        a.of_all = True
        self.attention(a)

    wide_attention_of_all = attention_of_all

    def prompt_attention(self, a: Any) -> None:
        for tokens in self._chunks(a, a.grid[2]):
            assert len(tokens) <= a.tokens
            self._attend(a, tokens)

    def prompt_attention_of_all(self, a: Any) -> None:
        assert self.m.WINDOWS_DIFFER
        a.of_all = True
        self.prompt_attention(a)

    def _attend(self, a: Any, tokens: range) -> None:
        m = self.m
        window = 0 if hasattr(a, "of_all") else m.WINDOW
        cap = float(np.array(m.SOFTCAP, np.uint32).view(np.float32))
        for token in tokens:
            at = a.out + token * m.HEADS * m.HEAD_DIM * self.element.itemsize
            out = self._elements(at, m.HEADS, m.HEAD_DIM)
            qkv, position = self._token(a, token)
            query = a.scale * self._rotated(qkv[: m.HEADS], a, position).astype(np.float64)
            oldest = max(0, position + 1 - window) if window else 0
            seen = slice(oldest, position + 1)
            keys, values = (
                np.concatenate(pages, axis=1)[:, seen].astype(np.float64)
                for pages in self._pages(a, token, position + 1)
            )
            for head in range(m.HEADS):
                kv = head // (m.HEADS // m.KV_HEADS)
                scores = keys[kv] @ query[head]
                scores = np.tanh(scores / cap) * cap if cap else scores
                weights = np.exp(scores - scores.max())
                out[head] = weights / weights.sum() @ values[kv]

    def keep(self, a: Any) -> None:
        count = a.grid[0]
        hidden = self._floats(a.hidden, count, a.features)
        for token in range(count):
            sequence, position = (
                int(view(each + 4 * token, np.int32, 1)[0]) for each in (a.sequences, a.positions)
            )
            at = a.kept + 4 * a.features * (sequence * a.capacity + position)
            self._floats(at, a.features)[...] = hidden[token]

    def fetch(self, a: Any) -> None:
        count = a.grid[0]
        hidden = self._floats(a.hidden, count, a.features)
        for token in range(count):
            sequence, position = (
                int(view(each + 4 * token, np.int32, 1)[0]) for each in (a.sequences, a.positions)
            )
            at = a.kept + 4 * a.features * (sequence * a.capacity + position)
            hidden[token] = self._floats(at, a.features)

    def go_on(self, a: Any) -> None:
        self.cached = np.dtype(ml_dtypes.float8_e4m3fn) if self.m.FP8_CACHE else self.element
        self.called_off = False

    def choose(self, a: Any) -> None:
        from ojfa_export.backends.cuda import mailbox

        rows = a.grid[1]
        self._answer(a, self._floats(a.logits, rows, a.vocabulary), mailbox)

    def _answer(self, a: Any, logits: np.ndarray, mailbox: Any) -> None:
        from ojfa_export.decoding.confidence import confidences

        count = view(a.desk + 4 * mailbox.ROWS, np.uint32, 1)
        answer = int(count[0]) + 1
        best = logits.argmax(axis=1)
        said = confidences(logits, ("top", "margin", "entropy")).astype(np.float32)
        view(a.desk, np.int32, len(logits))[...] = best
        self._chosen(a, mailbox, answer)[: len(logits)] = best
        for row in range(len(logits)):
            token = (0, 0) if a.sampled else (int(best[row]), answer)
            numbers = [each for value in said[:, row] for each in (float(value), answer)]
            at = a.mail + self._place(mailbox, answer, row)
            packed = mailbox.ANSWER.pack(*token, int(best[row]), answer, *numbers)
            ctypes.memmove(at, packed, mailbox.ANSWER.size)
        if a.measure >= 0 and (said[a.measure].astype(np.float64) >= a.threshold).all():
            self.called_off = True
        if not a.sampled:
            count[0] = answer

    def _place(self, mailbox: Any, answer: int, row: int) -> int:
        return int(((answer - 1) % mailbox.SLOTS * mailbox.ROWS + row) * mailbox.ANSWER.size)

    def _chosen(self, a: Any, mailbox: Any, answer: int) -> np.ndarray:
        """Where an answer's tokens are kept for later passes."""
        at = a.desk + mailbox.CHOSEN_AT + 4 * mailbox.ROWS * ((answer - 1) % mailbox.SLOTS)
        return view(at, np.int32, mailbox.ROWS)

    def sample(self, a: Any) -> None:
        from ojfa_export.backends.cuda import mailbox
        from ojfa_export.decoding.sampling import Sampling

        rows = a.grid[0]
        count = view(a.desk + 4 * mailbox.ROWS, np.uint32, 1)
        answer = int(count[0]) + 1
        answers = mailbox.SLOTS * mailbox.ROWS * mailbox.ANSWER.size
        drawings = view(a.mail + answers, mailbox.DRAWING, mailbox.SLOTS, mailbox.ROWS)
        logits = self._floats(a.logits, rows, a.vocabulary)
        for row in range(rows):
            how = drawings[(answer - 1) % mailbox.SLOTS, row]
            token = int(view(a.desk + 4 * row, np.int32, 1)[0])
            if how["temperature"]:
                top_k = int(how["top_k"]) or None
                sampling = Sampling(float(how["temperature"]), top_k, float(how["top_p"]))
                token = sampling.pick(logits[row], float(how["draw"]))
            view(a.mail + self._place(mailbox, answer, row), np.int32, 2)[...] = token, answer
            view(a.desk + 4 * row, np.int32, 1)[0] = token
            self._chosen(a, mailbox, answer)[row] = token
        count[0] = answer

    def exit_check(self, a: Any) -> None:
        from ojfa_export.backends.cuda import mailbox

        if a.kept:
            a.grid = (a.count, 1, 1)
            self.keep(a)
        hidden = self._floats(a.hidden, a.count, a.features)
        z = hidden @ self._floats(a.project, a.rank, a.features).T + self._floats(a.bias, a.rank)
        z = z / np.sqrt((z**2).mean(axis=1, keepdims=True) + a.epsilon)
        matrix = self._elements(a.vocabulary, a.outputs, a.columns)[:, : a.rank].astype(np.float32)
        logits = (z @ matrix.T).astype(np.float32)
        if a.vocabulary_bias:
            logits += self._floats(a.vocabulary_bias, a.outputs)
        if a.logits:
            self._floats(a.logits, a.count, a.outputs)[...] = logits
        self._answer(a, logits, mailbox)

    exit_check_beside = exit_check

    def scale_and_shift(self, a: Any) -> None:
        x = self._floats(a.x, a.grid[0], a.features)
        scale, shift = (self._floats(each, a.features) for each in (a.scale, a.shift))
        self._floats(a.y, a.grid[0], a.features)[...] = x * scale + shift

    def side_by_side(self, a: Any) -> None:
        tokens, depths = a.grid[:2]
        positions, sequences = (
            view(each, np.int32, tokens).copy() for each in (a.positions, a.sequences)
        )
        view(a.positions_out, np.int32, tokens)[...] = positions
        kept = self._floats(a.kept, depths, a.slots, a.capacity, a.features)
        x = self._elements(a.x, tokens, depths, a.features)
        x[...] = kept[:, sequences, positions].swapaxes(0, 1)
        x[sequences < 0] = 0

    def see(self, a: Any) -> None:
        tokens, width = a.grid[0], a.features
        memory = self._floats(a.memory, tokens, width).copy()
        self._floats(a.hidden, tokens, width)[...] = memory
        positions = view(a.positions, np.int32, tokens) + a.steps
        view(a.positions_out, np.int32, tokens)[...] = positions
        seen = self._elements(a.seen, tokens, 2, width)
        for token, id_ in enumerate(view(a.ids, np.int32, tokens).tolist()):
            id_ = self._named(a, id_)
            if a.named:
                view(a.named + 4 * token * a.stride, np.int32, 1)[0] = id_
            row = self._elements(a.table + self.element.itemsize * width * id_, width)
            for place, (x, norm) in enumerate(
                ((row, a.embedding_norm), (memory[token], a.state_norm))
            ):
                x = x.astype(np.float64)
                scale = 1 / np.sqrt((x**2).mean() + a.epsilon)
                seen[token, place] = x * scale * self._floats(norm, width)

    def _named(self, a: Any, id_: int) -> int:
        return int(view(a.names + 4 * id_, np.int32, 1)[0]) if a.names else id_

    def name_tokens(self, a: Any) -> None:
        for row, id_ in enumerate(view(a.ids, np.int32, a.threads).tolist()):
            view(a.named + 4 * row * a.stride, np.int32, 1)[0] = self._named(a, id_)
