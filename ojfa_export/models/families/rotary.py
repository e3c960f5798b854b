"""Rotary position embeddings: inverse frequencies and the tables made of them.

Formulas follow transformers (modeling_rope_utils), which follows: RoPE, arXiv 2104.09864; linear
scaling, arXiv 2306.15595; LongRoPE, arXiv 2402.13753; Llama 3.1's scaling as in its release.
Everything is computed in float32 as there, since the angles of far positions depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import COMPLETE, Config

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Attributes:
        dim: Leading features of each head that rotate, even.
        kind: "default", "linear", "dynamic", "llama3" or "longrope". Dynamic scaling is the default
            up to the trained length, and no bundle goes beyond (`compiler.settings`).
        theta: Base of the frequencies.
        trained_length: Positions that the model was trained on.
        parameters: The scaling's own parameters.
        switch_length: Above this sequence length LongRoPE uses its long factors.
        second: That of the blocks that rotate otherwise (`ModelSpec.rotated_second`).
    """

    dim: int
    kind: str
    theta: float
    trained_length: int
    parameters: dict[str, Any]
    switch_length: int | None = None
    second: Rotary | None = None

    def tables(self, length: int) -> tuple[Float32, Float32]:
        """Cosines and sines for each position.

        Where there are two sets of factors, the second set's rows follow the first's.

        Args:
            length: Positions 0 .. length-1.

        Returns:
            Two arrays [length or 2*length, dim/2] float32, scaled by the attention factor.
        """
        if self.second is not None:
            first, second = replace(self, second=None).tables(length), self.second.tables(length)
            return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
        positions = np.arange(length, dtype=np.float32)[:, None]
        if self.kind == "longrope":
            angles = np.concatenate([positions * self._longrope(which) for which in FACTOR_LISTS])
        else:
            angles = positions * self._static()
        factor = np.float32(self._attention_factor())
        return np.cos(angles) * factor, np.sin(angles) * factor

    def angles_at(self, position: int) -> Float32:
        """Every angle of one position, times the attention factor."""
        if self.kind == "longrope":
            frequencies = np.concatenate([self._longrope(which) for which in FACTOR_LISTS])
        else:
            frequencies = self._static()
        return frequencies * np.float32(position) * np.float32(self._attention_factor())

    def _exponents(self) -> Float32:
        return np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)

    def _static(self) -> Float32:
        frequencies = np.float32(1) / np.float32(self.theta) ** self._exponents()
        if self.kind == "linear":
            return frequencies / np.float32(self.parameters["factor"])
        if self.kind == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def _llama3(self, frequencies: Float32) -> Float32:
        """Low frequencies are stretched, high ones kept, those between interpolated."""
        factor = self.parameters["factor"]
        low, high = self.parameters["low_freq_factor"], self.parameters["high_freq_factor"]
        original = self.parameters["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        smooth = (original / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / factor + smooth * frequencies
        stretched = np.where(wavelengths > original / low, frequencies / factor, frequencies)
        is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
        return np.where(is_between, between, stretched).astype(np.float32)

    def _longrope(self, which: str) -> Float32:
        factors = np.asarray(self.parameters[which], np.float32)
        stretched = factors * np.float32(self.theta) ** self._exponents()
        return (np.float32(1) / stretched).astype(np.float32)

    def _attention_factor(self) -> float:
        if self.kind != "longrope":
            return 1.0
        if (given := self.parameters.get("attention_factor")) is not None:
            return float(given)
        original = self.parameters["original_max_position_embeddings"]
        factor = self.parameters.get("factor") or self.trained_length / original
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


# What float32 holds, in which everything is computed.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# No cache holds more positions.
LAST_POSITION = 2**31 - 1
# Where a config names none, as in most families of transformers.
THETA = 10_000.0
FACTOR_LISTS = ("short_factor", "long_factor")
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


def read_rotary(
    config: Config,
    head_dim: int,
    kinds: tuple[str, ...],
    *,
    partial: float = 1.0,
    theta: float = THETA,
) -> Rotary:
    """Reads a config's rotary embedding, in transformers 4's or 5's spelling.

    Args:
        config: The config.
        head_dim: Features of one head.
        kinds: Scalings that the family's own implementation has.
        partial: The share of a head that rotates, where the config names none.
        theta: Base of the frequencies, the same.

    Raises:
        CheckpointError: For another scaling, or one whose parameters are incomplete.
    """
    parameters: dict[str, Any] = {}
    if config.get("rope_scaling") and config.get("rope_parameters"):
        raise CheckpointError(
            f"{config.source}: both 'rope_scaling' and 'rope_parameters' are given",
            hint="keep the one that the model was trained with",
        )
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name, {})
        if not isinstance(given, dict):
            raise config.wrong(name, "an object", given)
        parameters |= {key: value for key, value in given.items() if value is not None}
    kind = str(parameters.pop("rope_type", parameters.pop("type", "default")))
    parameters.pop("type", None)
    base = parameters.pop("rope_theta", config.get("rope_theta", theta))
    partial = parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor", partial))
    trained = config.integer("max_position_embeddings", 2048)
    original = config.get("original_max_position_embeddings")
    if original is not None:  # transformers lets it override the one among the parameters
        parameters["original_max_position_embeddings"] = original
    if kind in ("llama3", "longrope"):
        parameters.setdefault("original_max_position_embeddings", trained)
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in kinds:
        raise CheckpointError(
            f"{config.source}: rotary scaling {kind!r:.60} is not supported for this family",
            hint=f"supported: {', '.join(kinds)}",
        )
    _check_numbers(config, {"rope_theta": base, "partial_rotary_factor": partial, **parameters})
    dim = int(head_dim * partial)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise CheckpointError(
            f"{config.source}: {dim} of the {head_dim} features of a head can't rotate in pairs",
            hint=COMPLETE,
        )
    _check_parameters(config, kind, parameters, dim)
    switch = parameters["original_max_position_embeddings"] if kind == "longrope" else None
    rotary = Rotary(dim, kind, float(base), trained, parameters, switch)
    _check_angles(config, rotary)
    return rotary


