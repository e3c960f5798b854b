"""How far results may be from the reference, and the record of how far they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.narrow_cache import has_fp8_cache
from ojfa_export.bundle.block_shortcut import BlocksOnSequences
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import RowShortcut
from ojfa_export.models.head import FinalNorm
from ojfa_export.models.precision import Precision
from ojfa_export.runtime.model import Model
from ojfa_export.verify.check import Check

# What matrix products are computed in: a precision, or where weights are quantised, with what they
# multiply rounded to 8 bits in groups; and that with keys and values kept in fp8.
Arithmetic = Literal[Precision, "int8", "fp16, fp8 cache", "bf16, fp8 cache"]
OF_FP16: tuple[Arithmetic, ...] = ("fp16", "fp16, fp8 cache")
Quantity = Literal["hidden", "logits", "draft"]
FP16_LARGEST = 65504.0
# Begins the names of checks of what fp16 holds.
RANGE = "fp16 range "
# Begins those of what `AutoTokenizer` gives.
TOKENIZER = "tokenizer: "


def arithmetic_of(precision: Precision, *, quantised: bool, fp8_cache: bool = False) -> Arithmetic:
    """What a bundle's products are computed in.

    Beside fp32, quantised weights are for the CPU, whose products round to 8 bits.
    """
    if fp8_cache:
        return "bf16, fp8 cache" if precision == "bf16" else "fp16, fp8 cache"
    return "int8" if quantised and precision == "fp32" else precision


def arithmetic_of_model(model: Model) -> Arithmetic:
    """What an opened bundle's products are computed in, by the engines that it runs."""
    manifest = model.manifest
    return arithmetic_of(
        manifest.precision,
        quantised=manifest.weights is not None,
        fp8_cache=has_fp8_cache(model.engines),
    )


@dataclass(frozen=True)
class Tolerance:
    """A bound on the largest absolute difference.

    Attributes:
        absolute: Allowed whatever the reference's size.
        relative: Allowed as a share of the reference's largest absolute value.
    """

    absolute: float
    relative: float

    def bound(self, largest: float) -> float:
        """The larger of the two, for a reference with this largest absolute value."""
        return max(self.absolute, self.relative * largest)


TOLERANCES: Mapping[Arithmetic, Mapping[Quantity, Tolerance]] = {
    "fp32": {
        # One block on the same input: the same sums in another order, a few hundred fp32 roundings
        # (6e-8 each) of values up to the largest. Measured: up to 1.3e-6 of it.
        "hidden": Tolerance(0, 1e-5),
        # The promise is 1e-4. Logits beyond 20 may differ by 80 fp32 roundings of the largest,
        # since all blocks' roundings add up; measured: up to 1.6e-6 of it.
        "logits": Tolerance(1e-4, 5e-6),
        # A product, a block and a head, up to four times in a row. Measured: up to 8e-7.
        "draft": Tolerance(0, 1e-5),
    },
    "fp16": {
        # Weights, inputs of matrix products, keys and values rounded to 11 bits (5e-4 each);
        # errors of a sum grow like the root of its length. Measured: up to 1.5e-3 of the largest.
        "hidden": Tolerance(0, 5e-3),
        # The same through every block and the head. Measured: up to 2.8e-3 of the
        # largest; more blocks add up to more.
        "logits": Tolerance(0, 2e-2),
        # A product, a block and a head, up to four times in a row. Measured: up to 8e-4.
        "draft": Tolerance(0, 1e-2),
    },
    "bf16": {
        # As in fp16, rounded to 8 bits (4e-3 each): eight times as far. Of range nothing is lost.
        "hidden": Tolerance(0, 4e-2),
        "logits": Tolerance(0, 1.5e-1),
        "draft": Tolerance(0, 8e-2),
    },
    # Keys and values rounded to 4 bits, as the reference's are; but one near the middle of two
    # numbers may go to the other here, by an eighth of it, and where few keys are seen that is what
    # comes out.
    "fp16, fp8 cache": {
        "hidden": Tolerance(0, 1.3e-1),
        "logits": Tolerance(0, 1.5e-1),
        "draft": Tolerance(0, 1.3e-1),
    },
    "bf16, fp8 cache": {
        "hidden": Tolerance(0, 1.3e-1),
        "logits": Tolerance(0, 2e-1),
        "draft": Tolerance(0, 1.3e-1),
    },
    "int8": {
        # What a product multiplies is rounded to 8 bits in groups of as many as the weights have:
        # by up to 1/254 of the largest of its group, a fifth of a percent of it in the root mean
        # square. With nothing rounded (accuracy level 1) the same engines are within 6e-7 of the
        # largest. Measured: up to 2.3e-2 of it of random weights, 1.2e-2 of trained models'.
        "hidden": Tolerance(0, 5e-2),
        # The same through every block and the head. Measured: up to 5.4e-2 of the largest of random
        # weights; 6e-3 after the demo's 12 blocks, 7e-2 after SmolLM2's 30, of whose hidden states
        # a few are a thousand times the others.
        "logits": Tolerance(0, 1.5e-1),
    },
}


# What one block adds to the rounding of hidden states, root mean square, as a share of their own;
# independent errors of several blocks add up as the root of their number. Measured over four
# blocks: 4e-6 and 2.8e-3 at most; of products that round to 8 bits 2.6e-2.
BLOCK_ROUNDING: Mapping[Arithmetic, float] = {
    "fp32": 2.5e-6,
    "fp16": 2e-3,
    "bf16": 1.6e-2,
    "int8": 2.5e-2,
    "fp16, fp8 cache": 2.5e-2,
    "bf16, fp8 cache": 3e-2,
}


# Random errors that an MLP shortcut is tried with: enough to know their size within some percent.
TRIALS = 8


