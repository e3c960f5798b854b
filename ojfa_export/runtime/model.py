"""The Python interface to a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from ojfa_export import backends, tokenizer
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Manifest
from ojfa_export.bundle.names import TOKENIZER
from ojfa_export.errors import BundleError, UsageError
from ojfa_export.guarantee.monitor import DEFAULT_FALSE_ALARMS, DisagreementMonitor
from ojfa_export.runtime.default import Default
from ojfa_export.runtime.events import Listener
from ojfa_export.runtime.generation import Generation, Settings, Token, collect, generate_tokens
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.runtime.sampling import Sampling
from ojfa_export.runtime.session import Exit, Session, resolve_exit
from ojfa_export.runtime.speculation import Speculation

# A fixed exit, a policy that decides for each token, or "auto", the bundle's own policy.
ExitChoice = Exit | Literal["auto"] | ExitPolicy


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
        opener = backends.load(backend)  # first: an unknown name is no missing engine
        built = bundle.engines(backend)
        opener.check(built.built_with)
        tables = manifest.rotary
        rotary = (bundle.tensor(tables.cos), bundle.tensor(tables.sin)) if tables else None
        directory = bundle.files.directory
        engines = {name: directory / file for name, file in built.files.items()}
        self.engines = opener.open_engines(self.spec, bundle.graphs, engines, rotary, bundle.files)

    def __repr__(self) -> str:
        model = self.manifest.model
        return f"<ojfa_export.Model {model.name}: {model.spec.family}, {self.blocks} blocks>"

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def blocks(self) -> int:
        """Blocks of the model: exits are 1 to this, or "full"."""
        return self.spec.blocks

    def session(
        self, batch_size: int = 1, max_length: int | None = None, *, monitor: Monitor | None = None
    ) -> Session:
        """Starts sequences that the caller advances by itself.

        Args:
            batch_size: Sequences.
            max_length: Tokens that each may hold; default: what the bundle was built for.
            monitor: Chooses tokens for shadow checks: call `Session.run_shadow_checks` when
                there is time, and `Monitor.finish` at the end of the requests.

        Raises:
            UsageError: More than the bundle was built for.
            BundleError: Somebody has written into the bundle's files since they were checked.
        """
        self.bundle.files.check_in_place()
        cache = self.manifest.cache
        length = cache.max_length if max_length is None else max_length
        for value, limit, what in (
            (batch_size, cache.max_batch_size, "batch size"),
            (length, cache.max_length, "cache length"),
        ):
            if not 1 <= value <= limit:
                raise UsageError(
                    f"{what} {value} is outside this bundle's 1..{limit}",
                    hint=f"build it with a larger --max-{what.replace(' ', '-')}",
                )
        if monitor is None:
            return Session(self.spec, self.engines, batch_size, length)
        session = Session(self.spec, self.engines, batch_size, length, monitor.shadow())
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
        prompts: str | Sequence[str],
        *,
        exit: ExitChoice | None = None,
        speculate: bool | Speculation = False,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        monitor: Monitor | None = None,
        domain: str | None = None,
    ) -> Generation:
        """Generates for one prompt or a batch of them.

        Args:
            prompts: Text before the generated text.
            exit: Blocks to run for each token, or "full"; "auto" decides for each token by the
                policy in the bundle, an `ExitPolicy` by that. None takes `default`.
            speculate: Whether, or how, to draft at an exit and check with the remaining blocks:
                the tokens are those of full depth (sampled ones: their distribution).
            max_new_tokens: Tokens at most for each prompt.
            temperature: 0 for greedy decoding.
            top_k: Sample among this many most likely tokens.
            top_p: Sample among the fewest tokens with this much probability.
            seed: Of sampling.
            stop: Strings that end a text.
            monitor: Takes each prompt as a request; its shadow checks run after the last token,
                and a stream must be read to its end for that.
            domain: Of the prompts, one of the promise's; None where it isn't known.

        Raises:
            UsageError: An argument out of range, an empty prompt, or one too long for the cache.
            BundleError: "auto", of a bundle that has no policy.
        """
        encoded = [self.encode(prompt) for prompt in _listed(prompts)]
        settings = self._settings(
            exit,
            speculate,
            max_new_tokens,
            stop,
            Sampling(temperature, top_k, top_p, seed),
            len(encoded),
        )
        settings = _monitored(settings, monitor, domain)
        return collect(encoded, self._tokens(encoded, settings))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        exit: ExitChoice | None = None,
        speculate: bool | Speculation = False,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        monitor: Monitor | None = None,
        domain: str | None = None,
    ) -> Iterator[Token]:
        """Generates as `generate` does, and gives each token when it is known."""
        encoded = [self.encode(prompt) for prompt in _listed(prompts)]
        settings = self._settings(
            exit,
            speculate,
            max_new_tokens,
            stop,
            Sampling(temperature, top_k, top_p, seed),
            len(encoded),
        )
        settings = _monitored(settings, monitor, domain)
        return self._tokens(encoded, settings)

    def encode(self, prompt: str) -> list[int]:
        """A prompt's token ids.

        Raises:
            UsageError: It has none, or too many for the cache.
            OjfaError: The tokenizer fails on it.
        """
        try:
            ids = tokenizer.encode(self.tokenizer, prompt)
        except TypeError as error:  # what tokenizers says of anything that is not UTF-8
            raise UsageError(
                f"a prompt is not text in UTF-8: {prompt!r:.40}",
                hint="give a str of whole characters",
            ) from error
        if not ids:
            raise UsageError(
                "the prompt is empty", hint="give at least one character: -p 'def main('"
            )
        if len(ids) > self.manifest.cache.max_length:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the cache holds "
                f"{self.manifest.cache.max_length}",
                hint="shorten it, or build the bundle with a larger --max-cache-length",
            )
        return ids

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
            batch, and for sampling.
        """
        planned = self.manifest.default
        return planned if prompts == 1 and temperature == 0 else None

    def _settings(
        self,
        exit: ExitChoice | None,
        speculate: bool | Speculation,
        max_new_tokens: int,
        stop: str | Sequence[str],
        sampling: Sampling,
        prompts: int,
    ) -> Settings:
        if exit is None:
            default = None if speculate else self.default(prompts, sampling.temperature)
            exit = default.exit if default else "full"
            speculate = default.speculation or False if default else speculate
        if max_new_tokens < 1:
            raise UsageError(f"max-new-tokens must be 1 or more, not {max_new_tokens}")
        stops = tuple(_listed(stop))
        if "" in stops:
            raise UsageError("a stop string is empty")
        speculation = Speculation() if speculate is True else speculate or None
        chosen: Exit | ExitPolicy = self.auto_policy() if exit == "auto" else exit
        depth = self.blocks
        if isinstance(chosen, ExitPolicy):
            chosen.check_fits(self.blocks)
        else:
            depth = resolve_exit(chosen, self.blocks)
        if speculation is not None:
            speculation.resolve_exit(self.blocks)
            if chosen != "full" and chosen != self.blocks:
                raise UsageError(
                    "speculation gives the tokens of full depth, and an exit was asked for",
                    hint="leave out one of them; the exit that drafts is a setting of speculation",
                )
        self.engines.load_blocks(depth)
        eos = self.spec.eos_token_ids
        return Settings(chosen, max_new_tokens, sampling, stops, eos, speculation)

    def _tokens(self, encoded: list[list[int]], settings: Settings) -> Iterator[Token]:
        if not encoded:
            raise UsageError("no prompt was given")
        longest = max(map(len, encoded)) + settings.max_new_tokens
        length = min(longest, self.manifest.cache.max_length)
        session = self.session(len(encoded), length, monitor=settings.monitor)
        return generate_tokens(session, encoded, self.tokenizer, settings)


