"""Attention in float64, and the cases that the kernels are compared with it on."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from elements import DTYPES, macros
from tolerances import (
    ATTENTION_BF16_RELATIVE,
    ATTENTION_FP16_RELATIVE,
    ATTENTION_FP32_RELATIVE,
    FP8_E4M3_RELATIVE,
)

from ojfa_export.backends.tensorrt.attention import PAGE, Geometry, Operands
from ojfa_export.models.precision import Precision


@dataclass(frozen=True)
class Variant:
    """A model's attention, as far as it matters to the kernels."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    window: int
    precision: Precision = "fp16"
    unrotated: bool = False  # a block that rotates nothing, of a model that rotates
    softcap: float = 0.0  # of scores; 0 for none
    of_all: bool = False  # a block without the window that others have
    fp8_cache: bool = False

    @property
    def dtype(self) -> type:
        return DTYPES[self.precision]

    @property
    def geometry(self) -> Geometry:
        sizes = (np.dtype(each).itemsize for each in (self.dtype, self.cached))
        return Geometry(self.heads, self.kv_heads, self.head_dim, self.rotary_dim, *sizes)

    @property
    def cached(self) -> type:
        """What the cache's numbers are."""
        return ml_dtypes.float8_e4m3fn if self.fp8_cache else self.dtype

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def definitions(self) -> dict[str, int]:
        return {
            **macros(self.precision),
            "FP8_CACHE": int(self.fp8_cache),
            "HEAD_DIM": self.head_dim,
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "ROTARY_DIM": self.rotary_dim,
            "UNROTATED": int(self.unrotated),
            "WINDOW": self.window,
            "WINDOWS_DIFFER": int(self.of_all),
            "SOFTCAP": int(np.float32(self.softcap).view(np.uint32)),
            "NORM_LAYER": 0,
            "ACTIVATION": 0,
            "GATED": 1,
        }


TOLERANCES = {
    "fp16": ATTENTION_FP16_RELATIVE,
    "bf16": ATTENTION_BF16_RELATIVE,
    "fp32": ATTENTION_FP32_RELATIVE,
}
# Every width of a row in shared memory, heads and groups that fill no tile, or more than one.
VARIANTS = {
    "mha": Variant(4, 4, 64, 64, 0),
    "gqa": Variant(8, 2, 128, 128, 0),
    "group-of-three": Variant(6, 2, 32, 16, 0),
    "wide-group": Variant(20, 1, 16, 16, 0),
    "window": Variant(4, 2, 96, 96, 40),
    "learned-positions": Variant(3, 3, 80, 0, 0),
    "unrotated": Variant(4, 2, 64, 64, 0, unrotated=True),
    "small-head": Variant(4, 2, 8, 8, 0),
    "head-of-100": Variant(2, 1, 100, 100, 0),
    "wide-head": Variant(2, 2, 256, 128, 0),
    "bf16": Variant(6, 2, 96, 96, 40, "bf16"),
    "fp8-cache": Variant(8, 2, 128, 128, 0, fp8_cache=True),
    "fp8-cache-bf16": Variant(6, 2, 80, 80, 40, "bf16", fp8_cache=True),
    "fp8-cache-wide-head": Variant(2, 1, 256, 128, 0, fp8_cache=True),
    "softcap": Variant(4, 2, 32, 32, 40, "bf16", softcap=1.5, of_all=True),
    "fp32": Variant(4, 2, 64, 64, 0, "fp32"),
    "fp32-window": Variant(4, 4, 16, 8, 40, "fp32"),
    "fp32-head-of-128": Variant(2, 1, 128, 128, 0, "fp32"),
    "fp32-wide-head": Variant(2, 1, 256, 256, 24, "fp32"),
    "fp32-odd": Variant(3, 1, 20, 20, 0, "fp32"),
}


