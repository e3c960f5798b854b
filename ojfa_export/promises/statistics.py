"""What exits say and what the full model says, on sampled tokens of text windows; and its file."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.confidence import Measure
from ojfa_export.errors import BundleError
from ojfa_export.promises.measures import MEASURES
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.files import check_regular

SPLITS = ("tuning", "certification")
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_ARRAYS = {
    "domain": (np.dtype(np.int16), 1),
    "confidence": (np.dtype(np.float16), 4),
    "agrees": (np.dtype(np.bool_), 3),
    "extra_surprisal": (np.dtype(np.float16), 3),
}


@dataclass(frozen=True, eq=False)
class ExitStatistics:
    """W windows of text, m tokens sampled from each, E exits.

    Attributes:
        blocks: L, the depth of the full model.
        exits: [E] blocks run, increasing, all below L.
        domains: Names.
        domain: [W] int16, each window's domain.
        confidence: [3, W, m, E] float16 in the order of MEASURES, rounded down.
        agrees: [W, m, E] bool: the exit's token is the full model's first choice.
        extra_surprisal: [W, m, E] float16, rounded up: ln p_full(the full model's first choice) -
            ln p_full(the exit's token) in nats, 0 or more.
        run: So many tokens of a window, from its first on, are neighbours in the text, and so many
            after them; m is a multiple of it.
    """

    blocks: int
    exits: tuple[int, ...]
    domains: tuple[str, ...]
    domain: NDArray[np.int16]
    confidence: NDArray[np.float16]
    agrees: NDArray[np.bool_]
    extra_surprisal: NDArray[np.float16]
    run: int = 1

    def __post_init__(self) -> None:
        shape = self.agrees.shape
        if (
            len(shape) != 3
            or shape[2] != len(self.exits)
            or self.domain.shape != shape[:1]
            or self.confidence.shape != (len(MEASURES), *shape)
            or self.extra_surprisal.shape != shape
            or self.run < 1
            or shape[1] % self.run
        ):
            raise ValueError(f"statistics of {len(self.exits)} exits do not fit shape {shape}")

    @property
    def windows(self) -> int:
        """W."""
        return len(self.agrees)

    @property
    def tokens_per_window(self) -> int:
        """The tokens sampled from each window, m."""
        _, tokens, _ = self.agrees.shape
        return int(tokens)

    @property
    def tokens(self) -> int:
        """All that were sampled, W m."""
        return self.windows * self.tokens_per_window

    def of(self, measure: Measure) -> NDArray[np.float16]:
        """One measure of confidence, [W, m, E]."""
        values: NDArray[np.float16] = self.confidence[MEASURES.index(measure)]
        return values

    def neighbours(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """How often two tokens in a row are chosen, a share for each window.

        Args:
            chosen: [W, m].

        Returns:
            [W]: over the neighbours in the statistics' runs; where none are known, the square of
            the share that is chosen.
        """
        runs = chosen.reshape(len(chosen), -1, self.run)
        if self.run == 1:
            square: NDArray[np.float64] = chosen.mean(axis=1) ** 2
            return square
        both: NDArray[np.float64] = (runs[..., 1:] & runs[..., :-1]).mean(axis=(1, 2))
        return both

    def select(self, windows: NDArray[Any]) -> ExitStatistics:
        """Some windows, by number (with repetitions) or by a mask [W]."""
        return ExitStatistics(
            self.blocks,
            self.exits,
            self.domains,
            self.domain[windows],
            self.confidence[:, windows],
            self.agrees[windows],
            self.extra_surprisal[windows],
            self.run,
        )

    def at(self, exits: Sequence[int]) -> ExitStatistics:
        """Some of the exits, by blocks run.

        Raises:
            ValueError: The statistics lack one.
        """
        columns = [self.exits.index(depth) for depth in exits]
        return replace(
            self,
            exits=tuple(exits),
            confidence=self.confidence[..., columns],
            agrees=self.agrees[..., columns],
            extra_surprisal=self.extra_surprisal[..., columns],
        )

    def members(self) -> list[NDArray[np.intp]]:
        """The windows of each domain."""
        return [np.flatnonzero(self.domain == index) for index in range(len(self.domains))]


def join(parts: Sequence[ExitStatistics]) -> ExitStatistics:
    """The windows of several domains together.

    Args:
        parts: Of the same exits and of as many tokens from each window; no domain is in two.
    """
    first, offsets = parts[0], np.cumsum([0, *(len(each.domains) for each in parts)])
    domain = [each.domain + offset for each, offset in zip(parts, offsets, strict=False)]
    return ExitStatistics(
        first.blocks,
        first.exits,
        tuple(name for each in parts for name in each.domains),
        np.concatenate(domain).astype(np.int16),
        np.concatenate([each.confidence for each in parts], axis=1),
        np.concatenate([each.agrees for each in parts]),
        np.concatenate([each.extra_surprisal for each in parts]),
        math.gcd(*(each.run for each in parts)),
    )


def split_with(splits: Mapping[str, ExitStatistics], exits: Sequence[int]) -> ExitStatistics:
    """The split to judge exits on: certification's, which chose nothing, where it has them all.

    Else the tuning split, which has every exit.
    """
    certification = splits["certification"]
    return certification if set(exits) <= set(certification.exits) else splits["tuning"]


def save_statistics(path: Path, splits: Mapping[str, ExitStatistics]) -> None:
    """Writes the tuning and the certification split, whole or not at all.

    The same statistics give the same bytes.

    Raises:
        OSError: The folder is missing, full or not writable.
    """
    first = splits[SPLITS[0]]
    arrays: dict[str, Any] = {
        "blocks": np.array(first.blocks, np.int32),
        "exits": np.array(first.exits, np.int32),
        "domains": np.array(first.domains, np.str_),
        "run": np.array(first.run, np.int32),
    }
    for split in SPLITS:
        if splits[split].exits != first.exits:
            arrays[f"{split}_exits"] = np.array(splits[split].exits, np.int32)
        for name in _ARRAYS:
            arrays[f"{split}_{name}"] = getattr(splits[split], name)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def load_statistics(path: Path) -> dict[str, ExitStatistics]:
    """Reads both splits.

    Raises:
        BundleError: Missing, or damaged.
    """
    try:
        check_regular(path)
        with np.load(path, allow_pickle=False) as file:
            domains = tuple(str(name) for name in file["domains"])
            blocks = int(file["blocks"])
            run = int(file["run"]) if "run" in file.files else 1  # tokens far apart, once
            splits = {}
            for split in SPLITS:
                own = f"{split}_exits"  # where it has fewer than all
                exits = tuple(map(int, file[own if own in file.files else "exits"]))
                arrays = {name: file[f"{split}_{name}"] for name in _ARRAYS}
                for name, (dtype, axes) in _ARRAYS.items():
                    if arrays[name].dtype != dtype or arrays[name].ndim != axes:
                        raise ValueError(f"{split}_{name} is not {dtype} with {axes} axes")
                splits[split] = ExitStatistics(blocks, exits, domains, **arrays, run=run)
    except FileNotFoundError:
        raise BundleError(
            f"{path.parent} has no calibration statistics of its exits",
            hint="add them with 'ojfa-export build CHECKPOINT -o BUNDLE --overwrite' and more "
            "text (--calibration-data FILE): they come from what fitting leaves over",
        ) from None
    except _DAMAGE as error:
        raise BundleError(
            f"{path} is damaged: {error}", hint="copy the bundle again whole, or build it again"
        ) from error
    return splits
