"""What follows products in some models: a norm before the sum, a cap of logits."""

from __future__ import annotations

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.kernels import Kernels, integer, number, pointer
from ojfa_export.backends.tensorrt.linear import Norm, address

# As in around_products.cu; thread blocks that share the logits.
NORM_THREADS, CAP_THREADS, CAP_BLOCKS = 512, 256, 512


def add_normed(
    kernels: Kernels, out: DeviceArray, residual: DeviceArray, y: DeviceArray, norm: Norm
) -> None:
    """out [tokens, H] = residual + norm(y), all fp32; out may be the residual.

    Args:
        kernels: Compiled for the model.
        out: Where it goes.
        residual: Hidden states.
        y: What a product gave.
        norm: RMSNorm.
    """
    tokens, width = y.shape
    kernels.launch(
        "add_normed",
        (tokens, 1, 1),
        (NORM_THREADS, 1, 1),
        (
            *(pointer(each.pointer) for each in (out, residual, y)),
            *(pointer(address(norm.weight)), number(norm.epsilon), integer(width)),
        ),
        overlapping=True,
    )


def cap_logits(kernels: Kernels, logits: DeviceArray, cap: float | None) -> None:
    """Logits to tanh(logits / cap) * cap, in place; as they are where there is no cap."""
    if cap is None:
        return
    kernels.launch(
        "cap_logits",
        (CAP_BLOCKS, 1, 1),
        (CAP_THREADS, 1, 1),
        (pointer(logits.pointer), integer(logits.nbytes // 4), number(cap)),
        overlapping=True,
    )
