"""Checkpoints in layouts of quantised weights, packed number by number as the layouts are defined.

Numbers, scales and zero points are random; beside each checkpoint a plain one is written that holds
in fp32 what they stand for, by the formula in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
# Of the eight outputs of a word of AWQ, which is at which place.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix.

    Attributes:
        numbers: [outputs, inputs], from 0 on.
        points: Zero points [outputs, groups].
        scales: [outputs, groups].
        group_of: [inputs].
    """

    bits: int
    numbers: Array
    points: Array
    scales: Array
    group_of: Array

    def weights(self) -> Array:
        """[outputs, inputs] float32, one weight at a time."""
        outputs, inputs = self.numbers.shape
        result = np.empty((outputs, inputs), np.float32)
        for out in range(outputs):
            for at in range(inputs):
                group = self.group_of[at]
                number = int(self.numbers[out, at]) - int(self.points[out, group])
                result[out, at] = number * float(self.scales[out, group])
        return result


def random_matrix(
    rng: np.random.Generator, outputs: int, inputs: int, bits: int, group_size: int,
    *, symmetric: bool = False, act_order: bool = False,
) -> Matrix:  # fmt: skip
    """A matrix whose weights are about 0.125 each; -1 makes one group of all inputs."""
    groups = 1 if group_size == -1 else inputs // group_size
    middle, most = 1 << bits - 1, (1 << bits) - 1
    points = np.full((outputs, groups), middle)
    if not symmetric:
        points = rng.integers(0, most + 1, size=points.shape)
    scales = rng.uniform(0.5, 1, points.shape) * 0.4 / most
    group_of = np.arange(inputs) // (inputs // groups)
    return Matrix(
        bits=bits,
        numbers=rng.integers(0, most + 1, size=(outputs, inputs)),
        points=points,
        scales=scales.astype(np.float16),
        group_of=rng.permutation(group_of) if act_order else group_of,
    )


def pack_words(numbers: list[int], bits: int) -> list[int]:
    """Numbers, which may be below 0, summed up at their places, as 32-bit words with a sign."""
    count = -(-len(numbers) * bits // 32)
    total = sum(number << bits * place for place, number in enumerate(numbers))
    words = [(total >> 32 * index) & 0xFFFFFFFF for index in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, np.int64).astype(np.int32))


def gptq_tensors(matrix: Matrix, *, first_format: bool = True) -> dict[str, torch.Tensor]:
    """GPTQ's tensors; in the first format zero points less one."""
    columns = [pack_words(column.tolist(), matrix.bits) for column in matrix.numbers]
    points = (matrix.points - first_format).T.tolist()
    if matrix.bits == 3:
        rows = [pack_words([point % 8 for point in row], 3) for row in points]
    elif first_format:  # word by word: what one borrows ends with it
        of_word = 32 // matrix.bits
        rows = [
            [
                word
                for at in range(0, len(row), of_word)
                for word in pack_words(row[at : at + of_word], matrix.bits)
            ]
            for row in points
        ]
    else:
        rows = [pack_words(row, matrix.bits) for row in points]
    return {
        "qweight": int32(columns).T.contiguous(),
        "qzeros": int32(rows),
        "scales": torch.from_numpy(matrix.scales.T.copy()),
        "g_idx": torch.from_numpy(matrix.group_of.astype(np.int32)),
    }


def awq_tensors(matrix: Matrix) -> dict[str, torch.Tensor]:
    """AWQ's tensors."""

    def packed(rows: Array) -> torch.Tensor:
        return int32(
            [
                [
                    word
                    for at in range(0, len(row), 8)
                    for word in pack_words([int(row[at + place]) for place in AWQ_ORDER], 4)
                ]
                for row in rows
            ]
        )

    return {
        "qweight": packed(matrix.numbers.T),
        "qzeros": packed(matrix.points.T),
        "scales": torch.from_numpy(matrix.scales.T.copy()),
    }


def packed_tensors(matrix: Matrix, *, with_points: bool, packed_points: bool = True) -> Any:
    """compressed-tensors' pack-quantized."""
    middle = 1 << matrix.bits - 1
    tensors = {
        "weight_packed": int32([pack_words(row.tolist(), matrix.bits) for row in matrix.numbers]),
        "weight_scale": torch.from_numpy(matrix.scales.copy()),
        "weight_shape": torch.tensor(matrix.numbers.shape),
    }
    if with_points and packed_points:
        columns = [pack_words(column.tolist(), matrix.bits) for column in matrix.points.T]
        tensors["weight_zero_point"] = int32(columns).T.contiguous()
    elif with_points:
        tensors["weight_zero_point"] = torch.from_numpy((matrix.points - middle).astype(np.int8))
    return tensors


