"""Matrices that a checkpoint has quantised, as a bundle stores them: exactly what they are.

Of the checkpoint's numbers one format is made that holds all of them: as many bits as its widest
need, groups that divide all of its groups, zero points if a group has one besides the middle. A
checkpoint of 8-bit floats alone keeps them where they can run, each of its groups with the scale of
its block. What that leaves out (8-bit floats elsewhere, groups of no even size, queries, keys and
values that are grouped differently) is stored as the fp32 weights that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.names import block_name
from ojfa_export.bundle.weight_format import (
    BLOCK_MATRICES,
    GROUP_SIZES,
    QuantisedMatrix,
    WeightFormat,
    pack,
)
from ojfa_export.errors import CheckpointError
from ojfa_export.graphs.weights import NUMPY_DTYPES
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.quantised.kept import Kept, Scaled
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.precision import Precision


class KeptWeights:
    """The quantised matrices of a checkpoint.

    Args:
        checkpoint: Of which they are.
        form: What a bundle stores them as.
    """

    def __init__(self, checkpoint: Checkpoint, form: WeightFormat) -> None:
        self.form, self._checkpoint = form, checkpoint

    def matrix(self, graph: str, name: str, source: Source) -> QuantisedMatrix | None:
        """A matrix; None where it is stored as precision says.

        Args:
            graph: The graph that it is of.
            name: Its name there.
            source: Where it comes from.
        """
        if not self.form.stores(graph, name):
            return None
        kept = self._checkpoint.kept(source)
        assert kept is not None
        return _in_form(kept, self.form)


def kept_weights(checkpoint: Checkpoint, float_groups: Sequence[int] = ()) -> KeptWeights | None:
    """The matrices that a checkpoint has quantised and a bundle can hold; None without any.

    Reads all scales and zero points.

    Args:
        checkpoint: What may have quantised matrices.
        float_groups: Of 8-bit floats that are to be kept; without any they aren't.

    Raises:
        CheckpointError: One is missing, of another shape, or has NaN.
    """
    if checkpoint.layout is None:
        return None
    matrices = [(f"{graph}/{name}", source) for graph, name, source in matrices_of(checkpoint)]
    form = _whole_form(checkpoint, matrices) or _float_form(checkpoint, matrices, float_groups)
    return None if form is None else KeptWeights(checkpoint, form)


def _whole_form(
    checkpoint: Checkpoint, matrices: Sequence[tuple[str, Source]]
) -> WeightFormat | None:
    """What holds a checkpoint's whole numbers; None where it has none."""
    wide: list[str] = []
    sizes: set[int] = set()
    bits, has_points = 4, False
    for name, source in matrices:
        kept = checkpoint.kept(source)
        size = _group_size(kept.group_size) if isinstance(kept, Kept) else None
        if not isinstance(kept, Kept) or size is None:
            wide.append(name)
            continue
        sizes.add(size)
        bits = max(bits, 4 if kept.bits <= 4 else 8)
        has_points |= bool((kept.zero_points != 1 << kept.bits - 1).any())
    if not sizes:
        return None
    return WeightFormat(
        storage="int4" if bits == 4 else "int8",
        group_size=min(sizes),
        zero_points=has_points,
        wide=tuple(wide),
    )


def _float_form(
    checkpoint: Checkpoint, matrices: Sequence[tuple[str, Source]], groups: Sequence[int]
) -> WeightFormat | None:
    """What holds a checkpoint's 8-bit floats; None where it has none, or none that may be kept."""
    sizes: dict[str, int] = {}
    for name, source in matrices:
        kept = checkpoint.kept(source)
        if not isinstance(kept, Scaled):
            continue
        together = math.gcd(kept.block[1], kept.shape[1])  # the last block may be cut off
        if fitting := [size for size in groups if together % size == 0]:
            sizes[name] = max(fitting)
    if not sizes:
        return None
    wide = tuple(name for name, _ in matrices if name not in sizes)
    return WeightFormat(storage="fp8", group_size=min(sizes.values()), wide=wide)


def matrices_of(checkpoint: Checkpoint) -> Iterator[tuple[str, str, Source]]:
    """The matrices that can be quantised: graph, name there, and where each comes from."""
    family, config, spec = checkpoint.family, checkpoint.config, checkpoint.spec
    for index in range(spec.blocks):
        sources = family.block(config, spec, index)
        for name in BLOCK_MATRICES:
            yield block_name(index), name, sources[name]
    ends = family.ends(config, spec)
    yield "final_head", "head", ends["token_embedding" if spec.tied_head else "head"]


def _group_size(size: int | None) -> int | None:
    """The largest group of a bundle that divides a group."""
    fitting = [each for each in GROUP_SIZES if size is not None and size % each == 0]
    return max(fitting, default=None)


def _in_form(kept: Kept | Scaled, form: WeightFormat) -> QuantisedMatrix:
    if isinstance(kept, Scaled):
        codes = np.ascontiguousarray(kept.numbers()).view(np.uint8)
        scales = kept.scales_of(form.group_size)
        return QuantisedMatrix(codes.reshape(*scales.shape, -1), scales, None)
    ready = kept.widened(form.bits).in_order().split(form.group_size)
    return pack(ready.numbers(), ready.scales, ready.zero_points, form, kept.order)


def check_exact(name: str, weights: NDArray[Any], precision: Precision) -> None:
    """Refuses a precision that rounds what a quantised matrix stands for.

    Args:
        name: Of the matrix.
        weights: Float32.
        precision: What it would be stored in.

    Raises:
        CheckpointError: It says which precision doesn't.
    """
    if precision == "fp32":
        return
    with np.errstate(over="ignore"):
        stored = weights.astype(NUMPY_DTYPES[precision]).astype(np.float32)
    if not np.array_equal(stored, weights):
        raise CheckpointError(
            f"the quantised weights of '{name}' are not exact in {precision}",
            hint="build with --precision fp32, which holds them as they are",
        )