def load(bundle: str | Path, *, backend: str = backends.DEFAULT) -> Model:
    """Opens a bundle.

    Args:
        bundle: Its directory. Every file is checked against the manifest's digests.
        backend: Which of its engines to run.

    Raises:
        BundleError: The bundle is incomplete or altered, or has no engines for the backend.
        BackendError: The backend doesn't work here.
    """
    return Model(Bundle(Path(bundle)), backend)


def _monitored(settings: Settings, monitor: Monitor | None, domain: str | None) -> Settings:
    """The settings with a monitor, if there is one.

    Raises:
        UsageError: Nothing that it could watch.
    """
    if monitor is None:
        if domain is not None:
            raise UsageError(
                f"domain '{domain}' was named, and nothing is monitored", hint="give a monitor"
            )
        return settings
    if settings.speculation is not None:
        raise UsageError(
            "speculation gives the tokens of full depth: there is nothing to monitor",
            hint="leave out one of them",
        )
    monitor.check_domain(domain)
    return replace(settings, monitor=monitor, domain=domain)


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _read_tokenizer(bundle: Bundle) -> Tokenizer:
    path, text = bundle.directory / TOKENIZER, bundle.read(TOKENIZER)
    try:
        return tokenizer.parse(text)
    except ValueError as error:
        raise BundleError(
            f"{path} can't be read: {error}", hint="build the bundle again"
        ) from error