class Example:
    """Random tokens and a random cache of some sequences.

    Args:
        variant: The model's attention.
        rng: Random numbers.
        pasts: Positions that each sequence has in the cache.
        tokens: New ones of each sequence.
        capacity: Of the cache.
        chunks: New tokens of each sequence, where they differ.
    """

    def __init__(
        self,
        variant: Variant,
        rng: np.random.Generator,
        pasts: list[int],
        tokens: int,
        capacity: int,
        chunks: list[int] | None = None,
    ) -> None:
        self.variant = variant
        self.scale = float(variant.head_dim**-0.5 * rng.uniform(0.5, 2))
        self.chunks = chunks or [tokens] * len(pasts)
        count = sum(self.chunks)
        self.qkv = rng.standard_normal((count, variant.width), np.float32)
        shape = (len(pasts), variant.kv_heads, capacity, variant.head_dim)
        self.keys = rng.standard_normal(shape, np.float32).astype(variant.cached)
        self.values = rng.standard_normal(shape, np.float32).astype(variant.cached)
        for row, past in enumerate(pasts):  # what was never written is anything
            self.keys[row, :, past:] = np.nan
            self.values[row, :, past:] = np.nan
        angles = rng.uniform(0, 2 * np.pi, (capacity, variant.rotary_dim // 2))
        self.cosines = np.cos(angles).astype(np.float32)
        self.sines = np.sin(angles).astype(np.float32)
        both = zip(pasts, self.chunks, strict=True)
        self.positions = np.concatenate([past + np.arange(new) for past, new in both])
        self.positions = self.positions.astype(np.int32)
        self.sequences = np.repeat(np.arange(len(pasts), dtype=np.int32), self.chunks)
        self.most_pages = -(-capacity // PAGE)
        pages = rng.permutation(len(pasts) * self.most_pages)
        self.table = pages.reshape(-1, self.most_pages).astype(np.int32)
        self.out = np.full((count, variant.heads * variant.head_dim), np.nan, variant.dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """Those that kernels are given."""
        names = ("out", "qkv", "cosines", "sines", "positions", "sequences", "table")
        others = {name: getattr(self, name) for name in names}
        return {**others, "keys": self.in_pages(self.keys), "values": self.in_pages(self.values)}

    def operands(self, addresses: dict[str, int]) -> Operands:
        if self.variant.unrotated:
            addresses = {**addresses, "cosines": 0, "sines": 0}
        return Operands(
            **addresses, most_pages=self.most_pages, scale=self.scale, of_all=self.variant.of_all
        )

    def chunk_list(self, which: list[int]) -> np.ndarray:
        """First token and number of tokens of some sequences, as kernels are given them."""
        firsts = np.cumsum([0, *self.chunks])
        rows = [(firsts[index], self.chunks[index]) for index in which]
        return np.array(rows, np.int32).reshape(-1, 2)

    def in_pages(self, cache: np.ndarray) -> np.ndarray:
        """[sequences, kv_heads, capacity, head_dim] as pages, in the order of the table."""
        sequences, heads, capacity, width = cache.shape
        pages = np.full((self.table.size, heads, PAGE, width), np.nan, cache.dtype)
        for row in range(sequences):
            for index, page in enumerate(self.table[row]):
                part = cache[row, :, index * PAGE : min((index + 1) * PAGE, capacity)]
                pages[page, :, : part.shape[1]] = part
        return pages

    def from_pages(self, pages: np.ndarray) -> np.ndarray:
        """What `in_pages` was given."""
        whole = np.concatenate([pages[self.table[:, i]] for i in range(self.most_pages)], axis=2)
        return whole[:, :, : self.keys.shape[2]]

    def expected_cache(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values after attention, in float64 and not rounded."""
        variant, heads = self.variant, self._heads
        new_keys = slice(variant.heads, variant.heads + variant.kv_heads)
        keys, values = self.keys.astype(np.float64), self.values.astype(np.float64)
        for token, (position, row) in enumerate(zip(self.positions, self.sequences, strict=True)):
            keys[row, :, position] = self.rotated(heads[token, new_keys], position)
            values[row, :, position] = heads[token, new_keys.stop :]
        return keys, values

    @property
    def _heads(self) -> np.ndarray:
        return self.qkv.astype(np.float64).reshape(len(self.qkv), -1, self.variant.head_dim)

    def expected_out(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What attention gives in float64, of a cache that has the new tokens."""
        variant, heads = self.variant, self._heads
        out = np.empty((len(heads), variant.heads, variant.head_dim))
        group = variant.heads // variant.kv_heads
        for token, (position, row) in enumerate(zip(self.positions, self.sequences, strict=True)):
            queries = self.rotated(heads[token, : variant.heads], position)
            limit = 0 if variant.of_all else variant.window
            oldest = max(0, position + 1 - limit) if limit else 0
            for head, query in enumerate(queries):
                seen = (row, head // group, slice(oldest, position + 1))
                score = self.scale * keys[seen] @ query
                if variant.softcap:
                    score = variant.softcap * np.tanh(score / variant.softcap)
                weight = np.exp(score - score.max())
                out[token, head] = weight @ values[seen] / weight.sum()
        return out.reshape(len(heads), -1)

    def rotated(self, heads: np.ndarray, position: int) -> np.ndarray:
        if self.variant.unrotated:
            return heads
        half = self.variant.rotary_dim // 2
        first, second, rest = np.split(heads, (half, 2 * half), axis=-1)
        cosine, sine = self.cosines[position], self.sines[position]
        turned = (first * cosine - second * sine, second * cosine + first * sine, rest)
        return np.concatenate(turned, axis=-1)

    def check(self, out: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Compares with float64, relative to the largest number; keys and values as pages.

        A cache of fp8 is rounded as coarsely as that is, and attended to as it came to be.
        """
        tolerance, rounding = TOLERANCES[self.variant.precision], 0.0
        cache = [self.from_pages(each).astype(np.float64) for each in (keys, values)]
        exact = self.expected_cache()
        seen = exact
        if self.variant.fp8_cache:
            rounding, seen = FP8_E4M3_RELATIVE, cache
        for actual, wanted, name, relative in (
            (out.astype(np.float64), self.expected_out(*seen), "out", 0.0),
            (cache[0], exact[0], "keys", rounding),
            (cache[1], exact[1], "values", rounding),
        ):
            atol = tolerance * np.nanmax(np.abs(wanted))
            np.testing.assert_allclose(
                actual, wanted, rtol=relative, atol=atol, equal_nan=True, err_msg=name
            )
