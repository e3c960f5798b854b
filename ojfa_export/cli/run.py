"""`ojfa-export run`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ojfa_export import backends
from ojfa_export.bundle.names import CHAT
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.generation_options import generation_options, read_options
from ojfa_export.errors import UsageError

if TYPE_CHECKING:
    from ojfa_export.decoding.generation_defaults import GenerationDefaults
    from ojfa_export.decoding.options import GenerationOptions
    from ojfa_export.runtime.generation import Completion, Generation, Token
    from ojfa_export.runtime.monitor import Monitor

STDIN = "-"
# Tokens, the end of text included, that are hardly an answer.
FEW = 4


def _parse_ids(value: str) -> list[int]:
    """Reads "1,2,3"; whether the model has these tokens is seen when it is open."""
    try:
        return [int(each) for each in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token ids, such as 1,2,3") from None


@define("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Text to continue; repeat it for a batch. '-' reads standard input, without its last "
    "newline.",
)
@click.option(
    "--prompt-ids",
    type=_parse_ids,
    multiple=True,
    metavar="ID,ID,...",
    help="Token ids to continue, in place of text; repeatable.",
)
@click.option(
    "--chat",
    metavar="TEXT",
    help="A question to a chat model, put into its chat template; '-' reads standard input.",
)
@click.option("--system", metavar="TEXT", help="What the system message of --chat says.")
@click.option("--no-echo", is_flag=True, help="Print what is generated alone, without the prompt.")
@generation_options
@click.option(
    "--shadow-share",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="X",
    help="Afterwards compare this share of the tokens with the full model.",
)
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to run.")
def command(
    console: Console,
    bundle: Path,
    prompts: tuple[str, ...],
    prompt_ids: tuple[list[int], ...],
    chat: str | None,
    system: str | None,
    no_echo: bool,
    shadow_share: float | None,
    backend: str,
    **arguments: Any,
) -> None:
    """Generate text with BUNDLE.

    One prompt is continued on standard output as the text comes; of several, each is printed when
    all are done. Of a chat the answer is printed.
    """
    messages = _read_chat(chat, system, bool(prompts or prompt_ids))
    given = [] if messages else _read_prompts(prompts, prompt_ids)
    asked = read_options(**arguments)
    _remark(console, asked)
    import ojfa_export
    from ojfa_export.models import tokenizer
    from ojfa_export.runtime.generation import collect

    monitor = None
    if shadow_share is not None:
        monitor = ojfa_export.Monitor(shadow_share, seed=asked.seed)
    model = ojfa_export.load(bundle, backend=backend)
    if messages:
        given, asked = [model.chats.encode(messages)], model.chats.ending(asked)
    options = model.resolve_default(asked, len(given))
    _show_own(console, model.manifest.generation, asked)
    if asked.exit is None and (options.exit, options.speculate) != ("full", asked.speculate):
        reason = model.manifest.default and model.manifest.default.reason
        console.note(f"default: {reason} (--exit full overrides)")
    encoded = [model.encode(prompt) for prompt in given]
    texts = [
        prompt if isinstance(prompt, str) else tokenizer.decode(model.tokenizer, prompt)
        for prompt in given
    ]
    stream = model.stream(encoded, options, monitor=monitor)
    tokens = _Interruptible(stream, _printer(console, texts, echo=not (messages or no_echo)))
    generation = collect(encoded, tokens)
    if console.json:
        if not tokens.interrupted:
            shadow = {} if monitor is None else {"shadow": _shadow(monitor)}
            console.emit(_document(generation, texts, options) | shadow)
    else:
        _show(console, generation, texts)
        console.note(_summary(generation, options))
        if monitor is not None and not tokens.interrupted:
            console.note(_shadow_summary(monitor))
    if (
        not messages
        and CHAT in model.manifest.files
        and all(map(_ended_at_once, generation.prompts))
    ):
        console.note(
            "note: the model ended at once; it is a chat model, and --chat TEXT puts a question "
            "into its template"
        )
    if tokens.interrupted:
        raise KeyboardInterrupt


def _remark(console: Console, options: GenerationOptions) -> None:
    """Says what was asked for without effect."""
    limits = (options.top_p, options.top_k, options.min_p)
    if not options.sample and not options.temperature and limits != (None, None, None):
        console.note("note: --top-p, --top-k and --min-p have no effect at --temperature 0")
    if options.logprobs is not None and not console.json:
        console.note("note: --logprobs are shown with --json only")


def _show_own(console: Console, own: GenerationDefaults, asked: GenerationOptions) -> None:
    """Says which of the bundle's own values hold."""
    from ojfa_export.decoding.generation_defaults import NO_DEFAULTS

    completed = asked.completed(own)
    if completed == asked.completed(NO_DEFAULTS):
        return
    said = (own.always, own.sampling if completed.temperature else "")
    console.note(
        f"from generation_config.json: {', '.join(filter(None, said))} (options override it)"
    )


