"""The engine that services embed: many requests at once on one model."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING

from ojfa_export.backends.backend import PagedCache
from ojfa_export.decoding.exits import check_served
from ojfa_export.decoding.options import GenerationOptions, OptionArguments
from ojfa_export.engine.budget import CacheSize, PageBudget
from ojfa_export.engine.costs import PassCosts
from ojfa_export.engine.launcher import Launched, Launcher, foresee
from ojfa_export.engine.next_step import StepOutput
from ojfa_export.engine.request import Request
from ojfa_export.engine.running import NO_SLOT, Running, asked_exits
from ojfa_export.engine.scheduler import Scheduler, Work
from ojfa_export.engine.slots import Slots
from ojfa_export.engine.stats import Counts, EngineStats
from ojfa_export.engine.wakes import Wakes
from ojfa_export.engine.warm_up import WarmUp, record_kinds
from ojfa_export.errors import BackendError, OjfaError, OverloadedError, UsageError
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import expecting
from ojfa_export.system.arguments import flag, instance, real_number, whole_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

# More run no faster on any machine that is known, and each has a place in the KV cache.
MOST_SEQUENCES = 4096


class Engine:
    """Runs requests of any number of threads and asyncio tasks, batched continuously.

    engine = ojfa_export.Engine(model, max_sequences=16, kv_cache_bytes="2GiB")
    request = engine.submit("def parse(", GenerationOptions(exit="auto", max_new_tokens=64))
    for token in request: ...

    Requests join and leave at any pass. Each has its own exit, policy or speculation; those that
    are confident leave at their exit, the others go on together, and what a token skipped is caught
    up exactly when a later one goes deeper. A request's tokens are those that it gets alone.

    Args:
        model: The opened model. The engine has its own KV cache; sessions may run beside it.
        max_sequences: Requests that run at once.
        kv_cache_bytes: Memory for keys and values, those of blocks behind exits that requests ask
            among them, and for what a draft layer keeps, a number or text such as "4GiB"; by
            default as much as all sequences may need. When it runs out, the youngest request goes
            back to the queue, and nothing of it is lost.
        max_queue: Requests that may wait; one more is refused.
        prefill_tokens: Tokens of a long prompt that run between two steps of other requests; None
            to adapt them so that they take about as long as such a step.
        prefix_cache: Whether what requests leave in the cache serves those that begin alike.

    Raises:
        UsageError: An argument out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int = 16,
        kv_cache_bytes: int | str | None = None,
        max_queue: int = 1024,
        prefill_tokens: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.model = instance("the model", model, Model, hint="ojfa_export.load opens one")
        self.max_sequences = whole_number("max-sequences", max_sequences, 1, MOST_SEQUENCES)
        self._max_queue = whole_number("max-queue", max_queue, 1)
        self._prefix_cache = flag("prefix-cache", prefix_cache)
        self._piece = prefill_tokens
        if prefill_tokens is not None:
            self._piece = whole_number("prefill-tokens", prefill_tokens, 1)
        self._max_length = model.manifest.cache.max_length
        spec, engines, length = model.spec, model.engines, self._max_length + 1
        self._size = CacheSize.of(
            spec, engines, self.max_sequences, length, kv_cache_bytes, model.drafts
        )
        self.wakes = Wakes()  # of its requests' readers
        self._costs = PassCosts(engines.pass_sizes if isinstance(engines, PagedCache) else None)
        self._counts = Counts()
        self._begin()
        self._waiting: deque[Running] = deque()
        self._next_id = 0
        self._closed = False
        # What the engine's thread must see to; it looks at nothing else between most passes.
        self._cancelled = False
        self._first_deadline = math.inf  # or before it
        self._may_admit = False
        self._held = False  # whether it begins nothing while it is idle
        self._recorded: threading.Event | None = None  # set when passes of all kinds have run
        self._record_ways: list[tuple[int, bool]] = []  # each a depth, and whether tokens are drawn
        self._wanted = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ojfa-engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._running)} running"
        return f"<ojfa_export.Engine of {self.model.manifest.model.name}: {state}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def submit(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        **changes: Unpack[OptionArguments],
    ) -> Request:
        """Adds a request; its tokens come from the request.

        Args:
            prompt: Text, or token ids.
            options: How to generate; where no exit is named, at full depth.
            timeout: Seconds until it ends with what it has, the time in the queue included.
            changes: Options by name, in place of those in `options`.

        Raises:
            UsageError: An argument out of range, or a request that never fits the cache.
            OverloadedError: The queue is full; try again later.
            OjfaError: The engine is closed.
        """
        options = GenerationOptions.of(options, changes)
        options = options.completed(self.model.manifest.generation)
        if options.exit is None:
            options = replace(options, exit="full")
        options = self.model.resolve_speculation(options)
        assert options.exit is not None
        options.check_fits(
            self.model.blocks,
            self.model.spec.vocab_size,
            has_layer=self.model.drafts is not None,
            served=self.model.exits,
        )
        exit = self.model.resolve_exit(options.exit)
        ids = self.model.encode(prompt)
        if timeout is not None:
            timeout = real_number("timeout", timeout, 0.0, hint="seconds from now on")
        asks = len(asked_exits(self.model, exit, options.speculation))
        if not self._size.fits(len(ids) + 1, asks):
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the KV cache holds {self._size.tokens(asks)}",
                hint="shorten it, or give the engine more kv-cache-bytes",
            )
        with self._wanted:
            if self._closed:
                raise OjfaError("the engine is closed", hint="make another one")
            if len(self._waiting) >= self._max_queue:
                raise OverloadedError(
                    f"{self._max_queue} requests are waiting already",
                    hint="try again later, or give the engine a larger max-queue",
                )
            request = Request(self, self._next_id, ids, options)
            self._next_id += 1
            deadline = None if timeout is None else time.perf_counter() + timeout
            of = self.model, request, exit, self._max_length, deadline
            self._enqueue(Running.of(*of, together=lambda: max(1, len(self._running))))
        return request

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self._wanted:
            for each in (*self._waiting, *self._running):
                if each.request is request:
                    each.cancelled = self._cancelled = True
            self._wanted.notify()

    def hold(self) -> bool:
        """While idle it begins with nothing until `release`: requests of a burst share a pass.

        Returns:
            Whether it is held; not where requests run, which others join as ever.
        """
        with self._wanted:
            self._held = not self._running
            return self._held

    def release(self) -> None:
        """Ends `hold`."""
        with self._wanted:
            self._held = False
            self._wanted.notify()

    def stats(self) -> EngineStats:
        """What is going on, and what was done."""
        with self._wanted:
            counts = asdict(self._counts)
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                pages_used=self._budget.used,
                pages=self._size.pages,
                **{**counts, "finished": dict(self._counts.finished),
                   "blocks_run": dict(self._counts.blocks_run)},
            )  # fmt: skip

    def warm_up(self, *, sampled: bool = False, exits: Sequence[int] = ()) -> None:
        """Runs passes of all kinds and requests of its own before others come.

        On a device what is done once for each kind takes seconds, which no request should wait
        for; see `engine.warm_up`. They are not counted. Where requests run already, it waits until
        none does.

        Args:
            sampled: Whether requests will sample tokens, whatever their temperatures: kinds of
                passes differ by that alone. Takes as long again.
            exits: At which requests will leave, and others go on; each takes as long again. What
                requests at others need is made with the first of them.

        Raises:
            OjfaError: The engine is closed.
            UsageError: `sampled` is not True or False, or an exit that there is not.
        """
        spec, sampled = self.model.spec, flag("sampled", sampled)
        kinds = (False, True) if sampled else (False,)
        depths = [*(whole_number("exits", exit, 1, spec.blocks - 1) for exit in exits), spec.blocks]
        check_served(depths[:-1], self.model.exits)
        with self._wanted:
            recorded = self._recorded
            if recorded is None and not self._closed:
                recorded = self._recorded = threading.Event()
                self._record_ways = [(depth, each) for depth in depths for each in kinds]
                self._wanted.notify()
        if recorded is not None:
            recorded.wait()
        WarmUp(self.submit, self.max_sequences, self._max_length, spec.vocab_size).run()
        self._counts.clear()

    def close(self) -> None:
        """Cancels what runs and waits, and gives the cache's memory back."""
        with self._wanted:
            self._closed = True
            self._wanted.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _begin(self) -> None:
        """Makes an empty cache."""
        spec = self.model.spec
        self._running: list[Running] = []
        self._untold: list[Running] = []  # whose newest tokens their requests don't know yet
        self._runner = ModelRunner(
            spec,
            self.model.engines,
            self.max_sequences,
            self._max_length + 1,
            pages=self._size.pages,
            drafts=self.model.drafts,
        )
        self._budget = PageBudget(self._size)
        self._slots = Slots(
            self._runner,
            self.max_sequences,
            self._budget,
            self._size,
            self._max_length,
            reuse=self._prefix_cache,
        )
        self._scheduler = Scheduler(spec.blocks, self._costs, self._piece)
        self._launcher = Launcher(self._runner, self._costs, self._counts)
        self._may_admit = True

    def _enqueue(self, each: Running) -> None:
        if not self._waiting:
            self._may_admit = True
        if each.deadline is not None:
            self._first_deadline = min(self._first_deadline, each.deadline)
        self._waiting.append(each)
        if not self._held:
            self._wanted.notify()

    def _run(self) -> None:
        """The engine's thread."""
        while True:
            if not self._running:
                self._tell()
            with self._wanted:
                self._wanted.wait_for(self._has_something)
                self._end_what_is_over()
                if self._recorded is not None and not self._running:
                    self._record_kinds(self._recorded)
                if self._closed:
                    self._slots.clear()
                    return
            try:
                with self._wanted:
                    self._admit()
                drafting = [each for each in self._running if each.step.depth == 0]
                if drafting:
                    drafts = self._launcher.draft(drafting)
                    self._tell()
                    for launched in drafts:
                        self._hand_out(launched)
                    continue
                work = self._scheduler.next(self._running, is_full=self._is_full)
                if work is not None:
                    self._work(work)
            except Exception as error:  # nobody waits for ever, whatever it is
                self._fail_all(error)

    def _has_something(self) -> bool:
        """Whether the engine's thread has something to do; with the lock."""
        may_begin = bool(self._waiting) and not self._held
        return bool(self._closed or may_begin or self._running or self._recorded)

    def _record_kinds(self, recorded: threading.Event) -> None:
        """Runs passes of all kinds, while nothing else runs."""
        engines, self._recorded = self.model.engines, None
        try:
            if isinstance(engines, PagedCache) and not self._closed:
                self._slots.clear()
                for depth, sampled in self._record_ways:
                    kinds = engines.pass_kinds(self.max_sequences, self._max_length)
                    record_kinds(self._runner, kinds, self._size, depth=depth, sampled=sampled)
        except Exception as error:
            self._fail_all(error)
        finally:
            recorded.set()

    def _work(self, work: Work) -> None:
        """Runs what was chosen, and what certainly follows; nothing is on its way afterwards."""
        self._give_pages(work)
        if not work.running:
            return
        launched = self._launcher.launch(work)
        self._tell()  # of the pass before
        while launched:
            following = self._follow(launched) if self._launcher.goes_ahead else []
            for each in launched:
                self._hand_out(each)
            if following:
                self._tell()
            launched = following

    def _follow(self, before: Sequence[Launched]) -> list[Launched]:
        """Launches what runs after passes whose tokens are not known yet, if that is certain.

        A request that ends on its token after all is left one token ahead, which is dropped when
        its slot is given back; the others' are right.
        """
        if self._must_look_up():
            return []
        foreseen = foresee(before)
        if foreseen is None:
            return []
        with self._wanted:
            self._admit()
        ending = {each.running for each in foreseen if each.running.is_at_last_token}
        ahead = [each for each in foreseen if each.running not in ending]
        going = [each for each in self._running if not (each.over or each in ending)]
        if any(each.step.depth == 0 for each in going):
            return []  # drafts are made between passes
        if not all(self._slots.grow(each.running.sequence, 1) for each in ahead):
            return []
        sequences = [each.running.sequence for each in ahead]
        with expecting(sequences, [each.stand_in for each in ahead]):
            for each in ahead:
                each.running.step = each.step
            work = self._scheduler.next(going, is_full=self._is_full)
            if work is None:
                return []
            fits = all(self._slots.grow(each.sequence) for each in work.running)
            if fits:
                return self._launcher.launch(work, before)
        for sequence in sequences:
            sequence.drop_expected()
        return []

    def _hand_out(self, launched: Launched) -> None:
        """Gives the requests of a pass their outputs, as far as they still want them."""
        self._launcher.wait(launched)
        heads, row = launched.heads, 0
        if heads is None:
            return
        with self.wakes.held():
            for each, step in zip(launched.running, launched.steps, strict=True):
                if step is None:
                    continue
                if not each.over:
                    self._hand_on(each, StepOutput(heads, row, step))
                row += step.rows
            if not self._launcher.goes_ahead:
                self._tell()

    def _tell(self) -> None:
        """Tells requests of their new tokens: with a device to drive, while it is busy."""
        untold, self._untold = self._untold, []
        with self.wakes.held():
            for each in untold:
                try:
                    each.tell()
                except OjfaError as error:  # the request's own
                    self._fail(each, error)
                except Exception as error:  # nobody waits for ever, whatever it is
                    self._fail(each, OjfaError(f"no text could be made of its tokens: {error!r}"))

    def _fail(self, each: Running, error: OjfaError) -> None:
        each.fail(error)
        if each in self._running:
            with self._wanted:
                self._leave(each)

    def _hand_on(self, each: Running, output: StepOutput) -> None:
        try:
            emitted = each.advance(output)
        except OjfaError as error:  # the request's own
            self._fail(each, error)
            return
        self._untold.append(each)
        counts = self._counts
        counts.new_tokens += len(emitted)
        for token in emitted:
            counts.blocks_run[token.blocks_run] += 1
            counts.drafted += token.drafted
        if each.over:
            with self._wanted:
                self._leave(each)

    def _give_pages(self, work: Work) -> None:
        """Gives pages to those that run; others make room, or leave the work and wait."""
        if all(self._slots.grow(each.sequence) for each in work.running):
            return
        for each in work.running:
            while each in self._running and not self._slots.grow(each.sequence):
                self._preempt(self._running[-1])
        work.keep([each in self._running for each in work.running])

    def _preempt(self, each: Running) -> None:
        """Sends the youngest back to the queue: it is computed again when there are pages."""
        alone = len(self._running) == 1
        with self._wanted:
            self._running.remove(each)
            self._slots.give_back(each.sequence, keep=False)
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
            self._waiting.appendleft(each)
            self._counts.preemptions += 1

    def _admit(self) -> None:
        """Gives slots to those that wait, in their order.

        Whoever got none is not looked at again before somebody has left, or has come in front.
        """
        while self._waiting and self._may_admit and self._has_slot:
            each = self._waiting[0]
            running = [other.sequence for other in self._running]
            shared = self._slots.take(each.sequence, running)
            if shared is None:
                self._may_admit = False
                return
            self._waiting.popleft()
            self._running.append(each)
            if not each.request.started:
                each.request.started = True
                each.cached_tokens = shared
                self._counts.prompt_tokens += len(each.sequence)
                self._counts.cached_tokens += shared

    @property
    def _has_slot(self) -> bool:
        return len(self._running) < self.max_sequences

    @property
    def _is_full(self) -> bool:
        return bool(self._waiting) and not self._has_slot

    def _must_look_up(self) -> bool:
        """Whether some request may have to end, whatever its tokens are."""
        return self._closed or self._cancelled or time.perf_counter() > self._first_deadline

    def _end_what_is_over(self) -> None:
        """Ends requests that were cancelled or whose time is up; all of them at the end."""
        if not self._must_look_up():
            return
        now = time.perf_counter()
        for each in [*self._running, *self._waiting]:
            late = each.deadline is not None and now > each.deadline
            if not (each.cancelled or late or self._closed):
                continue
            each.finish("timeout" if late and not each.cancelled else "cancelled")
            if each in self._running:
                self._leave(each)
            else:
                self._waiting.remove(each)
                self._may_admit = True
                self._counts.finished[each.reason or "error"] += 1
        self._cancelled = False
        left = [each.deadline for each in (*self._running, *self._waiting)]
        self._first_deadline = min((each for each in left if each is not None), default=math.inf)

    def _leave(self, each: Running) -> None:
        """Takes the slot of a request that has ended."""
        self._running.remove(each)
        self._slots.give_back(each.sequence, keep=True)
        self._may_admit = True
        self._counts.finished[each.reason or "error"] += 1

    def _end(self, each: Running, error: OjfaError) -> None:
        each.fail(error)
        self._counts.finished["error"] += 1

    def _fail_all(self, error: Exception) -> None:
        """The model could not run: every request that had a slot fails, and the engine goes on."""
        message = str(error) if isinstance(error, OjfaError) else repr(error)
        failure = BackendError(
            f"the model could not run, and every running request failed: {message}",
            hint="the engine goes on with an empty cache; see 'ojfa-export doctor'",
        )
        self._tell()  # those that ended before
        with self._wanted:
            failed, self._running = self._running, []
            for each in failed:
                self._end(each, failure)
            self._begin()
