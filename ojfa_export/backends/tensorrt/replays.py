"""Steps that were recorded, known by what was asked: one lookup and one launch.

What a session asks goes through the cache and a head piece by piece the first times, and all that
was put on the stream for it becomes one recording (`cuda.recorder`). From then on that is replayed
here, and of what the pieces know only what they would have left behind is set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING

from ojfa_export.backends.backend import Hidden
from ojfa_export.backends.choice import Choices, Choosing, OneToken, run_on
from ojfa_export.backends.cuda.device import Graph
from ojfa_export.backends.tensorrt.cache import Pass, TensorRtCache
from ojfa_export.backends.tensorrt.heads import HEAD_ROWS

if TYPE_CHECKING:
    from ojfa_export.backends.tensorrt.engines import TensorRtEngines


class Replays:
    """Runs tokens on and asks heads.

    Args:
        engines: The opened model.
    """

    def __init__(self, engines: TensorRtEngines) -> None:
        self._engines = engines
        self._recorder = engines.device.recorder

    def prepare(
        self, cache: TensorRtCache, one: OneToken, depth: int, kept: Hidden | None, how: Choosing
    ) -> Callable[[], Choices]:
        """See `backends.backend.Engines.prepare`."""
        key = self._key(cache, one, depth, kept, how)
        known = None if key is None else self._recorder.find(key)
        if known is not None:
            return partial(self._replay, cache, one, depth, how, *known)
        return partial(self._record, key, cache, one, depth, kept, how)

    def _record(
        self,
        key: Hashable | None,
        cache: TensorRtCache,
        one: OneToken,
        depth: int,
        kept: Hidden | None,
        how: Choosing,
    ) -> Choices:
        launches = self._recorder.launches
        choices = run_on(self._engines, cache, one, depth, kept, how)
        if key is not None and self._recorder.launches == launches + 1:
            self._recorder.name(key, self._engines.ahead)
        return choices

    def _key(
        self, cache: TensorRtCache, one: OneToken, depth: int, kept: Hidden | None, how: Choosing
    ) -> tuple[Hashable, ...] | None:
        """All that decides what is put on the stream; None where that is more than a recording."""
        count, sampling, way = len(one.starts), how.sampling, cache.way(one, depth)
        if way is None or self._recorder.pending or count > HEAD_ROWS:
            return None
        return (
            cache.key,
            way,
            self._engines.may_be_off,
            one.depth,
            depth,
            count,
            one.long_context,
            None if kept is None else kept.pointer,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            how.stop,
        )

    def _replay(
        self,
        cache: TensorRtCache,
        one: OneToken,
        depth: int,
        how: Choosing,
        graph: Graph,
        ahead: range | None,
    ) -> Choices:
        engines, count = self._engines, len(one.starts)
        workspace, is_first = cache.workspace(count), one.hidden is None
        engines.mailbox.leave(how.draws)
        # Whenever this is interrupted, nothing is taken to be on the device that may not be.
        engines.last_pass, engines.keeping, engines.ahead = None, ((), None), ahead
        if is_first:
            if isinstance(one.tokens, list):
                workspace.leave(one.tokens, one.starts)
            workspace.moved_to([])
        self._recorder.replay(graph)
        choices = engines.mailbox.expect(count)
        if is_first:
            workspace.moved_to(one.starts)
        one.depth, one.hidden = depth, workspace.steps[depth % 2]
        engines.last_pass = Pass(cache, depth, one.rows, one.starts, one.long_context, one.hidden)
        return choices
