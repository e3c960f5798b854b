"""What kernels of ours do with a block's matrices, however many tokens they are made for."""

from __future__ import annotations

from typing import Protocol, TypeVar

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.tensorrt.linear import Norm

M = TypeVar("M", contravariant=True)


class ProductsWith(Protocol[M]):
    """Products with matrices [outputs, columns] of a kind, for the tokens of a step."""

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: M,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = norm(hidden) matrix^T + bias."""

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: M,
        bias: DeviceArray | None,
    ) -> None:
        """inner [tokens, width] = the MLP's activated (and gated) products with norm(hidden)."""

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: M,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = residual + x matrix^T + bias; out may be the residual."""


# With elements, in whole 16-byte rows; of a model whose matrices are quantised, with those as well
# (`quantised.ByMatrix`).
Products = ProductsWith[DeviceArray]
