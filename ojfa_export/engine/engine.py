"""The engine that services embed: many requests at once on one model."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING

from ojfa_export.backends.backend import PagedCache
from ojfa_export.decoding.exits import check_served
from ojfa_export.decoding.options import GenerationOptions, OptionArguments
from ojfa_export.engine.admission import Admission
from ojfa_export.engine.budget import CacheSize, PageBudget
from ojfa_export.engine.costs import PassCosts
from ojfa_export.engine.launcher import Launched, Launcher, foresee
from ojfa_export.engine.next_step import StepOutput
from ojfa_export.engine.request import Request
from ojfa_export.engine.running import Running, asked_exits
from ojfa_export.engine.scheduler import Scheduler, Work
from ojfa_export.engine.slots import Slots
from ojfa_export.engine.stats import Counts, EngineStats
from ojfa_export.engine.wakes import Wakes
from ojfa_export.engine.warm_up import WarmUp, record_kinds
from ojfa_export.errors import BackendError, OjfaError, UsageError
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
        most_waiting = whole_number("max-queue", max_queue, 1)
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
        self._admission = Admission(
            self._begin(), self._size, self.max_sequences, most_waiting, self._counts
        )
        self._recorded: threading.Event | None = None  # set when passes of all kinds have run
        self._record_ways: list[tuple[int, bool]] = []  # each a depth, and whether tokens are drawn
        self._thread = threading.Thread(target=self._run, name="ojfa-engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        admission = self._admission
        state = "closed" if admission.closed else f"{len(admission.running)} running"
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
        deadline = None if timeout is None else time.perf_counter() + timeout

        def make(number: int) -> Running:
            request = Request(self, number, ids, options)
            of = self.model, request, exit, self._max_length, deadline
            return Running.of(*of, together=lambda: max(1, len(self._admission.running)))

        return self._admission.put(make)

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        self._admission.cancel(request)

    def hold(self) -> bool:
        """While idle it begins with nothing until `release`: requests of a burst share a pass.

        Returns:
            Whether it is held; not where requests run, which others join as ever.
        """
        return self._admission.hold()

    def release(self) -> None:
        """Ends `hold`."""
        self._admission.release()

    def stats(self) -> EngineStats:
        """What is going on, and what was done."""
        admission = self._admission
        with admission.changed:
            counts = asdict(self._counts)
            return EngineStats(
                running=len(admission.running),
                waiting=len(admission.waiting),
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
        with self._admission.changed:
            recorded = self._recorded
            if recorded is None and not self._admission.closed:
                recorded = self._recorded = threading.Event()
                self._record_ways = [(depth, each) for depth in depths for each in kinds]
                self._admission.changed.notify()
        if recorded is not None:
            recorded.wait()
        WarmUp(self.submit, self.max_sequences, self._max_length, spec.vocab_size).run()
        self._counts.clear()

    def close(self) -> None:
        """Cancels what runs and waits, and gives the cache's memory back."""
        self._admission.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _begin(self) -> Slots:
        """Makes an empty cache, and gives its slots."""
        spec = self.model.spec
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
        slots = Slots(
            self._runner,
            self.max_sequences,
            self._budget,
            self._size,
            self._max_length,
            reuse=self._prefix_cache,
        )
        self._scheduler = Scheduler(spec.blocks, self._costs, self._piece)
        self._launcher = Launcher(self._runner, self._costs, self._counts)
        return slots

    def _run(self) -> None:
        """The engine's thread."""
        admission = self._admission
        while True:
            if not admission.running:
                self._tell()
            with admission.changed:
                admission.changed.wait_for(self._has_something)
                admission.end_what_is_over()
                if self._recorded is not None and not admission.running:
                    self._record_kinds(self._recorded)
                if admission.closed:
                    admission.slots.clear()
                    return
            try:
                admission.admit()
                drafting = [each for each in admission.running if each.step.depth == 0]
                if drafting:
                    drafts = self._launcher.draft(drafting)
                    self._tell()
                    for launched in drafts:
                        self._hand_out(launched)
                    continue
                work = self._scheduler.next(admission.running, is_full=admission.is_full)
                if work is not None:
                    self._work(work)
            except Exception as error:  # nobody waits for ever, whatever it is
                self._fail_all(error)

    def _has_something(self) -> bool:
        """Whether the engine's thread has something to do; with the lock."""
        return self._admission.closed or self._admission.has_work or self._recorded is not None

    def _record_kinds(self, recorded: threading.Event) -> None:
        """Runs passes of all kinds, while nothing else runs."""
        engines, self._recorded = self.model.engines, None
        try:
            if isinstance(engines, PagedCache) and not self._admission.closed:
                self._admission.slots.clear()
                for depth, sampled in self._record_ways:
                    kinds = engines.pass_kinds(self.max_sequences, self._max_length)
                    record_kinds(self._runner, kinds, self._size, depth=depth, sampled=sampled)
        except Exception as error:
            self._fail_all(error)
        finally:
            recorded.set()

    def _work(self, work: Work) -> None:
        """Runs what was chosen, and what certainly follows; nothing is on its way afterwards."""
        self._admission.give_pages(work)
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
        admission = self._admission
        if admission.must_look_up:
            return []
        foreseen = foresee(before)
        if foreseen is None:
            return []
        admission.admit()
        ending = {each.running for each in foreseen if each.running.is_at_last_token}
        ahead = [each for each in foreseen if each.running not in ending]
        going = [each for each in admission.running if not (each.over or each in ending)]
        if any(each.step.depth == 0 for each in going):
            return []  # drafts are made between passes
        if not all(admission.slots.grow(each.running.sequence, 1) for each in ahead):
            return []
        sequences = [each.running.sequence for each in ahead]
        with expecting(sequences, [each.stand_in for each in ahead]):
            for each in ahead:
                each.running.step = each.step
            work = self._scheduler.next(going, is_full=admission.is_full)
            if work is None:
                return []
            fits = all(admission.slots.grow(each.sequence) for each in work.running)
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
        if each in self._admission.running:
            self._admission.leave(each)

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
            self._admission.leave(each)

    def _fail_all(self, error: Exception) -> None:
        """The model could not run: every request that had a slot fails, and the engine goes on."""
        message = str(error) if isinstance(error, OjfaError) else repr(error)
        failure = BackendError(
            f"the model could not run, and every running request failed: {message}",
            hint="the engine goes on with an empty cache; see 'ojfa-export doctor'",
        )
        self._tell()  # those that ended before
        with self._admission.changed:
            self._admission.fail_all(failure)
            self._admission.begin(self._begin())
