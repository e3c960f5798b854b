"""One block on the GPU: what goes on the stream for it, by kernels alone or with engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.cuda.device import PinnedArray
from ojfa_export.backends.cuda.kernels import Argument, pointer
from ojfa_export.backends.tensorrt.attention import Attention, Geometry, Operands, Scratch
from ojfa_export.backends.tensorrt.linear import Norm
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.plan import MLP, QKV
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.bundle.names import block_name


class Workspace:
    """Buffers of a step with this many tokens, whatever sequences they belong to.

    Args:
        model: The opened model.
        tokens: How many.
        lasting: Whether recordings refer to it.

    Attributes:
        hidden: Two buffers [tokens, H] fp32; block i reads the (i % 2)th and writes the other.
        qkv: [tokens, (heads + 2 kv_heads) head_dim] fp32.
        mixed: [tokens, heads * head_dim], what attention gives.
        inner: [tokens, intermediate size], of the MLP.
        attention: What attention's thread blocks share.
        positions: Address of the tokens' positions, for all other kernels.
        sequences: Address of the sequences that they belong to.
    """

    def __init__(self, model: OpenedModel, tokens: int, *, lasting: bool = False) -> None:
        spec, self._device = model.spec, model.device
        arrays, dtype = model.arrays, DTYPES[model.precision]
        self._arrays = arrays
        self.tokens = tokens
        self.hidden = tuple(arrays.empty((tokens, spec.hidden_size), np.float32) for _ in range(2))
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv = arrays.empty((tokens, width), np.float32)
        self.mixed = arrays.empty((tokens, spec.heads * spec.head_dim), dtype)
        self.inner = arrays.empty((tokens, spec.intermediate_size), dtype)
        geometry = Geometry.of(spec, dtype.itemsize)
        self.attention = Scratch(self._device, arrays, geometry, tokens)
        self._places = arrays.empty((2, tokens), np.int32)
        self.positions, self.sequences = (self._places.pointer + i * 4 * tokens for i in range(2))
        # For the tokens of a step: the device reads them from the host's memory, as late as it can.
        self._named = PinnedArray((2, tokens), np.int32) if lasting else None
        self._named_here: DeviceArray | None = None
        self._named_with = 0  # the launch that reads them
        self._positions: list[int] = []
        self._sequences: list[int] = []

    @property
    def named_at(self) -> tuple[Argument, Argument]:
        """Token ids and positions for the embedding."""
        start = (self._named or self._named_here).pointer  # type: ignore[union-attr]
        return pointer(start), pointer(start + 4 * self.tokens)

    def name(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Says which tokens they are, and where, to the embedding, which tells the others where."""
        self._positions = list(positions)
        if self._named is not None:
            self.leave(token_ids, positions)
            return
        both = np.array([token_ids, self._positions], np.int32)
        self._named_here = self._arrays.asarray(both)

    def leave(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Leaves the tokens of a step where the next launch reads them."""
        assert self._named is not None
        if self._device.recorder.done < self._named_with:
            self._device.synchronize()  # the tokens before may not have been read yet
        self._named_with = self._device.recorder.launches + 1
        self._named.array[0], self._named.array[1] = token_ids, positions

    def place(self, positions: Sequence[int], sequences: Sequence[int]) -> None:
        """Says where the tokens are, and of which sequences; what is known is not copied again."""
        if (wanted := list(positions)) != self._positions:
            self._device.upload(np.array(wanted, np.int32), self.positions)
            self._positions = wanted
        if (wanted := list(sequences)) != self._sequences:
            self._device.upload(np.array(wanted, np.int32), self.sequences)
            self._sequences = wanted

    def places(self) -> tuple[Argument, Argument]:
        """Positions and sequences, for a kernel."""
        return pointer(self.positions), pointer(self.sequences)

    def is_of(self, slots: list[int]) -> bool:
        """Whether the device has these slots as the tokens'."""
        return self._sequences == slots

    def is_placed(self, positions: list[int]) -> bool:
        """Whether the device has these positions."""
        return positions == self._positions

    def moved_to(self, positions: list[int]) -> None:
        """Tells of positions that the device gave the tokens."""
        self._positions = positions

    def take(self, hidden: DeviceArray, block: int) -> None:
        """Puts hidden states where a block reads them."""
        target = self.hidden[block % 2]
        if hidden.pointer != target.pointer:
            self._device.copy(hidden.pointer, target.pointer, target.nbytes)


class Block:
    """A block and its part of one cache.

    Args:
        model: The opened model.
        index: Which block.
        shape: Of keys and of values: [batch, kv_heads, capacity, head_dim].
    """

    def __init__(self, model: OpenedModel, index: int, shape: tuple[int, int, int, int]) -> None:
        self._model, self._index, self._shape = model, index, shape
        self._name = block_name(index)
        dtype = DTYPES[model.precision]
        self._keys = model.arrays.lasting(shape, dtype)
        self._values = model.arrays.lasting(shape, dtype)
        self._attention = Attention(
            model.kernels[model.precision],
            Geometry.of(model.spec, dtype.itemsize),
            model.device.multiprocessors,
        )

    def unload(self) -> None:
        """Lets go of the weights."""
        self._model.close(self._name)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies keys and values of a slot's first tokens to another."""
        for array in (self._keys, self._values):
            for head in range(self._shape[1]):
                array[target, head, :count] = array[source, head, :count]

    def run(self, workspace: Workspace, long_context: bool, *, together: bool) -> None:
        """Puts the block on the stream.

        Args:
            workspace: Holds the tokens' hidden states.
            long_context: Whether LongRoPE's long factors apply.
            together: Whether the tokens are of different sequences, one each.
        """
        products = self._model.products(workspace.tokens)
        if products:
            self._qkv_by_kernels(workspace, products)
        else:
            self._qkv_by_engine(workspace)
        self._attend(workspace, long_context, together=together)
        if products:
            self._mlp_by_kernels(workspace, products)
        else:
            self._mlp_by_engine(workspace)

    def settle(self, tokens: int) -> None:
        """Runs the engines for nothing, so that TensorRT has these shapes before a recording.

        Where the shapes are others than at its last run it has things to do that can't be recorded.
        """
        workspace = Workspace(self._model, tokens)
        self._qkv_by_engine(workspace)
        self._mlp_by_engine(workspace)

    def _qkv_by_kernels(self, workspace: Workspace, products: Products) -> None:
        weights, source = self._model.weights(self._name), workspace.hidden[self._index % 2]
        products.norm_linear(
            workspace.qkv,
            source,
            self._norm("attention.norm"),
            weights["attention.qkv.weight"],
            weights.get("attention.qkv.bias"),
        )

    def _mlp_by_kernels(self, workspace: Workspace, products: Products) -> None:
        weights = self._model.weights(self._name)
        source = workspace.hidden[self._index % 2]
        target = workspace.hidden[1 - self._index % 2]
        out, up, down = "attention.out", "mlp.up", "mlp.down"
        products.linear(
            target, source, workspace.mixed, weights[f"{out}.weight"], weights.get(f"{out}.bias")
        )
        products.norm_up(
            workspace.inner,
            target,
            self._norm("mlp.norm"),
            weights[f"{up}.weight"],
            weights.get(f"{up}.bias"),
        )
        products.linear(
            target, target, workspace.inner, weights[f"{down}.weight"], weights.get(f"{down}.bias")
        )

    def _qkv_by_engine(self, workspace: Workspace) -> None:
        self._run_engine(
            QKV,
            workspace.tokens,
            {
                "hidden": workspace.hidden[self._index % 2],
                "qkv": workspace.qkv,
            },
            ("attention.norm", "attention.qkv"),
        )

    def _mlp_by_engine(self, workspace: Workspace) -> None:
        self._run_engine(
            MLP,
            workspace.tokens,
            {
                "hidden": workspace.hidden[self._index % 2],
                "mixed": workspace.mixed,
                "hidden_out": workspace.hidden[1 - self._index % 2],
            },
            ("attention.out", "mlp."),
        )

    def _run_engine(
        self, part: str, tokens: int, arrays: dict[str, DeviceArray], prefixes: tuple[str, ...]
    ) -> None:
        results = ("qkv", "hidden_out")
        self._model.engine(self._name, part).run(
            tokens,
            {
                name: (array.pointer, 0 if name in results else array.shape[-1])
                for name, array in arrays.items()
            },
            {
                name: array.pointer
                for name, array in self._model.weights(self._name).items()
                if name.startswith(prefixes)
            },
        )

    def _norm(self, name: str) -> Norm:
        weights = self._model.weights(self._name)
        epsilon = self._model.spec.norm_epsilon
        return Norm(weights[f"{name}.weight"], weights.get(f"{name}.bias"), epsilon)

    def _attend(self, workspace: Workspace, long_context: bool, *, together: bool) -> None:
        cosines, sines = self._rotations(long_context)
        operands = Operands(
            out=workspace.mixed.pointer,
            qkv=workspace.qkv.pointer,
            keys=self._keys.pointer,
            values=self._values.pointer,
            cosines=cosines,
            sines=sines,
            positions=workspace.positions,
            sequences=workspace.sequences,
            capacity=self._shape[2],
            scale=self._model.spec.attention_scales[self._index],
        )
        self._attention.run(
            operands,
            workspace.attention,
            workspace.tokens,
            together=together,
        )

    def _rotations(self, long_context: bool) -> tuple[int, int]:
        tables = self._model.rotary
        if tables is None:
            return 0, 0
        cosines, sines = tables
        long = long_context and self._model.spec.rotary_switch is not None
        skipped = cosines.nbytes // 2 if long else 0
        return cosines.pointer + skipped, sines.pointer + skipped
