"""The Python interface to a bundle."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from typing_extensions import Unpack

from ojfa_export import backends
from ojfa_export.backends.backend import RecordsSteps
from ojfa_export.backends.block_jump import check_runs_jump
from ojfa_export.backends.checks import check_runs_checks
from ojfa_export.backends.precisions import check_precision
from ojfa_export.backends.quantised import check_runs
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Manifest
from ojfa_export.bundle.names import TOKENIZER
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.events import Listener
from ojfa_export.decoding.exits import resolve_exit
from ojfa_export.decoding.options import ExitChoice, GenerationOptions, OptionArguments
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.prompts import Prompts, listed_prompts
from ojfa_export.errors import BundleError, UsageError
from ojfa_export.models import tokenizer
from ojfa_export.models.chat_template import Message
from ojfa_export.runtime.block_jump import open_block_jump
from ojfa_export.runtime.chat import Chat, open_chat
from ojfa_export.runtime.disagreement import DEFAULT_FALSE_ALARMS, DisagreementMonitor
from ojfa_export.runtime.draft_layer import needs_draft, open_draft, with_exit
from ojfa_export.runtime.generation import (
    Completion,
    Generation,
    Settings,
    Token,
    collect,
    generate_tokens,
    monitored,
)
from ojfa_export.runtime.last_session import ROOM, LastSession
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.runtime.prompts import PromptEncoder
from ojfa_export.runtime.session import Session
from ojfa_export.system.arguments import (
    flag,
    instance,
    is_whole,
    real_number,
    shown,
    text,
    whole_number,
    wrong,
)
from ojfa_export.system.heap import trim_heap


class Model:
    """An opened bundle.

    Blocks are loaded when a token first needs them, so that those past a fixed exit never are.
    Sessions and generations are independent; a model may be shared by threads, a session not.

    Args:
        bundle: A checked bundle.
        backend: Which of its engines to run.
    """

    def __init__(self, bundle: Bundle, backend: str = backends.DEFAULT) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        self.spec = manifest.model.spec
        self.tokenizer = _read_tokenizer(bundle)
        trim_heap()  # reading a tokenizer takes as much again as it keeps, 20 MB of 49,152 tokens
        self._prompts = PromptEncoder(
            self.tokenizer, self.spec.vocab_size, manifest.cache.max_length
        )
        opener = backends.load(backend)  # first: an unknown name is no missing engine
        check_runs(opener, manifest.weights, manifest.precision)
        check_precision(opener, manifest.precision)
        check_runs_checks(opener, manifest.check.size if manifest.check else 0)
        check_runs_jump(opener, manifest.shortcut.exits)
        built = bundle.engines(backend)
        opener.check(built.built_with)
        tables = manifest.rotary
        rotary = (bundle.tensor(tables.cos), bundle.tensor(tables.sin)) if tables else None
        engines = bundle.engine_files(backend)
        self.engines = opener.open_engines(self.spec, bundle.graphs, engines, rotary, bundle.files)
        open_block_jump(bundle, opener, self.engines, engines)
        self.drafts = open_draft(bundle, opener, self.engines)
        self._backend = opener
        self._last = LastSession()

    def __repr__(self) -> str:
        model = self.manifest.model
        return f"<ojfa_export.Model {model.name}: {model.spec.family}, {self.blocks} blocks>"

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def blocks(self) -> int:
        """Blocks of the model, which "full" runs all of."""
        return self.spec.blocks

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits before the last block that there are: all, or those that its jump serves."""
        return self.manifest.shortcut.exits or tuple(range(1, self.blocks))

    def session(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        monitor: Monitor | None = None,
        drafts: bool = False,
    ) -> Session:
        """Starts sequences that the caller advances by itself.

        Args:
            batch_size: Sequences.
            max_length: Tokens that each may hold; default: what the bundle was built for.
            monitor: Chooses tokens for shadow checks: call `Session.run_shadow_checks` when
                there is time, and `Monitor.finish` at the end of the requests.
            drafts: Whether the bundle's draft layer drafts for them: see `Session.propose`. States
                that it sees are then kept of every token.

        Raises:
            UsageError: More than the bundle was built for, or it has no draft layer.
            BackendError: The backend does not run draft layers.
            BundleError: Somebody has written into the bundle's files since they were checked.
        """
        self.bundle.files.check_in_place()
        self._last.drop()
        cache = self.manifest.cache
        length = cache.max_length if max_length is None else max_length
        batch_size = _within("batch size", batch_size, cache.max_batch_size)
        length = _within("cache length", length, cache.max_length)
        layer = None
        if flag("drafts", drafts):
            layer = needs_draft(self.bundle, self._backend, self.drafts)
        if monitor is None:
            return Session(self.spec, self.engines, batch_size, length, drafts=layer)
        shadow = instance("the monitor", monitor, Monitor).shadow()
        session = Session(self.spec, self.engines, batch_size, length, shadow, layer)
        monitor.watch(session)
        return session

    def monitor(
        self,
        share: float = 0.1,
        *,
        false_alarms: float = DEFAULT_FALSE_ALARMS,
        on_event: Listener | None = None,
        seed: int | None = None,
    ) -> Monitor:
        """Starts to watch the bundle's promise; give it to `generate`, `stream` or `session`.

        Args:
            share: The probability that a token is chosen to be compared with the full model, when
                its request has ended.
            false_alarms: The probability that it ever raises an alarm while the promise is kept.
            on_event: Called with each `ExitTaken`, `DraftChecked` and `ShadowCheck`.
            seed: Of the choice of tokens; None for another one every time.

        Raises:
            UsageError: A share or a probability out of range.
            BundleError: The bundle has no promise.
        """
        promise = self.manifest.promise
        if promise is None:
            raise BundleError(
                f"{self.bundle.directory} has no promise to watch",
                hint="build it with --max-disagreement, or count without one: Monitor(share)",
            )
        return Monitor(
            share, DisagreementMonitor(promise, false_alarms), on_event=on_event, seed=seed
        )

    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions | None = None,
        *,
        monitor: Monitor | None = None,
        domain: str | None = None,
        **changes: Unpack[OptionArguments],
    ) -> Generation:
        """Generates for one prompt or a batch of them.

        Args:
            prompts: Text or token ids before the generated text; or a list of these.
            options: How to generate.
            monitor: Takes each prompt as a request; its shadow checks run after the last token,
                and a stream must be read to its end for that.
            domain: Of the prompts, one of the promise's; None where it isn't known.
            changes: Options by name, in place of those in `options`: see `GenerationOptions`.

        Raises:
            UsageError: An argument out of range, an empty prompt, or one too long for the cache.
            BundleError: "auto", of a bundle that has no policy.
        """
        encoded, settings = self._begin(prompts, options, changes, monitor, domain)
        return collect(encoded, self._tokens(encoded, settings))

    def stream(
        self,
        prompts: Prompts,
        options: GenerationOptions | None = None,
        *,
        monitor: Monitor | None = None,
        domain: str | None = None,
        **changes: Unpack[OptionArguments],
    ) -> Iterator[Token]:
        """Generates as `generate` does, and gives each token when it is known."""
        encoded, settings = self._begin(prompts, options, changes, monitor, domain)
        return self._tokens(encoded, settings)

    def encode(self, prompt: str | Sequence[int], *, special: bool = True) -> list[int]:
        """A prompt's token ids.

        Args:
            prompt: Text; token ids are only checked.
            special: Whether special tokens that are written out in the text become such; False
                for text of somebody who must not write them.

        Raises:
            UsageError: It has none, too many for the cache, or one outside the model.
            OjfaError: The tokenizer fails on it.
        """
        return self._prompts.encode(prompt, special=flag("special", special))

    @cached_property
    def chats(self) -> Chat:
        """Makes prompts of chats, by the checkpoint's chat template.

        Raises:
            BundleError: The bundle has none.
        """
        return open_chat(self.bundle, self.tokenizer)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a chat, as transformers' `apply_chat_template` gives it.

        Args:
            messages: Each with a "role", mostly a "content", and what else the template reads.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: Whether the text ends where the assistant's answer begins.
            variables: What else the template reads, such as `enable_thinking`.

        Raises:
            BundleError: The bundle has no chat template.
            UsageError: A chat that the template doesn't take.
        """
        return self.chats.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def chat(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **changes: Unpack[OptionArguments],
    ) -> Completion:
        """The assistant's answer to a chat.

        Special tokens that are written out in messages are text, not tokens; the answer ends where
        the template ends the assistant's turn, or at the model's end of text.

        Args:
            messages: As of `render`.
            options: How to generate.
            tools: As of `render`.
            variables: What else the template reads.
            changes: Options by name, in place of those in `options`: see `GenerationOptions`.

        Raises:
            BundleError: The bundle has no chat template.
            UsageError: A chat that the template doesn't take, or an argument out of range.
        """
        ids = self.chats.encode(messages, tools=tools, **(variables or {}))
        asked = self.chats.ending(GenerationOptions.of(options, changes))
        return self.generate([ids], asked).prompts[0]

    def auto_policy(self) -> ExitPolicy:
        """The policy behind the exit "auto".

        Raises:
            BundleError: The bundle has none.
        """
        if self.manifest.auto is None:
            raise BundleError(
                f"{self.bundle.directory} has no exit policy for 'auto'",
                hint="build it with --max-disagreement, or give a fixed exit or an ExitPolicy",
            )
        return self.manifest.auto

    def default(self, prompts: int = 1, temperature: float = 0.0) -> Default | None:
        """What is done where neither an exit nor speculation is asked for.

        Args:
            prompts: How many run together.
            temperature: Of sampling.

        Returns:
            What the build planned; None, which is full depth, where it planned nothing, for a
            batch, for sampling, and where it planned to draft with a draft layer, which this
            backend doesn't run.
        """
        prompts = whole_number("prompts", prompts, 0)
        temperature = real_number("temperature", temperature, 0.0)
        planned = self.manifest.default
        if planned is not None and planned.speculation is not None and self.drafts is None:
            planned = planned if planned.speculation.exit else None
        return planned if prompts == 1 and temperature == 0 else None

    def resolve_exit(self, exit: ExitChoice) -> int | ExitPolicy:
        """Blocks to run for an exit, or the policy that decides.

        Raises:
            UsageError: An exit outside the model.
            BundleError: "auto", of a bundle that has no policy.
        """
        if isinstance(exit, str) and exit == "auto":
            return self.auto_policy()
        if isinstance(exit, ExitPolicy):
            exit.check_fits(self.blocks, self.exits)
            return exit
        return resolve_exit(exit, self.blocks, self.exits)

    def resolve_speculation(self, options: GenerationOptions) -> GenerationOptions:
        """The options with speculation's own left out values: the exit, and what a draft costs.

        Raises:
            UsageError: An exit that can't draft.
            BackendError: The backend does not run draft layers.
        """
        speculation = options.speculation
        if speculation is None:
            return options
        if speculation.exit == 0:
            needs_draft(self.bundle, self._backend, self.drafts)
        has_layer = self.drafts is not None
        return replace(
            options,
            speculate=with_exit(speculation, self.manifest, has_layer=has_layer),
        )

    def _begin(
        self,
        prompts: Prompts,
        options: GenerationOptions | None,
        changes: OptionArguments,
        monitor: Monitor | None,
        domain: str | None,
    ) -> tuple[list[list[int]], Settings]:
        """Token ids of the prompts, and options with defaults resolved."""
        resolved = GenerationOptions.of(options, changes)
        encoded = [self.encode(prompt) for prompt in listed_prompts(prompts)]
        settings = self._settings(resolved, len(encoded))
        return encoded, monitored(settings, monitor, domain)

    def _settings(self, options: GenerationOptions, prompts: int) -> Settings:
        options = self.resolve_speculation(self.resolve_default(options, prompts))
        has_layer = self.drafts is not None
        options.check_fits(
            self.blocks,
            self.spec.vocab_size,
            has_layer=has_layer,
            served=self.exits,
        )
        assert options.exit is not None
        exit = self.resolve_exit(options.exit)
        if options.speculation is not None and options.needs_logits:
            raise UsageError(
                "log probabilities can't be combined with speculation here",
                hint="leave out one of them",
            )
        self.engines.load_blocks(exit if isinstance(exit, int) else self.blocks)
        return Settings(
            exit="full" if exit == self.blocks else exit,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            stop=tuple(options.stop),
            eos_token_ids=() if options.ignore_eos else self.spec.eos_token_ids,
            speculation=options.speculation,
            options=options if options.needs_logits else None,
            stop_token_ids=tuple(options.stop_token_ids),
        )

    def resolve_default(self, options: GenerationOptions, prompts: int = 1) -> GenerationOptions:
        """The options, with the bundle's own values, and what the build planned without an exit.

        Args:
            options: As asked.
            prompts: How many run together.

        Raises:
            UsageError: The bundle's values can't be combined with what was asked.
        """
        options = options.completed(self.manifest.generation)
        if options.exit is not None:
            return options
        default = None
        if not options.speculate and not options.needs_logits:
            default = self.default(prompts, options.sampling.temperature)
        if default is None:
            return replace(options, exit="full")
        return replace(options, exit=default.exit, speculate=default.speculation or False)

    def _tokens(self, encoded: list[list[int]], settings: Settings) -> Iterator[Token]:
        if not encoded:
            raise UsageError("no prompt was given")
        longest = max(map(len, encoded)) + settings.max_new_tokens
        length = min(longest, self.manifest.cache.max_length)
        speculation = settings.speculation
        drafts = speculation is not None and speculation.exit == 0
        if settings.monitor is None and isinstance(self.engines, RecordsSteps):
            return self._tokens_of_last(encoded, length, settings, drafts=drafts)
        session = self.session(len(encoded), length, monitor=settings.monitor, drafts=drafts)
        return generate_tokens(session, encoded, self.tokenizer, settings)

    def _tokens_of_last(
        self, encoded: list[list[int]], length: int, settings: Settings, *, drafts: bool
    ) -> Iterator[Token]:
        """The same with the session of the last generation, if that fits, or kept for the next."""
        self.bundle.files.check_in_place()
        session = self._last.take(len(encoded), length, drafts)
        if session is None:
            room = min(-(-length // ROOM) * ROOM, self.manifest.cache.max_length)
            session = self.session(len(encoded), room, drafts=drafts)
        tokens = generate_tokens(session, encoded, self.tokenizer, settings)
        return self._last.kept_after(session, tokens)


def load(bundle: str | Path, *, backend: str = backends.DEFAULT) -> Model:
    """Opens a bundle.

    Args:
        bundle: Its directory. Every file is checked against the manifest's digests.
        backend: Which of its engines to run.

    Raises:
        BundleError: The bundle is incomplete or altered, or has no engines for the backend.
        BackendError: The backend doesn't work here.
    """
    if not isinstance(bundle, str | os.PathLike):
        raise wrong("a bundle", "the path of its directory", bundle)
    return Model(Bundle(Path(bundle)), text("a backend", backend))


def _within(what: str, value: int, limit: int) -> int:
    if not is_whole(value) or not 1 <= value <= limit:
        raise UsageError(
            f"{what} {shown(value)} is outside this bundle's 1..{limit}",
            hint=f"build it with a larger --max-{what.replace(' ', '-')}",
        )
    return operator.index(value)


def _read_tokenizer(bundle: Bundle) -> Tokenizer:
    path, text = bundle.directory / TOKENIZER, bundle.read(TOKENIZER)
    try:
        return tokenizer.parse(text)
    except ValueError as error:
        raise BundleError(
            f"{path} can't be read: {error}", hint="build the bundle again"
        ) from error