def _ended_at_once(completion: Completion) -> bool:
    """Whether next to nothing came, as where a chat model meets text without its template."""
    few = len(completion.token_ids) <= FEW and completion.finish_reason == "end_of_text"
    return few or not completion.text.strip()


def _read_chat(chat: str | None, system: str | None, has_prompts: bool) -> list[dict[str, str]]:
    """The messages of a question; none where no chat is asked for."""
    if chat is None:
        if system is not None:
            raise UsageError("--system is given without --chat", hint="give --chat TEXT as well")
        return []
    if has_prompts:
        raise UsageError("both --chat and a prompt were given", hint="give one of them")
    question = _read_stdin() if chat == STDIN else chat
    if not question.strip():
        raise UsageError("the question is empty", hint="give --chat TEXT")
    texts = [("system", system), ("user", question)]
    return [{"role": role, "content": _utf8(text)} for role, text in texts if text is not None]


def _read_prompts(
    prompts: tuple[str, ...], prompt_ids: tuple[list[int], ...]
) -> list[str | list[int]]:
    """Texts, or token ids."""
    if bool(prompts) == bool(prompt_ids):
        what = "both -p and --prompt-ids were given" if prompts else "no prompt was given"
        raise UsageError(what, hint="give -p TEXT, or --prompt-ids 1,2,3; each may be repeated")
    if prompts.count(STDIN) > 1:
        raise UsageError("-p - is given more than once", hint="standard input is read only once")
    texts = [_read_stdin() if prompt == STDIN else prompt for prompt in prompts]
    return [*map(_utf8, texts), *prompt_ids]


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("a prompt is not text in UTF-8", hint="convert it first") from None
    return text


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UsageError("standard input is closed", hint="pipe a prompt in, or give -p TEXT")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not text in UTF-8: byte {error.start} can't be read",
            hint="convert it first",
        ) from None


class _Interruptible(Iterator["Token"]):
    """Tokens as they come; an interrupt ends them, and what came before it is kept."""

    def __init__(self, tokens: Iterable[Token], show: Callable[[Token], None]) -> None:
        self.interrupted = False
        self._tokens = iter(tokens)
        self._show = show

    def __next__(self) -> Token:
        try:
            token = next(self._tokens)
            self._show(token)
        except KeyboardInterrupt:
            self.interrupted = True
            raise StopIteration from None
        return token


def _printer(console: Console, texts: list[str], *, echo: bool) -> Callable[[Token], None]:
    """Prints a single prompt and its tokens as they come; nothing for a batch or JSON."""
    if console.json or len(texts) > 1:
        return lambda token: None
    if echo:
        console.repeat(texts[0])
    return lambda token: console.write(token.text)


def _show(console: Console, generation: Generation, texts: list[str]) -> None:
    if len(texts) == 1:
        console.write("\n")
        return
    for number, (text, completion) in enumerate(zip(texts, generation.prompts, strict=True), 1):
        console.heading(f"== {number} of {len(texts)}: {text!r}")
        console.print(completion.text)


def _summary(generation: Generation, options: GenerationOptions) -> str:
    completions = generation.prompts
    count = sum(len(completion.token_ids) for completion in completions)
    how = f"exit {options.exit}"
    if options.exit == "auto":
        blocks = sum(sum(completion.exit_blocks) for completion in completions)
        how += f", {blocks / max(count, 1):.1f} blocks/token"
    if options.speculate:
        passes = sum(completion.passes for completion in completions)
        how += f", {count / max(passes, 1):.2f} tokens per full pass"
    return (
        f"{count} tokens, {generation.tokens_per_second:.1f} tokens/s, "
        f"first token after {generation.time_to_first_token_ms:.1f} ms, {how}"
    )


def _shadow(monitor: Monitor) -> dict[str, Any]:
    stats = monitor.stats
    return {"checks": stats.shadow_checks, "disagreements": stats.shadow_disagreements}


def _shadow_summary(monitor: Monitor) -> str:
    found = _shadow(monitor)
    return (
        f"{found['checks']} early tokens were compared with the full model, "
        f"{found['disagreements']} differ"
    )


def _document(
    generation: Generation, texts: list[str], options: GenerationOptions
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "exit": options.exit,
        "prompts": [
            {"prompt": text, **asdict(completion)}
            for text, completion in zip(texts, generation.prompts, strict=True)
        ],
        "tokens_per_second": generation.tokens_per_second,
        "time_to_first_token_ms": generation.time_to_first_token_ms,
    }
