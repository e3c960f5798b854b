"""Ways of quantising a checkpoint's weights: error, and perplexity in transformers, fp32 products.

python -m bench.quality.quantisers calibration/demo/checkpoint --windows 16

k-quant is onnxruntime.quantization's. Blocks alone are quantised; with --head, the head as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.bundle.weight_format import Quantised, WeightFormat, dequantise
from ojfa_export.models.calibration_text import read_text, shipped_text
from ojfa_export.models.float8 import LARGEST

Array = NDArray[np.float32]
LENGTH = 256


def main() -> None:
    """Quantises in every way, and prints what each costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--head", action="store_true")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    text = "\n".join(read_text(sorted(shipped_text())[0]).documents)
    ids = tokenizer.encode(text[: 40 * LENGTH * arguments.windows]).ids
    rows = torch.tensor(ids[: LENGTH * arguments.windows]).view(-1, LENGTH)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print(f"fp32: perplexity {perplexity(model, rows):.3f}", flush=True)
    for name, way in ways().items():
        error = apply(model, original, way, head=arguments.head)
        print(f"{name}: error {error:.4f}, perplexity {perplexity(model, rows):.3f}", flush=True)


def ways() -> dict[str, Callable[[Array], Array]]:
    """What each makes of a matrix [outputs, inputs]."""
    found: dict[str, Callable[[Array], Array]] = {}
    storages: tuple[Quantised, ...] = ("int4", "int8")
    for storage in storages:
        for size in (16, 32, 64):
            found[f"{storage}, nearest, groups of {size}"] = nearest(storage, size, True)
        found[f"{storage}, nearest, symmetric"] = nearest(storage, 32, False)
        found[f"{storage}, k-quant"] = k_quant(int(storage[3:]))
    found |= {f"fp8, groups of {size}": floats(size) for size in (32, 64)}
    found["fp8, whole rows"] = floats(None)
    return found


def nearest(storage: Quantised, size: int, zero_points: bool) -> Callable[[Array], Array]:
    """What builds do."""
    form = WeightFormat(storage=storage, group_size=size, zero_points=zero_points)
    return lambda weight: dequantise(quantise(np.ascontiguousarray(weight.T), form), form)


def k_quant(bits: int) -> Callable[[Array], Array]:
    """The library's k-quant, in groups of 32."""

    def way(weight: Array) -> Array:
        numbers, scales, zero_points = quant_tensor_k_quant_cpu(weight, bits, 32)
        result: Array = ((numbers - zero_points) * scales).reshape(weight.shape)
        return result.astype(np.float32)

    return way


def floats(size: int | None) -> Callable[[Array], Array]:
    """The nearest 8-bit floats, of groups or, without a size, of whole rows."""

    def way(weight: Array) -> Array:
        groups = weight.reshape(len(weight), -1, size or weight.shape[1])
        scales = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(LARGEST)
        numbers = np.clip(groups / scales, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
        result: Array = (numbers.astype(np.float32) * scales).reshape(weight.shape)
        return result

    return way


def apply(model: Any, original: dict[str, Any], way: Callable[[Array], Array], head: bool) -> float:
    """Quantises a model's matrices; their error, root mean square, relative."""
    off = size = 0.0
    changed = dict(original)
    for name, weight in original.items():
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            changed[name] = torch.from_numpy(way(weight.numpy()))
            off += float(((changed[name] - weight) ** 2).sum())
            size += float((weight**2).sum())
    model.load_state_dict(changed)
    if head:
        weight = original["lm_head.weight"].numpy()
        model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(way(weight)))
    return float(np.sqrt(off / size))


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of windows [n, tokens]."""
    total = 0.0
    with torch.inference_mode():
        for row in rows:
            logits = model(row[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(np.exp(total / (len(rows) * (LENGTH - 1))))


if __name__ == "__main__":
    main()
