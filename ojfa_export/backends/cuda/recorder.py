"""The work of a step, put together as it is asked for and replayed as one CUDA graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Set
from typing import Any, Protocol

Work = Callable[[], None]
Key = tuple[tuple[Hashable, ...], ...]


class Recording(Protocol):
    """Work that was recorded; see `cuda.device.Graph`."""

    def launch(self) -> None:
        """Puts all of it on the stream."""
        ...


class Records(Protocol):
    """What can record; see `cuda.device.Device`."""

    def capture(self, work: Work) -> Recording:
        """Records what the work puts on the stream, without running it."""
        ...

    def synchronize(self) -> None:
        """Waits for all work."""
        ...


class Recorder:
    """Collects work until something depends on it, then launches all of it at once.

    The same pieces in the same order run one by one the first time, are recorded the second, and
    replayed from then on. (TensorRT wants to have run once with the shapes and addresses of a
    recording; see also `add`.)

    Args:
        device: Where it runs; flushes before everything else that it puts on its stream.
        most: Recordings that are kept; when there are more, a quarter of them is forgotten, those
            that were launched longest ago.

    Attributes:
        launches: How often work was launched.
        done: How many of those launches are known to have ended.
        newest: The recording that was launched last, for whoever measures.
        failed: Whether the last launch failed or was interrupted, so that what it held may not have
            been done; whoever has seen to that may set it back.
    """

    def __init__(self, device: Records, most: int = 2048) -> None:
        self._device, self._most = device, most
        self._graphs: dict[Key, Recording | None] = {}
        self.launches = self.done = 0
        self.failed = False
        self.newest: Recording | None = None
        self._named: dict[Hashable, tuple[Recording, Any]] = {}
        self._last_use: dict[int, int] = {}  # the launch, by a recording's id
        self._launched: Recording | None = None  # with the last launch, if it was a recording
        self._keys: list[tuple[Hashable, ...]] = []
        self._work: list[Work] = []
        self._before: list[Work] = []
        self._owners_gone: deque[object] = deque()

    def add(self, key: tuple[Hashable, ...], work: Work, before: Work | None = None) -> None:
        """Adds work to what is launched next.

        Args:
            key: Holds every address and number that the work is given: it does the same whenever
                its key is the same.
            work: Puts something on the stream; nothing that waits for it.
            before: Run right before a recording, for what the work must not be the first to do.
        """
        self._keys.append(key)
        self._work.append(work)
        if before is not None:
            self._before.append(before)

    @property
    def pending(self) -> bool:
        """Whether something was added since the last launch."""
        return bool(self._keys)

    def take_back(self, key: tuple[Hashable, ...]) -> bool:
        """Takes back what was added last, if that is its key."""
        last = bool(self._keys) and self._keys[-1] == key
        if last:
            del self._keys[-1], self._work[-1]
        return last

    def flush(self) -> None:
        """Launches what was added."""
        if not self._keys:
            return
        if self._owners_gone:
            self._forget_those_gone()
        no_keys: list[tuple[Hashable, ...]] = []
        no_work: list[Work] = []
        nothing_before: list[Work] = []
        # Nothing is made in between: garbage that is collected then may flush as well.
        keys, self._keys = self._keys, no_keys
        work, self._work = self._work, no_work
        before, self._before = self._before, nothing_before
        self.failed, self._launched = True, None
        self.launches += 1
        self._launch(tuple(keys), work, before)
        self.failed = False

    def _launch(self, key: Key, work: list[Work], before: list[Work]) -> None:
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._graphs:
                if len(self._graphs) >= self._most:
                    self._forget_the_oldest()
                self._graphs[key] = None
                _run(work)
                return
            _run(before)
            graph = self._graphs[key] = self._device.capture(lambda: _run(work))
        self._replay(graph)

    def _replay(self, graph: Recording) -> None:
        self.newest = self._launched = graph
        self._last_use[id(graph)] = self.launches
        graph.launch()

    def name(self, key: Hashable, note: Any) -> None:
        """Gives what was launched last, if it was a recording, a key of its own and a note."""
        if self._launched is not None:
            self._named[key] = self._launched, note

    def find(self, key: Hashable) -> tuple[Recording, Any] | None:
        """A named recording and its note, if it is still known."""
        return self._named.get(key)

    def replay(self, graph: Recording) -> None:
        """Launches a recording that was found, where nothing is pending."""
        self.failed = True
        self.launches += 1
        self._replay(graph)
        self.failed = False

    def forget(self, owner: object) -> None:
        """Forgets the recordings whose keys hold an object, at the next launch.

        Not at once, as garbage may be collected in any thread, while another one records.
        """
        self._owners_gone.append(owner)

    def _forget_those_gone(self) -> None:
        while self._owners_gone:
            owner = self._owners_gone.popleft()
            self._keep({key for key in self._graphs if not any(owner in piece for piece in key)})

    def _forget_the_oldest(self) -> None:
        """Makes room, and forgets what has run only once as well."""
        self._device.synchronize()  # none of them may be on its way
        uses = {key: self._last_use[id(each)] for key, each in self._graphs.items() if each}
        oldest = sorted(uses, key=uses.__getitem__)[: self._most // 4]
        self._keep(uses.keys() - set(oldest))

    def _keep(self, keys: Set[Key]) -> None:
        self._graphs = {key: each for key, each in self._graphs.items() if key in keys}
        kept = {id(each) for each in self._graphs.values() if each is not None}
        self._named = {key: known for key, known in self._named.items() if id(known[0]) in kept}
        self._last_use = {each: use for each, use in self._last_use.items() if each in kept}

    def clear(self) -> None:
        """Forgets all recordings: they refer to memory that may be given back now."""
        self._device.synchronize()
        self._keep(set())
        self.newest = None


def _run(work: list[Work]) -> None:
    for each in work:
        each()