def exit_allowance(
    shortcut: RowShortcut | BlocksOnSequences,
    norm: FinalNorm,
    hidden: NDArray[np.float64],
    logits: NDArray[np.float64],
    arithmetic: Arithmetic,
    blocks_run: int,
) -> NDArray[np.float64]:
    """What rounding of hidden states does to exit logits, however the exit head is computed.

    A jump keeps few directions of a hidden state h. Where its output y is small, the norm after
    it enlarges the rounding that y inherits from h: with independent errors of deviation e in
    the features of h, y = (h s + t) D U is off by e ||diag(s) D U|| (Frobenius) in the root mean
    square, and the logits of norm(y) by that share of ||y||. For a residual jump with gate g the
    map is 1 + g diag(s) D U. What an MLP or a block makes of such errors is tried with random
    ones, and its own products round like those of one block more.

    Args:
        shortcut: The jump; a block jump as a map of the sequences that `hidden` has.
        norm: The final norm; LayerNorm takes the mean from y.
        hidden: [n,H].
        logits: [n,V] of norm(y).
        arithmetic: Of the blocks.
        blocks_run: How many made the hidden states.

    Returns:
        [n] absolute differences of logits.
    """
    error = BLOCK_ROUNDING[arithmetic] * np.sqrt(blocks_run * np.mean(hidden**2, axis=1))
    y = _seen(norm, shortcut.apply(hidden, blocks_run))
    if not isinstance(shortcut, Shortcut):
        tried = _tried(shortcut, norm, hidden, error, blocks_run)
        own = BLOCK_ROUNDING[arithmetic] * np.linalg.norm(y - _seen(norm, hidden), axis=1)
        moved = np.hypot(tried, own)
    else:
        moved = error * _gain(shortcut, norm, blocks_run)
    share = moved / np.linalg.norm(y, axis=1)
    allowed: NDArray[np.float64] = share * np.abs(logits).max(axis=1)
    return allowed


def _seen(norm: FinalNorm, y: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a norm sees: without the mean, where it takes that off."""
    return y - y.mean(axis=-1, keepdims=True) if norm.kind == "layer" else y


def _tried(
    shortcut: MlpShortcut | BlocksOnSequences,
    norm: FinalNorm,
    hidden: NDArray[np.float64],
    error: NDArray[np.float64],
    blocks_run: int,
) -> NDArray[np.float64]:
    """How far random errors of this deviation [n] in the features move y: [n], root mean square."""
    rng, y = np.random.default_rng(0), shortcut.apply(hidden, blocks_run)
    squares = np.zeros(len(hidden))
    for _ in range(TRIALS):
        noise = error[:, None] * rng.normal(size=hidden.shape)
        moved = _seen(norm, shortcut.apply(hidden + noise, blocks_run) - y)
        squares += np.sum(moved**2, axis=1) / TRIALS
    result: NDArray[np.float64] = np.sqrt(squares)
    return result


def _gain(shortcut: Shortcut, norm: FinalNorm, blocks_run: int) -> float:
    """Of a low-rank jump: the norm of y's error over the deviation of the features'."""
    scaled = shortcut.scale.astype(np.float64)[:, None] * shortcut.down
    up = _seen(norm, shortcut.up.astype(np.float64))
    squared_gain = np.sum((scaled.T @ scaled) * (up @ up.T))
    if shortcut.residual:
        gate = float(shortcut.gate(blocks_run))
        # The square of the norm of 1 + g P; a norm that takes the mean leaves H - 1 of 1's.
        ones = len(scaled) - (norm.kind == "layer")
        squared_gain = ones + 2 * gate * np.sum(scaled * up.T) + gate**2 * squared_gain
    return float(np.sqrt(squared_gain))


@dataclass(frozen=True)
class _Distance:
    difference: float
    bound: float

    @property
    def ratio(self) -> float:
        return self.difference / max(self.bound, np.finfo(np.float64).tiny)


class Comparisons:
    """The difference that uses most of its tolerance, under each name; NaN counts as infinite.

    Args:
        arithmetic: Of what is compared; decides the tolerances.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self._distances: dict[str, _Distance] = {}

    def record(
        self,
        name: str,
        quantity: Quantity,
        actual: NDArray[Any],
        expected: NDArray[Any],
        allowance: NDArray[np.float64] | None = None,
    ) -> None:
        """Adds a comparison to those of that name.

        Args:
            name: Of the check.
            quantity: Decides the tolerance.
            actual: [rows, ...].
            expected: [rows, ...].
            allowance: [rows] absolute difference allowed in any case, or None.
        """
        if actual.shape != expected.shape:
            raise ValueError(f"{name}: shape {actual.shape}, expected {expected.shape}")
        differences = np.abs(actual - expected).reshape(len(expected), -1).max(axis=1)
        largest = float(np.max(np.abs(expected), initial=0, where=np.isfinite(expected)))
        bound = TOLERANCES[self.arithmetic][quantity].bound(largest)
        if np.isfinite(differences).all():
            bounds = np.maximum(bound, 0 if allowance is None else allowance)
            bounds = np.broadcast_to(bounds, differences.shape)
            found = [_Distance(*map(float, each)) for each in zip(differences, bounds, strict=True)]
        else:
            found = [_Distance(np.inf, bound)]
        if name in self._distances:
            found.append(self._distances[name])
        self._distances[name] = max(found, key=lambda distance: distance.ratio)

    def checks(self) -> list[Check]:
        """One check for each name, in the order in which they first came."""
        return [
            Check(
                name=name,
                max_abs_diff=distance.difference,
                tolerance=distance.bound,
                passed=distance.difference <= distance.bound,
            )
            for name, distance in self._distances.items()
        ]
