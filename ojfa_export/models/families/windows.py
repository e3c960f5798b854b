"""Sliding windows of some of a model's layers, as configs say them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import Config
from ojfa_export.models.spec import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def with_windows(config: Config, spec: ModelSpec, usual: Callable[[int], bool]) -> ModelSpec:
    """A model with the windows of its config, of Qwen's kind.

    Args:
        config: Of the model.
        spec: The model without windows.
        usual: Whether a layer has the window where the config doesn't list the layers' types.

    Raises:
        CheckpointError: Layers are of other types, or have a window that isn't there.
    """
    used = config.flag("use_sliding_window", False)
    # Read by nothing without the window; published configs have it all the same.
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    there = used and window is not None
    sliding = sliding_layers(config, spec.blocks, lambda index: there and usual(index))
    if any(sliding) and not there:
        raise _not_supported(config, "; the latter with use_sliding_window and sliding_window")
    return with_window(spec, window, sliding)


def with_window(spec: ModelSpec, window: int | None, sliding: Sequence[bool]) -> ModelSpec:
    """A model with a window in some layers."""
    if not any(sliding):
        return spec
    some = () if all(sliding) else tuple(sliding)
    return spec.model_copy(update={"window": window, "windowed": some})


def sliding_layers(config: Config, blocks: int, usual: Callable[[int], bool]) -> list[bool]:
    """For each layer whether its type, in the config's list or usually, is the one with a window.

    Raises:
        CheckpointError: Layers are of other types.
    """
    listed = config.get("layer_types")
    if listed is None:
        return [usual(index) for index in range(blocks)]
    if not isinstance(listed, list) or len(listed) != blocks:
        raise config.wrong("layer_types", f"a list of {blocks} types", listed)
    if {str(each) for each in listed} - {FULL, SLIDING}:
        raise _not_supported(config)
    return [each == SLIDING for each in listed]


def _not_supported(config: Config, where: str = "") -> CheckpointError:
    listed = config.get("layer_types")
    return CheckpointError(
        f"{config.source}: field 'layer_types' is {listed!r:.60}, which is not supported",
        hint=f"supported: {FULL} and {SLIDING}{where}",
    )
