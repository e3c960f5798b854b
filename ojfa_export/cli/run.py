"""`ojfa-export run`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ojfa_export import backends
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.exit_option import METAVAR_WITH_AUTO, parse_exit_or_auto
from ojfa_export.errors import UsageError

if TYPE_CHECKING:
    from ojfa_export.decoding.options import ExitChoice
    from ojfa_export.runtime.generation import Generation, Token
    from ojfa_export.runtime.model import Model
    from ojfa_export.runtime.monitor import Monitor

STDIN = "-"


@define("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="Text to continue; repeat it for a batch. '-' reads standard input, without its last "
    "newline.",
)
@click.option(
    "--exit",
    "depth",
    type=parse_exit_or_auto,
    metavar=METAVAR_WITH_AUTO,
    help="Blocks to run; 'auto' decides for each token by the bundle's policy.  [default: what the "
    "build planned; 'inspect' shows it]",
)
@click.option(
    "--speculate",
    is_flag=True,
    help="Draft at an exit and check with the other blocks: the tokens of full depth.",
)
@click.option(
    "--draft-exit", type=click.IntRange(min=1), metavar="N", help="Blocks that draft [half]."
)
@click.option(
    "--draft-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens per draft [adapted to how many are accepted].",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", default=64, help="For each prompt."
)
@click.option(
    "--temperature", type=float, metavar="X", default=0.0, help="0 takes the likeliest token."
)
@click.option(
    "--top-p", type=float, metavar="X", default=1.0, help="Sample within this much probability."
)
@click.option("--top-k", type=int, metavar="N", help="Sample among this many tokens.")
@click.option("--seed", type=int, metavar="N", default=0, help="Of sampling.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
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
    depth: ExitChoice | None,
    speculate: bool,
    draft_exit: int | None,
    draft_length: int | None,
    shadow_share: float | None,
    backend: str,
    **settings: Any,
) -> None:
    """Generate text with BUNDLE.

    One prompt is continued on standard output as the text comes; of several, each is printed when
    all are done.
    """
    texts = _read_prompts(prompts)
    if settings["temperature"] == 0 and (settings["top_p"] != 1 or settings["top_k"] is not None):
        console.note("note: --top-p and --top-k have no effect at --temperature 0")
    if not speculate and (draft_exit, draft_length) != (None, None):
        raise UsageError(
            "--draft-exit and --draft-length are settings of speculation", hint="add --speculate"
        )
    import ojfa_export
    from ojfa_export.runtime.generation import collect

    if speculate:
        settings["speculate"] = ojfa_export.Speculation(draft_exit, draft_length)
    monitor = None
    if shadow_share is not None:
        monitor = settings["monitor"] = ojfa_export.Monitor(shadow_share, seed=settings["seed"])
    model = ojfa_export.load(bundle, backend=backend)
    if depth is None:
        depth = "full" if speculate else _take_default(console, model, len(texts), settings)
    encoded = [model.encode(text) for text in texts]
    tokens = _Interruptible(model.stream(encoded, exit=depth, **settings), _printer(console, texts))
    generation = collect(encoded, tokens)
    if console.json:
        if not tokens.interrupted:
            shadow = {} if monitor is None else {"shadow": _shadow(monitor)}
            console.emit(_document(generation, texts, depth) | shadow)
    else:
        _show(console, generation, texts)
        console.note(_summary(generation, depth, bool(settings.get("speculate"))))
        if monitor is not None and not tokens.interrupted:
            console.note(_shadow_summary(monitor))
    if tokens.interrupted:
        raise KeyboardInterrupt


def _take_default(
    console: Console, model: Model, prompts: int, settings: dict[str, Any]
) -> ExitChoice:
    """What the build planned: the exit, and into the settings how to draft."""
    default = model.default(prompts, settings["temperature"])
    if default is None:
        return "full"
    if default.exit != "full" or default.speculation is not None:
        console.note(f"default: {default.reason} (--exit full overrides)")
    settings["speculate"] = default.speculation or False
    return default.exit


def _read_prompts(prompts: tuple[str, ...]) -> list[str]:
    if prompts.count(STDIN) > 1:
        raise UsageError("-p - is given more than once", hint="standard input is read only once")
    texts = [_read_stdin() if prompt == STDIN else prompt for prompt in prompts]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("a prompt is not text in UTF-8", hint="convert it first") from None
    return texts


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


def _printer(console: Console, texts: list[str]) -> Callable[[Token], None]:
    """Prints a single prompt and its tokens as they come; nothing for a batch or JSON."""
    if console.json or len(texts) > 1:
        return lambda token: None
    console.repeat(texts[0])
    return lambda token: console.write(token.text)


def _show(console: Console, generation: Generation, texts: list[str]) -> None:
    if len(texts) == 1:
        console.write("\n")
        return
    for number, (text, completion) in enumerate(zip(texts, generation.prompts, strict=True), 1):
        console.heading(f"== {number} of {len(texts)}: {text!r}")
        console.print(completion.text)


def _summary(generation: Generation, depth: ExitChoice, speculate: bool) -> str:
    completions = generation.prompts
    count = sum(len(completion.token_ids) for completion in completions)
    how = f"exit {depth}"
    if depth == "auto":
        blocks = sum(sum(completion.exit_blocks) for completion in completions)
        how += f", {blocks / max(count, 1):.1f} blocks/token"
    if speculate:
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


def _document(generation: Generation, texts: list[str], depth: ExitChoice) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "exit": depth,
        "prompts": [
            {"prompt": text, **asdict(completion)}
            for text, completion in zip(texts, generation.prompts, strict=True)
        ],
        "tokens_per_second": generation.tokens_per_second,
        "time_to_first_token_ms": generation.time_to_first_token_ms,
    }