def _check_numbers(config: Config, parameters: dict[str, Any]) -> None:
    """Every parameter must be a positive number in float32, or where it belongs a list of them."""
    for name, value in parameters.items():
        if name in FACTOR_LISTS and isinstance(value, list):
            numbers, what = value, "positive numbers"
        else:
            numbers, what = [value], "a positive number"
        kinds: tuple[type, ...] = (int, float)
        if name == "original_max_position_embeddings":
            kinds, what = (int,), "a positive integer"
        for number in numbers:
            if type(number) not in kinds or not SMALLEST <= number <= LARGEST:
                raise CheckpointError(
                    f"{config.source}: rotary parameter '{name}' must be {what}, "
                    f"not {number!r:.60}",
                    hint=COMPLETE,
                )


def _check_parameters(config: Config, kind: str, parameters: dict[str, Any], dim: int) -> None:
    missing = [name for name in NEEDED[kind] if parameters.get(name) is None]
    known = {*NEEDED[kind], "attention_factor", "factor", "original_max_position_embeddings"}
    unknown = sorted(set(parameters) - known)
    if missing or unknown:
        what = (
            f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown):.500}"
        )
        raise CheckpointError(f"{config.source}: rotary scaling '{kind}' {what}", hint=COMPLETE)
    for name in FACTOR_LISTS:
        given = parameters.get(name)
        if kind == "longrope" and not (isinstance(given, list) and len(given) == dim // 2):
            raise CheckpointError(
                f"{config.source}: rotary '{name}' must be a list of {dim // 2} numbers",
                hint=COMPLETE,
            )


def _check_angles(config: Config, rotary: Rotary) -> None:
    """Parameters that are numbers each may still give none together."""
    try:
        with np.errstate(all="ignore"):
            found = np.stack([rotary.angles_at(position) for position in (0, LAST_POSITION)])
    except ArithmeticError:
        found = np.full(1, np.nan, np.float32)
    if not np.isfinite(found).all():
        raise CheckpointError(
            f"{config.source}: rotary scaling '{rotary.kind}' gives angles that are no numbers",
            hint="check its parameters, such as rope_theta",
        )
