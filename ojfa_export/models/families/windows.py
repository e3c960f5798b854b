"""Sliding windows of some of a model's layers, as configs of Qwen's kind say them."""

from __future__ import annotations

from collections.abc import Callable

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import Config
from ojfa_export.models.spec import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def with_windows(config: Config, spec: ModelSpec, usual: Callable[[int], bool]) -> ModelSpec:
    """A model with the windows of its config.

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
    listed = config.get("layer_types")
    if listed is None:
        windowed = [used and window is not None and usual(index) for index in range(spec.blocks)]
    elif isinstance(listed, list) and len(listed) == spec.blocks:
        windowed = [each == SLIDING for each in listed]
    else:
        raise config.wrong("layer_types", f"a list of {spec.blocks} types", listed)
    other = sorted({str(each) for each in listed or []} - {FULL, SLIDING})
    if other or (any(windowed) and not (used and window is not None)):
        raise CheckpointError(
            f"{config.source}: field 'layer_types' is {listed!r:.60}, which is not supported",
            hint=f"supported: {FULL}, and with use_sliding_window and sliding_window {SLIDING}",
        )
    if not any(windowed):
        return spec
    some = () if all(windowed) else tuple(windowed)
    return spec.model_copy(update={"window": window, "windowed": some})
