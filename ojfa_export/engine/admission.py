"""Which requests run and which wait, and when one has to end."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from ojfa_export.engine.budget import CacheSize
from ojfa_export.engine.request import Request
from ojfa_export.engine.running import NO_SLOT, Running
from ojfa_export.engine.scheduler import Work
from ojfa_export.engine.slots import Slots
from ojfa_export.engine.stats import Counts
from ojfa_export.errors import OjfaError, OverloadedError


class Admission:
    """The queue, and those that have a slot.

    Any thread may put requests in, cancel them, hold, and close. All else is for the engine's
    thread; what changes who runs or waits, or reads it while others may, is done with `changed`.

    Args:
        slots: Places in the cache.
        size: Of the cache.
        most: Requests that run at once.
        most_waiting: Requests that may wait.
        counts: Of the engine.

    Attributes:
        changed: The lock of all this, and told when the engine's thread has something to do.
        waiting: In their order.
        running: In the order in which they got their slots.
        closed: Whether all shall end.
    """

    def __init__(
        self, slots: Slots, size: CacheSize, most: int, most_waiting: int, counts: Counts
    ) -> None:
        self._size, self._most, self._most_waiting = size, most, most_waiting
        self._counts = counts
        self.changed = threading.Condition()
        self.waiting: deque[Running] = deque()
        self.closed = False
        self._next_id = 0
        self._held = False  # whether nothing is begun while nothing runs
        # What the engine's thread must see to; it looks at nothing else between most passes.
        self._cancelled = False
        self._first_deadline = math.inf  # or before it
        self.begin(slots)

    def begin(self, slots: Slots) -> None:
        """Goes on with an empty cache, in which nobody has a slot."""
        self.slots = slots
        self.running: list[Running] = []
        self._may_admit = True

    def put(self, make: Callable[[int], Running]) -> Request:
        """Puts a request into the queue.

        Args:
            make: Makes it of its number.

        Raises:
            OverloadedError: The queue is full.
            OjfaError: All is closed.
        """
        with self.changed:
            if self.closed:
                raise OjfaError("the engine is closed", hint="make another one")
            if len(self.waiting) >= self._most_waiting:
                raise OverloadedError(
                    f"{self._most_waiting} requests are waiting already",
                    hint="try again later, or give the engine a larger max-queue",
                )
            each = make(self._next_id)
            self._next_id += 1
            if not self.waiting:
                self._may_admit = True
            if each.deadline is not None:
                self._first_deadline = min(self._first_deadline, each.deadline)
            self.waiting.append(each)
            if not self._held:
                self.changed.notify()
        return each.request

    def cancel(self, request: Request) -> None:
        """Has a request end soon."""
        with self.changed:
            for each in self._all():
                if each.request is request:
                    each.cancelled = self._cancelled = True
            self.changed.notify()

    def hold(self) -> bool:
        """See `Engine.hold`."""
        with self.changed:
            self._held = not self.running
            return self._held

    def release(self) -> None:
        """Ends `hold`."""
        with self.changed:
            self._held = False
            self.changed.notify()

    def close(self) -> None:
        """Has all requests end, and takes no more."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    @property
    def has_work(self) -> bool:
        """Whether a request runs, or may begin."""
        return bool(self.running) or (bool(self.waiting) and not self._held)

    @property
    def is_full(self) -> bool:
        """Whether requests wait for others to leave."""
        return bool(self.waiting) and not self._has_slot

    @property
    def must_look_up(self) -> bool:
        """Whether some request may have to end, whatever its tokens are."""
        return self.closed or self._cancelled or time.perf_counter() > self._first_deadline

    def admit(self) -> None:
        """Gives slots to those that wait, in their order.

        Whoever got none is not looked at again before somebody has left, or has come in front.
        """
        with self.changed:
            while self.waiting and self._may_admit and self._has_slot:
                each = self.waiting[0]
                running = [other.sequence for other in self.running]
                shared = self.slots.take(each.sequence, running)
                if shared is None:
                    self._may_admit = False
                    return
                self.waiting.popleft()
                self.running.append(each)
                if not each.request.started:
                    each.request.started = True
                    each.cached_tokens = shared
                    self._counts.prompt_tokens += len(each.sequence)
                    self._counts.cached_tokens += shared

    def end_what_is_over(self) -> None:
        """Ends requests that were cancelled or whose time is up; all of them at the end."""
        if not self.must_look_up:
            return
        now = time.perf_counter()
        for each in [*self.running, *self.waiting]:
            late = each.deadline is not None and now > each.deadline
            if not (each.cancelled or late or self.closed):
                continue
            each.finish("timeout" if late and not each.cancelled else "cancelled")
            if each in self.running:
                self.leave(each)
            else:
                self.waiting.remove(each)
                self._may_admit = True
                self._counts.finished[each.reason or "error"] += 1
        self._cancelled = False
        left = [each.deadline for each in self._all()]
        self._first_deadline = min((each for each in left if each is not None), default=math.inf)

    def leave(self, each: Running) -> None:
        """Takes the slot of a request that has ended."""
        with self.changed:
            self.running.remove(each)
            self.slots.give_back(each.sequence, keep=True)
            self._may_admit = True
            self._counts.finished[each.reason or "error"] += 1

    def give_pages(self, work: Work) -> None:
        """Gives pages to those that run; others make room, or leave the work and wait."""
        if all(self.slots.grow(each.sequence) for each in work.running):
            return
        for each in work.running:
            while each in self.running and not self.slots.grow(each.sequence):
                self._preempt(self.running[-1])
        work.keep([each in self.running for each in work.running])

    def fail_all(self, error: OjfaError) -> None:
        """Ends every request that has a slot; the cache must begin anew."""
        for each in self.running:
            self._end(each, error)

    def _preempt(self, each: Running) -> None:
        """Sends the youngest back to the queue: it is computed again when there are pages."""
        alone = len(self.running) == 1
        with self.changed:
            self.running.remove(each)
            self.slots.give_back(each.sequence, keep=False)
            self._may_admit = True
            if alone:
                error = OjfaError(
                    f"the request needs more than the {self._size.tokens(len(each.sequence.asks))} "
                    "tokens of the KV cache",
                    hint="give the engine more kv-cache-bytes, or step for fewer tokens",
                )
                self._end(each, error)
                return
            each.sequence.lower_to(0)
            each.sequence.slot = NO_SLOT
            self.waiting.appendleft(each)
            self._counts.preemptions += 1

    def _end(self, each: Running, error: OjfaError) -> None:
        each.fail(error)
        self._counts.finished["error"] += 1

    def _all(self) -> Iterator[Running]:
        yield from self.waiting
        yield from self.running

    @property
    def _has_slot(self) -> bool:
        return len(self.running) < self._most
