"""Products with weights of four bits alone: `python -m bench.gpu.quantised_products`.

Needs torch, with the NVRTC that comes with it, and nothing else. A token's products at Llama-2-7B's
shape, 32 blocks and the head, each with weights of its own, are one CUDA graph. Prints milliseconds
of a token, microseconds of each product, and the share of a copy's rate that its bytes are read
with; for several ways to launch the kernels, and for fp16's kernels in the same run. Every product
is compared with float64 first.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).parents[2] / "engines" / "kernels"
HIDDEN, INNER, BLOCKS, VOCABULARY, GROUP = 4096, 11008, 32, 32000, 128
# Rows, columns and whether gates are beside what they multiply.
MATRICES = {
    "qkv": (3 * HIDDEN, HIDDEN, False),
    "out": (HIDDEN, HIDDEN, False),
    "up": (2 * INNER, HIDDEN, True),
    "down": (HIDDEN, INNER, False),
    "head": (VOCABULARY, HIDDEN, False),
}
SHARED_BYTES = 227 << 10
# Of a multiprocessor; what the system and the kernels themselves take of a thread block.
ALONE, DECLARED = 228 << 10, 1280
MADE_FOR = (2, 4, 8, 16)  # tokens of the kernels
NORMED = 2  # tokens that a product normalises itself
DEVICE = "cuda"
EPSILON = 1e-5
TOLERANCE = 2e-3  # of the largest; inputs behind a norm are rounded to fp16 on both sides
MACROS = {
    "HALF": 1,
    "BFLOAT": 0,
    "HEAD_DIM": 128,
    "HEADS": 32,
    "KV_HEADS": 32,
    "ROTARY_DIM": 128,
    "UNROTATED": 0,
    "WINDOW": 0,
    "WINDOWS_DIFFER": 0,
    "SOFTCAP": 0,
    "NORM_LAYER": 0,
    "ACTIVATION": 0,
    "GATED": 1,
    "SMALL": 0,
    "WEIGHT_BITS": 4,
    "WEIGHT_GROUP": GROUP,
    "HIDDEN_SIZE": HIDDEN,
}


@dataclass(frozen=True)
class Way:
    """How kernels of quantised weights are compiled: as in quantised_linear.cu, unless said."""

    warps: tuple[int, int] = (12, 8)  # of one token or two, and of more
    together: int = 2
    chains: int = 1
    rings: tuple[int, ...] = (3, 2, 2, 3, 3)  # behind a norm; of 2, 4, 8 and 16 tokens

    def __str__(self) -> str:
        return f"{self.warps} warps x {self.together}, {self.chains} chains, rings {self.rings}"


WAYS = [
    Way(),
    Way(chains=2),
    *(Way(rings=rings) for rings in ((3, 2, 3, 2, 4), (4, 3, 1, 2, 2))),
    *(Way(warps) for warps in ((10, 8), (8, 12), (16, 8))),
    Way((16, 16), 1, 2, (4, 3, 3, 3, 3)),
]


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "XYZ"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


def check(status: int, what: str) -> None:
    """Ends where a call of the driver or of NVRTC failed."""
    if status:
        raise SystemExit(f"{what} failed: {status}")


class Program:
    """Compiled kernels.

    Args:
        sources: Of engines/kernels.
        macros: That they are compiled with.
    """

    def __init__(self, sources: Sequence[str], macros: dict[str, int]) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        code = _compiled(sources, macros)
        self._module = ctypes.c_void_p()
        check(self._driver.cuModuleLoadData(ctypes.byref(self._module), code), "loading")
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launch(
        self,
        name: str,
        grid: int,
        threads: int,
        arguments: Sequence[Any],
        shared: int = 0,
        *,
        overlapping: bool = True,
    ) -> None:
        """Puts a kernel on torch's stream; ints, floats, tensors and None are arguments."""
        values = [_argument(each) for each in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attribute = LaunchAttribute(id=6)  # programmatic stream serialization
        attribute.value[0] = 1
        config = LaunchConfig(
            *(grid, 1, 1, threads, 1, 1, shared),
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(attribute),
            count=int(overlapping),
        )
        function = self._function(name)
        check(self._driver.cuFuncSetAttribute(function, 8, shared), f"{name} with {shared} bytes")
        launched = self._driver.cuLaunchKernelEx(ctypes.byref(config), function, addresses, None)
        check(launched, f"launching {name} with {shared} bytes")

    def registers(self, name: str) -> int:
        """Of a thread."""
        value = ctypes.c_int()
        check(self._driver.cuFuncGetAttribute(ctypes.byref(value), 4, self._function(name)), name)
        return value.value

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            found = self._driver.cuModuleGetFunction(
                ctypes.byref(function), self._module, name.encode()
            )
            check(found, name)
            check(self._driver.cuFuncSetAttribute(function, 9, 100), name)  # carve-out
            self._functions[name] = function
        return self._functions[name]


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


def _nvrtc() -> ctypes.CDLL:
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = sorted(packages.glob("**/libnvrtc.so.*"))
    found = [path for path in found if "builtins" not in path.name and "alt" not in path.name]
    return ctypes.CDLL(str(found[-1]) if found else "libnvrtc.so")


def _compiled(sources: Sequence[str], macros: dict[str, int]) -> bytes:
    nvrtc = _nvrtc()
    headers = sorted(KERNELS.glob("*.cu*"))
    texts = (ctypes.c_char_p * len(headers))(*(path.read_bytes() for path in headers))
    names = (ctypes.c_char_p * len(headers))(*(path.name.encode() for path in headers))
    whole = "".join(f'#include "{name}"\n' for name in sources).encode()
    program = ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), whole, b"kernels.cu", len(headers), texts, names
    )
    check(made, "NVRTC")
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), given):
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise SystemExit(log.value.decode())
    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
    code = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetCUBIN(program, code), "NVRTC")
    return code.raw


