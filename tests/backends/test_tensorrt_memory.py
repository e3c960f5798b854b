"""What a request takes on a GPU, and what is said where it doesn't fit: without a GPU."""

from __future__ import annotations

import pytest

from bench.gpu.shapes import SHAPES
from ojfa_export.backends.cuda.sizes import GIB, readable
from ojfa_export.backends.tensorrt.memory import Request, Room
from ojfa_export.backends.tensorrt.plan import GraphPlan, Weight
from ojfa_export.bundle.names import block_name
from ojfa_export.errors import BackendError

SPEC = SHAPES["llama2-7b"]
HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
BLOCK = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
MEBI = 1 << 20
ACTIVATIONS = 100 * MEBI


def weight(file: str, *shape: int) -> Weight:
    return Weight(file=file, offset=0, shape=shape, precision="fp16", transposed=False)


def plan(*weights: Weight) -> GraphPlan:
    named = {f"{index}": each for index, each in enumerate(weights)}
    return GraphPlan(
        precision="fp16", engines={}, kernels={}, weights=named, activation_bytes=ACTIVATIONS
    )


@pytest.fixture
def room() -> Room:
    """Llama-2-7B in fp16, a head of its own."""
    plans = {
        "embed": plan(weight("embed", VOCABULARY, HIDDEN)),
        "final_head": plan(weight("head", VOCABULARY, HIDDEN)),
        "exit_head": plan(weight("exit", VOCABULARY, 41)),
    }
    for index in range(SPEC.blocks):
        name = block_name(index)
        plans[name] = plan(
            weight(f"{name}.a", HIDDEN, 4 * HIDDEN), weight(f"{name}.b", HIDDEN, 3 * INNER)
        )
    return Room(SPEC, 2, 2, plans)


def test_a_request_takes_its_weights_cache_and_buffers(room: Room) -> None:
    need = room.need(Request(range(32), batch=1, capacity=4096, tokens=1), opened=True)
    ends = 2 * 2 * VOCABULARY * HIDDEN
    assert need.weights == pytest.approx(32 * BLOCK + ends, rel=1e-3)
    assert need.cache == 32 * 2 * 2 * 4096 * HIDDEN  # blocks, keys and values, bytes, positions
    # fp32: states twice, queries, keys and values. fp16: what attention mixed, the MLP's products
    # before and after the gate, and what is normalised. Passes of 2048 tokens find room.
    token = 4 * (2 + 3) * HIDDEN + 2 * (2 * HIDDEN + 3 * INNER)
    assert need.workspace == pytest.approx(2048 * token, rel=1e-3)
    closed = room.need(Request(range(32), batch=1, capacity=4096, tokens=1))
    assert closed.workspace == need.workspace + ACTIVATIONS


def test_blocks_past_an_exit_take_nothing_but_what_waits_there(room: Room) -> None:
    half, full = (room.need(Request(range(blocks), 1, 4096, 1), opened=True) for blocks in (16, 32))
    head = 2 * VOCABULARY * (HIDDEN - 41)
    assert full.weights - half.weights == pytest.approx(16 * BLOCK + head, rel=1e-3)
    assert half.cache == full.cache // 2 + 4 * 4096 * HIDDEN


def test_what_is_there_is_not_needed_again(room: Room) -> None:
    request = Request(range(32), 1, 512, 1)
    embed = room.need(request, held={("embed", 0)})
    assert room.need(request).weights - embed.weights == 2 * VOCABULARY * HIDDEN
    some = room.need(request, cached=range(8))
    assert some.cache == room.need(request).cache * 24 // 32


def test_a_tied_head_is_counted_once() -> None:
    both = plan(weight("embed", VOCABULARY, HIDDEN))
    room = Room(SPEC, 2, 2, {"embed": both, "final_head": both})
    need = room.need(Request(range(32)))
    assert need.weights == pytest.approx(2 * VOCABULARY * HIDDEN, rel=1e-2)


def test_what_fits_is_let_through(room: Room) -> None:
    request = Request(range(32), 1, 4096, 512)
    room.check(request, room.need(request).total, "GPU")


def test_what_would_fit_is_said_and_fits(room: Room) -> None:
    request = Request(range(32), 16, 4096, 16)
    free = 24 * GIB
    with pytest.raises(BackendError) as caught:
        room.check(request, free, "Some GPU")
    message, hint = str(caught.value), str(caught.value.hint)
    total = readable(room.need(request).total)
    assert message.startswith(f"32 blocks with a cache of 16 x 4096 tokens take {total} more on")
    assert "Some GPU, where 24.00 GiB are free: weights 12." in message
    assert hint == (
        "this would fit: exit 16 instead of 32 blocks; or a cache of 1024 tokens (max_length); "
        "or 4 sequences at a time"
    )
    for smaller in (
        Request(range(16), 16, 4096, 16),
        Request(range(32), 16, 1024, 16),
        Request(range(32), 4, 4096, 16),
    ):
        room.check(smaller, free, "Some GPU")
    for larger in (Request(range(17), 16, 4096, 16), Request(range(32), 16, 2048, 16)):
        with pytest.raises(BackendError):
            room.check(larger, free, "Some GPU")


def test_before_there_is_a_cache_the_depth_is_what_can_be_less(room: Room) -> None:
    with pytest.raises(BackendError) as caught:
        room.check(Request(range(32)), 8 * GIB, "Some GPU")
    assert str(caught.value).startswith("32 blocks take ")
    assert str(caught.value.hint).startswith("this would fit: exit 18 instead of 32 blocks")
    assert "sequence" not in str(caught.value.hint)


def test_where_nothing_fits(room: Room) -> None:
    with pytest.raises(BackendError, match="take") as caught:
        room.check(Request(range(1)), MEBI, "Some GPU")
    assert "nvidia-smi" in str(caught.value.hint)


def test_a_cache_that_another_request_holds_is_not_free(room: Room) -> None:
    """Blocks 0 to 7 have theirs: the hint counts it as free, the need doesn't count it again."""
    request = Request(range(32), 16, 4096, 16)
    with pytest.raises(BackendError) as caught:
        room.check(request, 20 * GIB, "GPU", cached=range(8))
    with_what_is_held = 20 * GIB + 8 * 2 * 2 * 16 * 4096 * HIDDEN
    with pytest.raises(BackendError) as fresh:
        room.check(request, with_what_is_held, "GPU")
    assert caught.value.hint == fresh.value.hint


def test_sizes_are_readable() -> None:
    assert readable(3 * GIB) == "3.00 GiB"
    assert readable(5 * MEBI) == "5.00 MiB"