def int8_tensors(matrix: Matrix, *, with_points: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors' int-quantized."""
    middle = 1 << matrix.bits - 1
    tensors = {
        "weight": torch.from_numpy((matrix.numbers - middle).astype(np.int8)),
        "weight_scale": torch.from_numpy(matrix.scales.copy()),
    }
    if with_points:
        tensors["weight_zero_point"] = torch.from_numpy((matrix.points - middle).astype(np.int8))
    return tensors


def float8(rng: np.random.Generator, outputs: int, inputs: int) -> Array:
    """Random numbers of 8 bits, [outputs, inputs] float8_e4m3fn."""
    return rng.normal(size=(outputs, inputs)).astype(ml_dtypes.float8_e4m3fn)


def float8_tensor(numbers: Array) -> torch.Tensor:
    return torch.from_numpy(numbers.view(np.uint8)).view(torch.float8_e4m3fn)


def scaled_weights(numbers: Array, scales: Array, block: tuple[int, int]) -> Array:
    """[outputs, inputs] float32, one weight at a time; each is rounded once."""
    result = np.empty(numbers.shape, np.float32)
    for out in range(len(numbers)):
        for at in range(numbers.shape[1]):
            scale = float(scales[out // block[0], at // block[1]])
            result[out, at] = float(numbers[out, at]) * scale
    return result


# Gives the tensors of a layer of [outputs, inputs], and its weights; None leaves it as it is.
Layer = Callable[[str, int, int], tuple[Mapping[str, torch.Tensor], Array] | None]


def write_checkpoint(
    name: str, directory: Path, layer: Layer, config: Mapping[str, Any], *, seed: int = 3
) -> Path:
    """Writes directory/quantised, and directory/plain, which holds what it stands for.

    Args:
        name: The model, of `tiny_models`.
        directory: Where to.
        layer: Makes each layer.
        config: The quantization_config.
        seed: Of what isn't quantised.

    Returns:
        directory/quantised.
    """
    plain = make_checkpoint(name, directory / "plain", seed=seed)
    quantised = Path(shutil.copytree(plain, directory / "quantised"))
    tensors, stored = load_file(plain / "model.safetensors"), {}
    is_conv1d = name.startswith("gpt2")
    for key, value in tensors.items():
        stored[key] = value
        outside = ("embed", "wte", "wpe", "lm_head", "norm", "ln_")
        if value.ndim != 2 or any(each in key for each in outside):
            continue
        shape = value.shape[::-1] if is_conv1d else value.shape
        made = layer(key.removesuffix(".weight"), *shape)
        if made is None:
            continue
        parts, weights = made
        del stored[key]
        stored |= {f"{key.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
        as_stored = weights.T if is_conv1d else weights
        tensors[key] = torch.from_numpy(np.ascontiguousarray(as_stored))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    fields = json.loads((quantised / "config.json").read_text())
    fields["quantization_config"] = dict(config)
    (quantised / "config.json").write_text(json.dumps(fields))
    return quantised


def gptq_layer(rng: np.random.Generator, bits: int, group_size: int, **how: Any) -> Layer:
    """Layers of one GPTQ format; act-order is one permutation for all that have as many inputs."""
    act_order, first_format = how.pop("act_order", False), how.pop("first_format", True)
    orders: dict[int, Array] = {}

    def make(_name: str, outputs: int, inputs: int) -> Any:
        matrix = random_matrix(rng, outputs, inputs, bits, group_size, **how)
        if act_order:
            group_of = orders.setdefault(inputs, rng.permutation(matrix.group_of))
            matrix = Matrix(bits, matrix.numbers, matrix.points, matrix.scales, group_of)
        return gptq_tensors(matrix, first_format=first_format), matrix.weights()

    return make


def awq_layer(rng: np.random.Generator, group_size: int) -> Layer:
    """Layers of AWQ."""

    def make(_name: str, outputs: int, inputs: int) -> Any:
        matrix = random_matrix(rng, outputs, inputs, 4, group_size)
        return awq_tensors(matrix), matrix.weights()

    return make


def gptq_config(bits: int, group_size: int, **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False,
        "sym": False, "damp_percent": 0.01, "true_sequential": True, **fields,
    }  # fmt: skip


def awq_config(group_size: int, **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None, **fields,
    }  # fmt: skip


def compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights},
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def make_q4_1(directory: Path, group_size: int, seed: int) -> Path:
    """A random Llama in fp32 whose matrices, but for its head, were of Q4_1 once."""
    make_checkpoint("llama-gqa", directory, seed=seed)
    [file] = directory.glob("*.safetensors")
    tensors = load_file(file)
    for name, weights in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = torch.from_numpy(q4_1(weights.numpy(), group_size))
    save_file(tensors, file)
    return directory


def q4_1(weights: Array, group_size: int) -> Array:
    """Rounds rows [outputs, inputs] as GGUF's Q4_1 does: w = d q + m, d and m in fp16."""
    groups = weights.reshape(len(weights), -1, group_size).astype(np.float64)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    step = ((high - low) / 15).astype(np.float16).astype(np.float64)
    least = low.astype(np.float16).astype(np.float64)
    numbers = np.clip(np.floor((groups - low) / ((high - low) / 15) + 0.5), 0, 15)
    return (step * numbers + least).reshape(weights.shape).astype(np.float32)


def float_rows(rng: np.random.Generator) -> tuple[Layer, dict[str, Any]]:
    """Eight-bit floats, a scale for each output."""

    def layer(_name: str, outputs: int, inputs: int) -> Any:
        numbers = float8(rng, outputs, inputs)
        scales = rng.uniform(0.06, 0.12, (outputs, 1)).astype(np.float32)
        tensors = {"weight": float8_tensor(numbers), "weight_scale": torch.from_numpy(scales)}
        return tensors, scaled_weights(numbers, scales, (1, inputs))

    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    return layer, compressed_config("float-quantized", **weights)