@dataclass
class Operands:
    """What products of some tokens are given."""

    tokens: int
    hidden: torch.Tensor  # fp32
    norm: torch.Tensor
    x: dict[int, torch.Tensor]  # fp16, by columns
    normed: torch.Tensor  # fp16, room for a norm
    outs: dict[str, torch.Tensor]

    @classmethod
    def of(cls, tokens: int) -> Operands:
        """Random ones."""
        make: dict[str, Any] = {"device": DEVICE, "dtype": torch.float32}
        outs = {
            name: torch.zeros(tokens, rows // 2, device=DEVICE, dtype=torch.float16)
            if paired
            else torch.zeros(tokens, rows, **make)
            for name, (rows, _, paired) in MATRICES.items()
        }
        x = {width: torch.randn(tokens, width, **make).half() for width in (HIDDEN, INNER)}
        normed = torch.zeros(tokens, HIDDEN, device=DEVICE, dtype=torch.float16)
        hidden = torch.randn(tokens, HIDDEN, **make)
        return cls(tokens, hidden, torch.rand(HIDDEN, **make) + 0.5, x, normed, outs)

    def expected(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """In float64; out and down have no residual here."""
        if name in ("out", "down"):
            return self.x[matrix.shape[1]].double() @ matrix.T
        hidden = self.hidden.double()
        scale = 1 / torch.sqrt((hidden**2).mean(1, keepdim=True) + EPSILON)
        y = (hidden * scale * self.norm).half().double() @ matrix.T
        if name != "up":
            return y
        gate, up = y[:, :INNER], y[:, INNER:]
        return gate / (1 + torch.exp(-gate)) * up


Product = Callable[[Operands, str, torch.Tensor], None]


class Quantised:
    """Products with weights of four bits.

    Args:
        way: How.
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        macros = MACROS | {"TILES_TOGETHER": way.together, "PRODUCT_CHAINS": way.chains}
        macros |= dict(zip(("FEW_WARPS", "MANY_WARPS"), way.warps, strict=True))
        rings = ("RING_NORMED", *(f"RING_{most}" for most in MADE_FOR))
        macros |= dict(zip(rings, way.rings, strict=True))
        sources = ("quantised_layout.cu", "quantised_linear.cu", "around_products.cu")
        self.program = Program(sources, macros)
        self._blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def laid_out(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A random matrix as kernels want it, and in float64."""
        rows, columns, paired = MATRICES[name]
        numbers = torch.randint(0, 16, (rows, columns), device=DEVICE, dtype=torch.uint8)
        scales = torch.rand(rows, columns // GROUP, device=DEVICE) * 0.004 + 0.001
        points = torch.randint(0, 16, scales.shape, device=DEVICE, dtype=torch.uint8)
        packed = numbers[:, ::2] | numbers[:, 1::2] << 4
        packed_points = points[:, ::2] | points[:, 1::2] << 4
        tiles = _tiles(name)
        words = tiles * (columns // 128) * (256 + 16 * 128 // GROUP)
        out = torch.zeros(words, device=DEVICE, dtype=torch.int32)
        arguments = (out, packed, scales, packed_points, rows, columns, tiles, int(paired))
        self.program.launch("lay_out_quantised", 4 * self._blocks, 256, arguments)
        zero = points.double().repeat_interleave(GROUP, 1)
        exact = (numbers.double() - zero) * scales.double().repeat_interleave(GROUP, 1)
        return out, exact

    def __call__(self, given: Operands, name: str, matrix: torch.Tensor) -> None:
        rows, columns, paired = MATRICES[name]
        tokens, out, normed = given.tokens, given.outs[name], name not in ("out", "down")
        kind = "up" if paired else "linear"
        width = rows // 2 if paired else rows
        if normed and tokens <= NORMED:
            norm = (given.hidden, given.norm, None, EPSILON, HIDDEN)
            arguments = (out, *norm, None, matrix, None, columns, width, tokens)
            self._launch(f"norm_quantised_{kind}", name, tokens, arguments, columns)
            return
        x = given.x[columns]
        if normed:
            x = given.normed
            normalized = (x, given.hidden, given.norm, None, EPSILON, HIDDEN, HIDDEN)
            self.program.launch("normalize", tokens, 512, normalized)
        steps = self._pass_steps(name, tokens)
        before = (out,) if paired else (out, None)
        arguments = (*before, x, None, matrix, None, columns, width, tokens, steps)
        self._launch(
            f"quantised_{kind}_{MADE_FOR[self._size(tokens)]}", name, tokens, arguments, steps
        )

    def _launch(
        self, kernel: str, name: str, tokens: int, arguments: Sequence[Any], steps: int
    ) -> None:
        grid = min(_tiles(name), self._blocks)
        shared = self.shared_bytes(name, tokens, steps, normed=kernel.startswith("norm"))
        self.program.launch(kernel, grid, 32 * self._warps(tokens), arguments, shared)

    @staticmethod
    def _size(tokens: int) -> int:
        return next(at for at, most in enumerate(MADE_FOR) if tokens <= most)

    def _warps(self, tokens: int) -> int:
        return self._way.warps[0 if tokens <= MADE_FOR[0] else 1]

    def _pass_steps(self, name: str, tokens: int) -> int:
        steps = MATRICES[name][1] // 128
        for passes in range(1, steps + 1):
            each = math.ceil(steps / passes)
            if self._least(name, tokens, each) + DECLARED <= ALONE:
                return each
        raise SystemExit(f"no room for {tokens} tokens of {name}, {self._way}")

    def shared_bytes(self, name: str, tokens: int, steps: int, *, normed: bool = False) -> int:
        """As `backends.tensorrt.quantised_room` has it."""
        least = {
            each: self._least(
                each, tokens, self._pass_steps(each, tokens), normed=shape[1] == HIDDEN
            )
            for each, shape in MATRICES.items()
        }
        beside = sum(sorted(least.values())[-2:]) + 2 * DECLARED <= ALONE
        taken = self._least(name, tokens, steps, normed=normed)
        return max(taken, ALONE // (3 if beside else 2))

    def _least(self, name: str, tokens: int, steps: int, *, normed: bool = False) -> int:
        way, all_steps = self._way, MATRICES[name][1] // 128
        own = math.ceil(_tiles(name) / self._blocks)
        kept = own if steps < all_steps else {1: 16, 2: 8}.get(tokens, way.together)
        inputs = tokens * (min(steps, all_steps) * 128 + 32) * 2
        slot = way.together * (1024 + 64 * max(1, 128 // GROUP))
        ring = way.rings[0 if normed and tokens <= NORMED else 1 + self._size(tokens)]
        return inputs + self._warps(tokens) * (kept * tokens * 20 * 4 + ring * slot)


def _tiles(name: str) -> int:
    rows, _, paired = MATRICES[name]
    return math.ceil(rows / 2 / 8) if paired else math.ceil(rows / 16)


class Fp16:
    """Products in fp16, as `backends.tensorrt.linear` and `tiled` launch them."""

    def __init__(self) -> None:
        self.program = Program(("linear.cu", "tiled_linear.cu", "around_products.cu"), MACROS)
        self._blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def __call__(self, given: Operands, name: str, matrix: torch.Tensor) -> None:
        rows, columns, paired = MATRICES[name]
        tokens, out, normed = given.tokens, given.outs[name], name not in ("out", "down")
        kind, width = ("up", rows // 2) if paired else ("linear", rows)
        norm = (given.hidden, given.norm, None, EPSILON)
        if tokens <= 2:
            grid, shared = min(math.ceil(rows / 16), self._blocks), columns * tokens * 2
            if normed:
                between = () if paired else (HIDDEN,)
                arguments = (out, *norm, *between, matrix, None, columns, width)
                shared += columns * 8
                self.program.launch(f"norm_{kind}_{tokens}", grid, 512, arguments, shared)
            else:
                arguments = (out, None, given.x[columns], matrix, None, columns, width)
                self.program.launch(f"linear_{tokens}", grid, 512, arguments, shared)
            return
        x = given.normed if normed else given.x[columns]
        if normed:
            self.program.launch("normalize", tokens, 512, (x, *norm, HIDDEN, HIDDEN))
        steps, shared = self._pass(rows, columns, tokens)
        before = (out,) if paired else (out, None)
        arguments = (*before, x, matrix, None, columns, width, tokens, steps)
        grid = min(math.ceil(rows / 16), self._blocks)
        self.program.launch(
            f"tiled_{kind}_{8 if tokens <= 8 else 16}", grid, 512, arguments, shared
        )

    def _pass(self, rows: int, columns: int, tokens: int) -> tuple[int, int]:
        spans, groups = columns // 64, math.ceil(tokens / 8)
        for passes in range(1, spans):
            each = min(spans, math.ceil(spans / passes / 16) * 16)
            buffers = 2 if each >= spans else math.ceil(math.ceil(rows / 16) / self._blocks)
            shared = tokens * (128 * each + 64) + buffers * 16 * groups * 8 * 80
            if shared <= SHARED_BYTES:
                return each, shared
        raise AssertionError


def timed(work: Callable[[], object], repeats: int = 9) -> float:
    """Median microseconds of what `work` puts on the stream, as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    samples = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        samples.append(float(first.elapsed_time(last)) * 1e3)
    return sorted(samples)[repeats // 2]


def copy_rate() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(2 << 30, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    samples = []
    for _ in range(6):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        target.copy_(source)
        last.record()
        torch.cuda.synchronize()
        samples.append(float(first.elapsed_time(last)) * 1e-3)
    return 2 * source.nbytes / sorted(samples)[2]


def measured(
    product: Product, weights: dict[str, list[torch.Tensor]], tokens: int, copied: float, told: str
) -> None:
    """Prints a token's time and each product's."""
    given = Operands.of(tokens)
    products = {name: matrices for name, matrices in weights.items() if name != "head"}

    def token() -> None:
        for index in range(BLOCKS):
            for name, matrices in products.items():
                product(given, name, matrices[index])
        product(given, "head", weights["head"][0])

    us = timed(token)
    total = sum(matrix.nbytes for matrices in products.values() for matrix in matrices)
    total += weights["head"][0].nbytes
    shown = [f"{tokens} tokens: {us / 1e3:.3f} ms, {total / (us * 1e-6) / copied:.0%}"]
    for name, matrices in weights.items():
        each = timed(partial(_all, product, given, name, matrices)) / len(matrices)
        shown.append(f"{name} {each:.2f} us {matrices[0].nbytes / (each * 1e-6) / copied:.0%}")
    # Again and again the same weights, which the second-level cache holds: arithmetic alone.
    for name in ("qkv", "out") if told.startswith("  ") else ():
        same = [weights[name][0]] * len(weights[name])
        each = timed(partial(_all, product, given, name, same)) / len(same)
        shown.append(f"{name} from the cache {each:.2f} us")
    print(f"{told}; " + ", ".join(shown), flush=True)


def _all(product: Product, given: Operands, name: str, matrices: list[torch.Tensor]) -> None:
    for matrix in matrices:
        product(given, name, matrix)


def compared(product: Product, name: str, matrix: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of a product, of the largest number, over some numbers of tokens."""
    worst = 0.0
    for tokens in (1, 2, 3, 8, 9, 16):
        given = Operands.of(tokens)
        product(given, name, matrix)
        expected = given.expected(name, exact)
        error = (given.outs[name].double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error))
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times products with weights of four bits.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=110, help="after which no way is begun")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    copied = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copies {copied / 1e12:.2f} TB/s", flush=True)
    weights: dict[str, list[torch.Tensor]] = {}
    checked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for way in WAYS:
        if time.perf_counter() - began > options.seconds:
            break
        try:
            product = Quantised(way)
            if not weights:
                checked = {name: product.laid_out(name) for name in MATRICES}
                for name, (matrix, _) in checked.items():
                    copies = 8 if name == "head" else BLOCKS
                    weights[name] = [matrix.clone() for _ in range(copies)]
            errors = {name: compared(product, name, *pair) for name, pair in checked.items()}
            bad = {name: error for name, error in errors.items() if not error < TOLERANCE}
            kinds = ("norm_quantised_up", "quantised_linear_8", "quantised_linear_16")
            registers = [product.program.registers(kind) for kind in kinds]
            wrong = f", WRONG: {bad}" if bad else ""
            print(
                f"{way}: worst error {max(errors.values()):.1e}{wrong}, registers {registers}, "
                f"{product.shared_bytes('up', 1, 32, normed=True) >> 10} KiB for a token, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
            for tokens in options.tokens:
                measured(product, weights, tokens, copied, f"  {way}")
        except SystemExit as failure:
            print(f"{way}: {failure}", flush=True)
    del weights, checked
    torch.cuda.empty_cache()
    fp16 = {
        name: [
            torch.randn(rows, columns, device=DEVICE, dtype=torch.float16) * 0.02
            for _ in range(2 if name == "head" else BLOCKS)
        ]
        for name, (rows, columns, _) in MATRICES.items()
    }
    plain = Fp16()
    for tokens in options.tokens:
        measured(plain, fp16, tokens, copied, "fp16")


if __name__ == "__main__":
    main()
