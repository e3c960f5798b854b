"""Checkpoints that are quantised already: which layout config.json names, or why it isn't read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.quantised.awq import read_awq
from ojfa_export.models.checkpoint.quantised.compressed import read_compressed
from ojfa_export.models.checkpoint.quantised.fp8 import read_fp8
from ojfa_export.models.checkpoint.quantised.gptq import read_gptq
from ojfa_export.models.checkpoint.quantised.layout import Layout
from ojfa_export.models.families.config import QUANTISATION, Config

# By `quant_method`.
_READERS: Mapping[str, Callable[[Config], Layout]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
}


def read_layout(config: Config) -> Layout | None:
    """How a checkpoint's matrices are quantised; None where they aren't.

    Args:
        config: Its config.json.

    Raises:
        CheckpointError: In a way that is not read; it is named.
    """
    fields = config.get(QUANTISATION)
    if fields is None:
        return None
    method = fields["quant_method"]  # `models.families.read_spec` has looked
    if not isinstance(method, str) or method not in _READERS:
        raise CheckpointError(
            f"{config.source}: the weights are quantised by '{method!s:.60}', which is not read",
            hint=f"read are {', '.join(_READERS)}; or save the model dequantised",
        )
    prefix = f"{QUANTISATION}."
    ignored = [name.removeprefix(prefix) for name in config.ignored if name.startswith(prefix)]
    section = Config(fields, f"{config.source}, {QUANTISATION}", ignored)
    section.get("quant_method")
    return _READERS[method](section)
