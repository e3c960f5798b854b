"""Quantised weights: are they those of the checkpoint, and what did rounding them change?

The first is a check: no weight may be off by more than half a step of its group, of floats half a
last place, or at all where the checkpoint had it quantised already. The second is a figure: how far
the model as a whole has moved is what its user accepts with the format.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ojfa_export.backends.frugal import frugal
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.weight_format import (
    QuantisedMatrix,
    WeightFormat,
    dequantise,
    matrix_of,
)
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.graphs.kept import matrices_of
from ojfa_export.graphs.weights import map_tensors
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.float8 import LARGEST, last_place
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import Progress
from ojfa_export.verify.change import Change
from ojfa_export.verify.check import Check
from ojfa_export.verify.reference import reference_of

# Half a step, and fp32's rounding of a quotient of up to 255 steps; twice as much of whole numbers
# without zero points, where the largest weight's opposite is one step beyond the range.
HALF_STEP = 0.501
# Fitted weights make good what others lost, so that some are several steps off. Root mean square of
# a matrix, in steps: 0.29 where each is the nearest number, 0.35 to 0.61 fitted (SmolLM2-135M),
# about 3 where it is another.
FITTED_STEPS = 1.0
# Kept ones are the same numbers; where a family multiplies them (Granite), their scales are rounded
# to fp32 once more: 6e-8 of up to 255 steps.
KEPT_STEPS = 1e-4
# Of a matrix, looked at in one go.
OUTPUTS_AT_ONCE = 4096
# Text that the change is measured on, and logits of the original that are held at once.
WINDOWS, WINDOW_TOKENS = 8, 256
LOGITS_AT_ONCE = 1 << 27


def verify_weights(bundle: Bundle, checkpoint: Checkpoint, form: WeightFormat) -> list[Check]:
    """Compares dequantised matrices with a checkpoint's, in steps of their groups.

    Args:
        bundle: With quantised weights.
        checkpoint: What it was built from.
        form: Their format.
    """
    checks = []
    is_kept = checkpoint.layout is not None
    is_fitted = form.storage == "int4" and not is_kept
    tolerance = HALF_STEP if form.zero_points or form.is_float else 2 * HALF_STEP
    tolerance = FITTED_STEPS if is_fitted else KEPT_STEPS if is_kept else tolerance
    for graph, sources in _sources(checkpoint, form):
        model = onnx.load(bundle.graphs / f"{graph}.onnx", load_external_data=False)
        tensors = map_tensors(model, bundle.graphs)
        worst = 0.0
        for name, source in sources.items():
            matrix, original = matrix_of(tensors, name), checkpoint.read(source)
            assert matrix is not None
            by_output = original if name == "head" else original.T
            largest, mean_square = _steps_off(matrix, form, by_output)
            worst = max(worst, float(np.sqrt(mean_square)) if is_fitted else largest)
        checks.append(
            Check(
                name=f"quantised {graph}: steps",
                max_abs_diff=worst,
                tolerance=tolerance,
                passed=worst <= tolerance,
            )
        )
    return checks


def _steps_off(
    matrix: QuantisedMatrix, form: WeightFormat, by_output: NDArray[Any]
) -> tuple[float, float]:
    """How far weights [outputs, inputs] are off, in steps: the most, and the mean square.

    A float's step is the last place of numbers as large.
    """
    largest, squares = 0.0, 0.0
    for start in range(0, len(by_output), OUTPUTS_AT_ONCE):
        rows = slice(start, start + OUTPUTS_AT_ONCE)
        some = matrix.rows(rows)
        steps = np.repeat(np.abs(some.scales), form.group_size, axis=1)[:, : by_output.shape[1]]
        if form.is_float:
            sizes = np.abs(by_output[rows]) / np.maximum(steps, np.finfo(np.float32).tiny)
            steps *= last_place(np.minimum(sizes, np.float32(LARGEST)))
        difference = np.abs(dequantise(some, form) - by_output[rows])
        share = difference / np.maximum(steps, np.finfo(np.float32).tiny)
        share = np.nan_to_num(share, nan=np.inf)
        largest = max(largest, float(share.max()))
        squares += float(np.square(share, dtype=np.float64).sum())
    return largest, squares / by_output.size


def _sources(checkpoint: Checkpoint, form: WeightFormat) -> Iterator[tuple[str, dict[str, Source]]]:
    """Where the quantised matrices of each graph come from."""
    for graph, some in itertools.groupby(matrices_of(checkpoint), key=lambda each: each[0]):
        found = {name: source for _, name, source in some if form.stores(graph, name)}
        if found:
            yield graph, found


def measure_change(
    model: Model,
    checkpoint: Checkpoint,
    token_ids: Int32,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Change:
    """Runs text through a bundle at full depth and through the original, in fp32.

    Args:
        model: The bundle, opened.
        checkpoint: The original.
        token_ids: [B,S] text, of which the beginnings of some rows are used.
        progress: Shows windows.
        trust_remote_code: Whether transformers may run code that lies in the checkpoint.
    """
    spec, cache = model.spec, model.manifest.cache
    longest = min(WINDOW_TOKENS, cache.max_length, spec.max_positions)
    ids = np.ascontiguousarray(token_ids[:WINDOWS, : min(longest, spec.rotary_switch or longest)])
    reference = reference_of(checkpoint, trust_remote_code=trust_remote_code)
    engines, length = frugal(model.engines, spec), ids.shape[1]
    together = max(1, LOGITS_AT_ONCE // (length * spec.vocab_size))
    sums = np.zeros(4)
    with progress.task("comparing with the original", len(ids), "windows") as task:
        for start in range(0, len(ids), together):
            rows = ids[start : start + together]
            expected = reference.forward(rows, lambda _depth, _hidden: None)
            for row, logits in zip(rows, expected, strict=True):
                session = Session(spec, engines, 1, length)
                actual = session.advance([row.tolist()], every_position=True)[0]
                sums += _compared(actual, logits, row)
                task.advance()
    agreeing, divergence, surprisal, original = sums / ids.size
    following = ids.size / (ids.size - len(ids))  # a window's last token is followed by none
    return Change(
        tokens=ids.size,
        agreement=agreeing,
        mean_kl=divergence,
        perplexity=float(np.exp(surprisal * following)),
        original_perplexity=float(np.exp(original * following)),
    )


def _compared(actual: Float32, expected: Float32, token_ids: Int32) -> tuple[float, ...]:
    """Sums over a window's tokens: agreeing ones, divergence, and both models' surprisals."""
    ours, theirs = (_log_softmax(logits) for logits in (actual, expected))
    agreeing = (actual.argmax(axis=1) == expected.argmax(axis=1)).sum()
    divergence = (np.exp(theirs) * (theirs - ours)).sum()
    at = np.arange(len(token_ids) - 1), token_ids[1:]
    return float(agreeing), float(divergence), -float(ours[at].sum()), -float(theirs[at].sum())


def _log_softmax(logits: Float32) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
