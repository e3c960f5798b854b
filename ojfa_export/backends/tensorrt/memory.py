"""How much device memory a request takes, and what would fit: said before the driver says no."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ojfa_export.backends.cuda.sizes import readable
from ojfa_export.backends.tensorrt.layout import words_of
from ojfa_export.backends.tensorrt.plan import PASS_TOKENS, GraphPlan, Place
from ojfa_export.bundle.names import CHECK_HEAD, block_name
from ojfa_export.errors import BackendError
from ojfa_export.models.spec import ModelSpec

# Of an allocation: what the driver rounds up to.
PAGE = 2 << 20
# Left free by what is said to fit: TensorRT and the driver load kernels when they first run.
RESERVE = 256 << 20


@dataclass(frozen=True)
class Request:
    """Blocks that are about to run.

    Attributes:
        blocks: Which.
        batch: Sequences of the cache; 0 where there is none yet.
        capacity: Positions of each.
        tokens: That run at once at most.
    """

    blocks: range
    batch: int = 0
    capacity: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes that a request still takes, by what for."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.workspace


class Room:
    """Counts what a model's requests take.

    Args:
        spec: The model.
        element_bytes: Of activations in compute precision.
        cache_bytes: Of a number of keys and values.
        plans: Of every graph: its weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        element_bytes: int,
        cache_bytes: int,
        plans: Mapping[str, GraphPlan],
    ) -> None:
        self._spec, self._element, self._cached = spec, element_bytes, cache_bytes
        self._activations = max((plan.activation_bytes for plan in plans.values()), default=0)
        self._weights = {
            name: {place: _paged(size) for place, size in _sizes(plan).items()}
            for name, plan in plans.items()
        }

    def need(
        self,
        request: Request,
        held: Collection[Place] = (),
        cached: Collection[int] = (),
        *,
        opened: bool = False,
    ) -> Need:
        """What a request takes beyond what is there.

        Args:
            request: What is asked for.
            held: Weights that are on the device.
            cached: Blocks whose part of the cache is.
            opened: Whether TensorRT's engines are.
        """
        spec = self._spec
        own = request.blocks.stop == spec.blocks or "exit_head" not in self._weights
        heads = ["final_head"] if own else ["exit_head", CHECK_HEAD]
        names = ["embed", *map(block_name, request.blocks), *heads]
        missing = {
            place: size
            for name in names
            for place, size in self._weights.get(name, {}).items()
            if place not in held
        }
        rows = request.batch * request.capacity
        each = 2 * _paged(rows * spec.kv_heads * spec.head_dim * self._cached)
        # What stops at an exit waits there.
        waiting = 4 * rows * spec.hidden_size if request.blocks.stop < spec.blocks else 0
        return Need(
            weights=sum(missing.values()),
            cache=each * sum(block not in cached for block in request.blocks) + waiting,
            workspace=self._workspace(request.tokens) + (0 if opened else self._activations),
        )

    def _workspace(self, tokens: int) -> int:
        """Buffers of the largest pass (`workspace.Buffers`, `gemm.py`), and states beside them."""
        spec = self._spec
        qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        up = spec.intermediate_size * (2 if spec.gated else 1)
        rest = spec.heads * spec.head_dim + spec.intermediate_size + up + spec.hidden_size
        states = 3 if spec.norms_are("after") else 2
        each = 4 * (states * spec.hidden_size + qkv) + self._element * rest
        # What is embedded and the results of pieces hold every token.
        return PASS_TOKENS * each + 3 * 4 * tokens * spec.hidden_size

    def check(
        self,
        request: Request,
        free: int,
        device: str,
        held: Collection[Place] = (),
        cached: Collection[int] = (),
        *,
        opened: bool = False,
    ) -> None:
        """Refuses what doesn't fit.

        Args:
            request: What is asked for.
            free: Bytes.
            device: Its name.
            held: Weights that are on the device.
            cached: Blocks whose part of the cache is.
            opened: Whether TensorRT's engines are.

        Raises:
            BackendError: With what is needed, what is free, and what would fit.
        """
        need = self.need(request, held, cached, opened=opened)
        if need.total <= free:
            return
        rows = f"{request.batch} x {request.capacity}"
        cache = f" with a cache of {rows} tokens" if request.batch else ""
        # A smaller request begins without this one's cache.
        begun = self.need(request, held, opened=opened).cache - need.cache
        raise BackendError(
            f"{request.blocks.stop} blocks{cache} take {readable(need.total)} more on {device}, "
            f"where {readable(free)} are free: weights {readable(need.weights)}, "
            f"cache {readable(need.cache)}, activations {readable(need.workspace)}",
            hint=self._hint(request, free + begun, held, opened=opened),
        )

    def _hint(self, request: Request, free: int, held: Collection[Place], *, opened: bool) -> str:
        def fits(smaller: Request) -> bool:
            return self.need(smaller, held, opened=opened).total + RESERVE <= free

        start, stop = request.blocks.start, request.blocks.stop
        ways = []
        exits = (exit for exit in range(stop - 1, start, -1) if fits(_to_exit(request, exit)))
        if (exit := next(exits, None)) is not None:
            ways.append(f"exit {exit} instead of {stop} blocks")
        lengths = (n for n in _halves(request.capacity) if fits(_shorter(request, n)))
        if (length := next(lengths, None)) is not None:
            ways.append(f"a cache of {length} tokens (max_length)")
        batches = (n for n in _halves(request.batch) if fits(replace(request, batch=n)))
        if (batch := next(batches, None)) is not None:
            ways.append(f"{batch} sequence{'s' if batch > 1 else ''} at a time")
        if not ways:
            return "nothing smaller fits: free memory on the GPU ('nvidia-smi' shows whose it is)"
        return f"this would fit: {'; or '.join(ways)}"


def _sizes(plan: GraphPlan) -> dict[Place, int]:
    """Bytes of a graph's weights on the device."""
    sizes = {weight.place: weight.nbytes for weight in plan.weights.values()}
    for matrix in plan.quantised.values():
        assert plan.form is not None
        words = words_of(*matrix.shape(plan.form), plan.form, paired=matrix.paired)
        sizes[matrix.place] = 4 * words
    return sizes


def _to_exit(request: Request, exit: int) -> Request:
    return replace(request, blocks=range(request.blocks.start, exit))


def _shorter(request: Request, capacity: int) -> Request:
    return replace(request, capacity=capacity, tokens=min(request.tokens, capacity))


def _halves(value: int) -> list[int]:
    """Half, a quarter and so on, down to 1."""
    return [value >> shift for shift in range(1, value.bit_length())]


def _paged(size: int) -> int:
    """What an allocation takes: small ones share a page."""
    return size if size < PAGE else -(-size // PAGE) * PAGE
