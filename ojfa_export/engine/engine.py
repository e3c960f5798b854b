"""The engine that services embed: many requests at once on one model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING

from ojfa_export.decoding.head_output import HeadRequest, HostHeadOutput
from ojfa_export.decoding.options import GenerationOptions, OptionArguments
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.engine.asks import Answer, Decoder, Heads
from ojfa_export.engine.budget import PAGE_TOKENS, PageBudget, page_bytes, pages_of, read_bytes
from ojfa_export.engine.costs import PassCosts
from ojfa_export.engine.request import FinishReason, Request
from ojfa_export.engine.running import Running
from ojfa_export.engine.scheduler import Scheduler, Work
from ojfa_export.engine.slots import Slots
from ojfa_export.engine.stats import Counts, EngineStats
from ojfa_export.errors import BackendError, OjfaError, OverloadedError, UsageError
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence as TokenSequence
from ojfa_export.runtime.text import TextStream
from ojfa_export.system.arguments import flag, instance, real_number, whole_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

NO_SLOT = -1
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
        kv_cache_bytes: Memory for keys and values, a number or text such as "4GiB"; by default as
            much as all sequences may need. When it runs out, the youngest request goes back to the
            queue, and nothing of it is lost.
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
        self._eos = frozenset(model.spec.eos_token_ids)
        pages = self.max_sequences * pages_of(self._max_length + 1)
        if kv_cache_bytes is not None:
            pages = min(pages, read_bytes(kv_cache_bytes) // page_bytes(model.spec))
        if not pages:
            raise UsageError(
                f"kv-cache-bytes {kv_cache_bytes!r} holds no page of {PAGE_TOKENS} tokens",
                hint=f"a page takes {page_bytes(model.spec)} bytes",
            )
        self._pages = pages
        self._costs = PassCosts()
        self._counts = Counts()
        self._begin()
        self._waiting: deque[Running] = deque()
        self._next_id = 0
        self._closed = False
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
        if options.exit is None:
            options = replace(options, exit="full")
        assert options.exit is not None
        options.check_fits(self.model.blocks, self.model.spec.vocab_size)
        exit = self.model.resolve_exit(options.exit)
        ids = self.model.encode(prompt)
        if timeout is not None:
            timeout = real_number("timeout", timeout, 0.0, hint="seconds from now on")
        if pages_of(len(ids) + 1) > self._pages:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the KV cache holds {self._pages * PAGE_TOKENS}",
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
            self._waiting.append(self._running_of(request, options, exit, timeout))
            self._wanted.notify()
        return request

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self._wanted:
            for each in (*self._waiting, *self._running):
                if each.request is request:
                    each.cancelled = True
            self._wanted.notify()

    def stats(self) -> EngineStats:
        """What is going on, and what was done."""
        with self._wanted:
            counts = asdict(self._counts)
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                pages_used=self._budget.used,
                pages=self._pages,
                **{**counts, "finished": dict(self._counts.finished),
                   "blocks_run": dict(self._counts.blocks_run)},
            )  # fmt: skip

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
        self._runner = ModelRunner(
            spec, self.model.engines, self.max_sequences, self._max_length + 1
        )
        self._budget = PageBudget(self._pages)
        self._slots = Slots(
            self._runner.executor,
            self.max_sequences,
            self._budget,
            self._max_length,
            reuse=self._prefix_cache,
        )
        self._scheduler = Scheduler(spec.blocks, self._costs, self._piece)

    def _running_of(
        self,
        request: Request,
        options: GenerationOptions,
        exit: int | ExitPolicy,
        timeout: float | None,
    ) -> Running:
        spec, prompt = self.model.spec, request.prompt_token_ids
        eos = frozenset() if options.ignore_eos else self._eos
        sequence = TokenSequence(NO_SLOT, spec.blocks, spec.rotary_switch)
        sequence.append(list(prompt))
        decoder = Decoder(sequence, options, exit, spec.blocks, self._max_length, eos)
        text = TextStream(self.model.tokenizer, options.stop, prompt)
        deadline = None if timeout is None else time.perf_counter() + timeout
        return Running(request, sequence, decoder, text, eos, self._max_length, deadline)

    def _run(self) -> None:
        """The engine's thread."""
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._closed or self._waiting or self._running)
                self._end_what_is_over()
                if self._closed:
                    return
            try:
                with self._wanted:
                    self._admit()
                work = self._scheduler.next(self._running)
                if work is not None:
                    self._work(work)
            except Exception as error:  # nobody waits for ever, whatever it is
                self._fail_all(error)

    def _work(self, work: Work) -> None:
        running, stops = self._with_pages(work)
        if not running:
            return
        answered = [
            each.ask.depth == work.depth and stop == len(each.sequence)
            for each, stop in zip(running, stops, strict=True)
        ]
        counts = [
            each.ask.count if wanted else 0 for each, wanted in zip(running, answered, strict=True)
        ]
        start = time.perf_counter()
        tokens = self._count(running, work.depth, stops)
        heads = self._ask(running, work.depth, counts, stops)
        self._costs.learn(tokens, time.perf_counter() - start, work.depth - work.entry)
        at = 0
        for each, count in zip(running, counts, strict=True):
            if count:
                assert heads is not None
                self._answer(each, Answer(heads, slice(at, at + count)))
                at += count

    def _ask(
        self, running: Sequence[Running], depth: int, counts: Sequence[int], stops: Sequence[int]
    ) -> Heads | None:
        """Runs sequences to a depth, and asks the head there about those that want an answer."""
        sequences = [each.sequence for each in running]
        with_logits = any(each.ask.logits and c for each, c in zip(running, counts, strict=True))
        if not with_logits and all(count == 1 for count in counts):
            # One token of each, as a rule: a device has a short way for that.
            return Heads(self._runner.choose(sequences, depth, HeadRequest()))
        hidden = self._runner.run(sequences, depth, counts, stops=stops)
        if not sum(counts):
            return None
        engines = self.model.engines
        if with_logits:
            return Heads(HostHeadOutput(engines.logits(hidden, depth), HeadRequest()))
        return Heads(engines.choose(hidden, depth, HeadRequest()))

    def _answer(self, each: Running, answer: Answer) -> None:
        try:
            emitted = each.answer(answer)
        except OjfaError as error:  # the request's own
            each.request.end(None, error)
            emitted = []
        counts = self._counts
        counts.new_tokens += len(emitted)
        for token in emitted:
            counts.blocks_run[token.blocks_run] += 1
            counts.drafted += token.drafted
        if each.request.done:
            with self._wanted:
                self._leave(each)

    def _count(self, running: Sequence[Running], depth: int, stops: Sequence[int]) -> int:
        """Tokens that the deepest block of a pass runs; counts them."""
        tokens = late = 0
        for each, stop in zip(running, stops, strict=True):
            marks = each.sequence.marks
            tokens += stop - marks[depth - 1]
            late += max(0, min(stop, marks[0]) - marks[depth - 1] - 1)
        self._counts.passes += 1
        self._counts.pass_tokens += tokens
        self._counts.catch_up_tokens += late
        return tokens

    def _with_pages(self, work: Work) -> tuple[list[Running], list[int]]:
        """The work of those that have pages for their tokens; others make room or wait."""
        for each in work.running:
            while each in self._running and not self._slots.grow(each.sequence):
                self._preempt(self._running[-1])
        both = [
            (each, stop)
            for each, stop in zip(work.running, work.stops, strict=True)
            if each in self._running
        ]
        return [each for each, _ in both], [stop for _, stop in both]

    def _preempt(self, each: Running) -> None:
        """Sends the youngest back to the queue: it is computed again when there are pages."""
        with self._wanted:
            if len(self._running) == 1:
                self._running.remove(each)
                self._slots.give_back(each.sequence, keep=False)
                error = OjfaError(
                    f"the request needs more than the {self._pages * PAGE_TOKENS} tokens of the KV "
                    "cache",
                    hint="give the engine more kv-cache-bytes, or ask for fewer tokens",
                )
                self._end(each, None, error)
                return
            self._running.remove(each)
            self._slots.give_back(each.sequence, keep=False)
            each.sequence.marks.lower_to(0)
            each.sequence.slot = NO_SLOT
            self._waiting.appendleft(each)
            self._counts.preemptions += 1

    def _admit(self) -> None:
        """Gives slots to those that wait, in their order."""
        while self._waiting and len(self._running) < self.max_sequences:
            each = self._waiting[0]
            running = [other.sequence for other in self._running]
            shared = self._slots.take(each.sequence, running)
            if shared is None:
                return
            self._waiting.popleft()
            self._running.append(each)
            if not each.request.started:
                each.request.started = True
                each.cached_tokens = shared
                self._counts.prompt_tokens += len(each.sequence)
                self._counts.cached_tokens += shared

    def _end_what_is_over(self) -> None:
        """Ends requests that were cancelled or whose time is up; all of them at the end."""
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
                self._counts.finished[each.request.finish_reason or "error"] += 1

    def _leave(self, each: Running) -> None:
        """Takes the slot of a request that has ended."""
        self._running.remove(each)
        self._slots.give_back(each.sequence, keep=True)
        self._counts.finished[each.request.finish_reason or "error"] += 1

    def _end(self, each: Running, reason: FinishReason | None, error: OjfaError | None) -> None:
        each.request.end(reason, error)
        each.close()
        self._counts.finished[reason or "error"] += 1

    def _fail_all(self, error: Exception) -> None:
        """The model could not run: every request that had a slot fails, and the engine goes on."""
        message = str(error) if isinstance(error, OjfaError) else repr(error)
        failure = BackendError(
            f"the model could not run, and every running request failed: {message}",
            hint="the engine goes on with an empty cache; see 'ojfa-export doctor'",
        )
        with self._wanted:
            failed, self._running = self._running, []
            for each in failed:
                self._end(each, None, failure)
            self._begin()
