"""Attention's kernels alone, and in a block of our kernels: `python -m bench.gpu.attention`.

Needs no TensorRT: kernels, random weights and caches, one CUDA graph over all blocks, each of
which has its own memory. Prints microseconds a block, and the share of a copy's bandwidth that
attention reads with. `--chain --weights int4` is of blocks with quantised weights, `--cache fp8`
of keys and values in fp8.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.gpu.clock import copy_bandwidth, graph_time
from bench.gpu.shapes import SHAPES, SMALL_FLOAT8
from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.cublas import Cublas
from ojfa_export.backends.cuda.device import Device, the_device
from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.cuda.sources import SMALL_WIDTH, definitions
from ojfa_export.backends.passes import Chunk, positions_of, slots_of
from ojfa_export.backends.tensorrt.attention import (
    PAGE,
    STEP_QUERIES,
    Attention,
    Chunks,
    Geometry,
    Operands,
    Scratch,
)
from ojfa_export.backends.tensorrt.gemm import GemmProducts
from ojfa_export.backends.tensorrt.layout import STEP, TILE, tiles_of, words_of
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS, LinearKernels, Norm
from ojfa_export.backends.tensorrt.matrices import DeviceMatrix
from ojfa_export.backends.tensorrt.narrow import on_tensor_cores
from ojfa_export.backends.tensorrt.products import ProductsWith
from ojfa_export.backends.tensorrt.quantised import (
    MOST_QUANTISED_TOKENS,
    DequantisedProducts,
    QuantisedKernels,
)
from ojfa_export.backends.tensorrt.quantised_room import QuantisedShape
from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.spec import ModelSpec

# Llama 3 8B's blocks have grouped heads, which none of the other shapes has.
GROUPED = SHAPES["llama2-7b"].model_copy(update={"kv_heads": 8, "intermediate_size": 14336})
ALL_SHAPES = {**SHAPES, "llama3-8b": GROUPED}
POOL = 1 << 24
Row = dict[str, Any]
# Of a block, by name: as stored, elements or quantised.
Weights = dict[str, Any]
FORMATS = {
    "int4": WeightFormat(storage="int4", group_size=128, zero_points=True),
    "int8": WeightFormat(storage="int8", group_size=128, zero_points=True),
    "fp8": WeightFormat(storage="fp8", group_size=128),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times the attention kernels on this GPU.")
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, default=["llama2-7b"])
    parser.add_argument("--past", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs="*", default=[512])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--chain", action="store_true", help="whole blocks too")
    parser.add_argument("--weights", choices=FORMATS, help="of the blocks; fp16 unless given")
    parser.add_argument("--cache", choices=["fp8"], help="of keys and values; fp16 unless given")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    device = the_device()
    copied = copy_bandwidth(device)
    print(f"{device.name}: copies {copied / 1e12:.2f} TB/s", flush=True)
    rows: list[Row] = []
    for name in options.shapes:
        form, fp8_cache = FORMATS.get(options.weights), options.cache == "fp8"
        bench = Bench(device, ALL_SHAPES[name], options.blocks, form, fp8_cache=fp8_cache)
        print(f"{name}: attention of", flush=True)
        for row in [*bench.steps(options.batch, options.past), *bench.prompts(options.prompt)]:
            row |= {"shape": name, "share": row["bytes"] / (row["us"] * 1e-6) / copied}
            print("  {what}: {us:.2f} us, {share:.0%} of a copy".format(**row), flush=True)
            rows.append(row)
        if options.chain:
            for row in bench.chain(options.batch, options.past):
                row["shape"] = name
                print("  {what}: {us:.2f} us".format(**row), flush=True)
                rows.append(row)
    if options.out:
        described = {"gpu": device.name, "copy_bytes_per_second": copied, "rows": rows}
        options.out.write_text(json.dumps(described, indent=1) + "\n")


class Bench:
    """Blocks of one shape with random weights and caches.

    Args:
        device: The GPU.
        spec: The shape.
        blocks: How many.
        form: What their matrices are stored as; None for fp16.
        fp8_cache: Whether keys and values are in fp8.

    Attributes:
        device: The GPU.
        spec: The shape.
        kernels: Compiled for the shape.
        arrays: Makes arrays on the GPU.
    """

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        blocks: int,
        form: WeightFormat | None = None,
        *,
        fp8_cache: bool = False,
    ) -> None:
        self.device, self.spec, self._blocks, self._form = device, spec, blocks, form
        self.arrays = DeviceArrays(device)
        macros = definitions(spec, "fp16", form, fp8_cache=fp8_cache)
        self.kernels = Kernels(device, compile_kernels(macros, device.compute_capability))
        self._cached = np.dtype(np.uint8 if fp8_cache else np.float16)
        self._geometry = Geometry.of(spec, 2, self._cached.itemsize)
        most_new = STEP_QUERIES if spec.hidden_size <= SMALL_WIDTH else 1
        self._attention = Attention(self.kernels, self._geometry, device.multiprocessors, most_new)
        numbers = np.random.default_rng(0).standard_normal(POOL, np.float32)
        self._pool = self.arrays.lasting((POOL,), np.float16)
        self._cache_pool = self._pool
        if fp8_cache:
            self._cache_pool = self.arrays.lasting((POOL,), np.uint8)
            codes = numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            device.upload(codes, self._cache_pool.pointer)
        self._stored: dict[QuantisedShape, np.ndarray[Any, Any]] = {}
        device.upload((0.02 * numbers).astype(np.float16), self._pool.pointer)
        device.synchronize()

    def steps(self, batches: Sequence[int], pasts: Sequence[int]) -> list[Row]:
        """One token of each sequence, and as many of one."""
        rows = []
        for batch in batches:
            for past in pasts:
                caches = self._caches(batch, past + batch)
                for together in (True, False) if batch > 1 else (True,):
                    chunks = [Chunk(0, past, batch)]
                    if together:
                        chunks = [Chunk(slot, past, 1) for slot in range(batch)]
                    what = f"{batch} sequences" if together else f"{batch} tokens of one"
                    rows.append(
                        {
                            "what": f"{what}, past {past}",
                            "us": self._time(caches, chunks),
                            "bytes": self._read(past * len(chunks)),
                        }
                    )
                del caches
        return rows

    def prompts(self, lengths: Sequence[int]) -> list[Row]:
        """Prompts from the first position on."""
        rows = []
        for length in lengths:
            caches = self._caches(1, length)
            us = self._time(caches, [Chunk(0, 0, length)])
            rows.append({"what": f"a prompt of {length}", "us": us, "bytes": self._read(length)})
        return rows

    def chain(self, batches: Sequence[int], pasts: Sequence[int]) -> list[Row]:
        """Whole blocks by our kernels, one token of each sequence, and as many of one."""
        weights = [self.weights() for _ in range(self._blocks)]
        rows = []
        for batch in batches:
            for past in pasts:
                for together in (True, False) if batch > 1 else (True,):
                    works = self.block_works(past, weights, batch, together=together)
                    us = graph_time(self.device, partial(run_all, works)) / self._blocks
                    what = f"{batch} sequences" if together else f"{batch} tokens of one"
                    rows.append({"what": f"a block of {what}, past {past}", "us": us})
        for count, length in ((1, 512), (4, 512), (1, 2048)):
            works = self.prompt_works(count, length, weights)
            us = graph_time(self.device, partial(run_all, works)) / self._blocks
            rows.append({"what": f"a block of {count} prompts of {length}", "us": us})
        return rows

    def block_works(
        self,
        past: int,
        weights: Sequence[Weights],
        batch: int = 1,
        *,
        together: bool = True,
    ) -> list[Work]:
        """What puts each whole block on the stream, with so many tokens in the cache.

        A token of each sequence, or as many tokens of one.
        """
        caches = self._caches(batch, past + batch)
        chunks = [Chunk(slot, past, 1) for slot in range(batch)]
        return self._works(caches, chunks if together else [Chunk(0, past, batch)], weights)

    def prompt_works(self, count: int, length: int, weights: Sequence[Weights]) -> list[Work]:
        """What puts each whole block on the stream, for some prompts together."""
        chunks = [Chunk(slot, 0, length) for slot in range(count)]
        return self._works(self._caches(count, length), chunks, weights)

    def _read(self, positions: int) -> int:
        return 2 * positions * self.spec.kv_heads * self.spec.head_dim * self._cached.itemsize

    def _caches(self, batch: int, capacity: int) -> list[tuple[DeviceArray, DeviceArray]]:
        pages = batch * math.ceil(capacity / PAGE)
        shape = (pages, self.spec.kv_heads, PAGE, self.spec.head_dim)
        pool = self._cache_pool
        return [(self._filled(shape, pool), self._filled(shape, pool)) for _ in range(self._blocks)]

    def weights(self) -> Weights:
        """Random weights of one block."""
        return {
            name: self._filled((shape.outputs, shape.columns), self._pool)
            if self._form is None
            else self._quantised(shape, self._form)
            for name, shape in self._shapes().items()
        }

    def _shapes(self) -> dict[str, QuantisedShape]:
        spec = self.spec
        width, hidden, inner = spec.heads * spec.head_dim, spec.hidden_size, spec.intermediate_size
        qkv = width + 2 * spec.kv_heads * spec.head_dim
        return {
            "qkv": QuantisedShape(qkv, hidden, paired=False),
            "out": QuantisedShape(hidden, width, paired=False),
            "up": QuantisedShape(inner * (2 if spec.gated else 1), hidden, paired=spec.gated),
            "down": QuantisedShape(hidden, inner, paired=False),
        }

    def _quantised(self, shape: QuantisedShape, form: WeightFormat) -> DeviceMatrix:
        """Random numbers, with scales and zero points as of weights of 0.02."""
        outputs, columns, paired = shape
        words = words_of(outputs, columns, form, paired=paired)
        result = self.arrays.lasting((1, words), np.uint32)
        if shape not in self._stored:
            steps = tiles_of(outputs, paired=paired) * math.ceil(columns / STEP)
            numbers = steps * TILE * STEP * form.bits // 32
            rng = np.random.default_rng(3)
            host = rng.integers(0, 1 << 32, words, np.uint32)
            scales = rng.uniform(0.001, 0.005, words - numbers).astype(np.float32)
            if form.is_float:
                host[:numbers] &= np.uint32(0x01010101 * SMALL_FLOAT8)
            kept = np.uint32(0 if form.is_float else (1 << form.bits) - 1)
            host[numbers:] = (scales.view(np.uint32) & ~kept) | (host[numbers:] & kept)
            self._stored[shape] = host
        self.device.upload(self._stored[shape], result.pointer)
        return DeviceMatrix(result, (outputs, columns), paired)

    def _filled(self, shape: tuple[int, ...], pool: DeviceArray) -> DeviceArray:
        result = self.arrays.lasting(shape, pool.dtype)
        for at in range(0, result.nbytes, pool.nbytes):
            size = min(pool.nbytes, result.nbytes - at)
            self.device.copy(pool.pointer, result.pointer + at, size)
        return result

    def _time(
        self, caches: Sequence[tuple[DeviceArray, DeviceArray]], chunks: Sequence[Chunk]
    ) -> float:
        """Microseconds of attention."""
        works = self._works(caches, chunks)
        return graph_time(self.device, partial(run_all, works)) / len(caches)

    def _works(
        self,
        caches: Sequence[tuple[DeviceArray, DeviceArray]],
        chunks: Sequence[Chunk],
        weights: Sequence[Weights] = (),
    ) -> list[Work]:
        """What puts attention on the stream, or a block where there are weights, for each cache."""
        positions, sequences = positions_of(chunks), slots_of(chunks)
        spec, tokens = self.spec, len(positions)
        arrays = self.arrays
        width = spec.heads * spec.head_dim
        qkv_width = width + 2 * spec.kv_heads * spec.head_dim
        numbers = np.random.default_rng(1).standard_normal((tokens, qkv_width), np.float32)
        qkv = arrays.asarray(numbers)
        out = arrays.empty((tokens, width), np.float16)
        places = arrays.asarray(np.array([positions, sequences], np.int32))
        scratch = Scratch(self.device, arrays, self._geometry, tokens)
        tables = [arrays.asarray(table) for table in self._rotary(max(positions) + 1)]
        operands = Operands(
            out=out.pointer,
            qkv=qkv.pointer,
            keys=0,
            values=0,
            cosines=tables[0].pointer if tables else 0,
            sines=tables[1].pointer if tables else 0,
            positions=places.pointer,
            sequences=places.pointer + 4 * tokens,
            table=0,  # each has its own pages in a row
            most_pages=caches[0][0].shape[0] // len(chunks),
            scale=spec.attention_scales[0],
        )
        block = self._block(qkv, out) if weights else None
        launches = (Chunks(len(chunks), chunks[0].length),)

        def work(index: int) -> None:
            keys, values = (array.pointer for array in caches[index])
            given = replace(operands, keys=keys, values=values)

            def attend() -> None:
                self._attention.run(given, scratch, tokens, launches)

            if block:
                block(weights[index], attend)
            else:
                attend()

        return [partial(work, index) for index in range(len(caches))]

    def _block(
        self, qkv: DeviceArray, mixed: DeviceArray
    ) -> Callable[[Weights, Callable[[], None]], None]:
        spec, arrays, tokens = self.spec, self.arrays, len(mixed)
        linear = self.products(tokens)
        hidden = arrays.asarray(np.ones((tokens, spec.hidden_size), np.float32))
        inner = arrays.empty((tokens, spec.intermediate_size), np.float16)
        norm = Norm(arrays.asarray(np.ones((1, spec.hidden_size), np.float32)), None, 1e-5)

        def run(weights: Weights, attend: Callable[[], None]) -> None:
            linear.norm_linear(qkv, hidden, norm, weights["qkv"], None)
            attend()
            linear.linear(hidden, hidden, mixed, weights["out"], None)
            linear.norm_up(inner, hidden, norm, weights["up"], None)
            linear.linear(hidden, hidden, inner, weights["down"], None)

        return run

    def products(self, tokens: int) -> ProductsWith[Any]:
        """The kernels that a step of so many tokens is made of."""
        if self._form is None:
            return self._plain(tokens)
        dtype, made = np.dtype(np.float16), (self.device, self.arrays, self.kernels)
        shapes = self._shapes().values()
        if tokens <= MOST_QUANTISED_TOKENS:
            width = self.spec.hidden_size
            return QuantisedKernels(*made, self._form, dtype, shapes, width)
        most = max(shape.outputs * shape.columns for shape in shapes)
        return DequantisedProducts(*made, self._plain(tokens), dtype, most)

    def _plain(self, tokens: int) -> ProductsWith[DeviceArray]:
        if tokens <= MOST_TOKENS and self.spec.hidden_size > SMALL_WIDTH:
            return LinearKernels(self.device, self.kernels, 2)
        if tokens > MOST_TILED_TOKENS:
            dtype = np.dtype(np.float16)
            return GemmProducts(Cublas(self.device), self.arrays, self.kernels, dtype)
        return on_tensor_cores(
            self.device, self.arrays, self.kernels, DTYPES["fp16"], self.spec.hidden_size
        )

    def _rotary(self, rows: int) -> tuple[np.ndarray[Any, Any], ...]:
        if not self.spec.rotary_dim:
            return ()
        return Rotary(self.spec.rotary_dim, "default", 1e4, rows, {}).tables(rows)


def run_all(works: Sequence[Work]) -> None:
    """Puts pieces of work on the stream, one after the other."""
    for work in works:
        work()


if __name__ == "__main__":
    main()
