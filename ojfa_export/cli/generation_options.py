"""The options that say how text is generated, for every command that generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ojfa_export.cli.exit_option import METAVAR_WITH_AUTO, parse_exit_or_auto
from ojfa_export.errors import UsageError

if TYPE_CHECKING:
    from ojfa_export.decoding.options import GenerationOptions

F = TypeVar("F", bound=Callable[..., Any])


def _parse_bias(value: str) -> tuple[int, float]:
    """Reads "TOKEN=X"; what numbers may be there is seen when all options are."""
    token, _, bias = value.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not TOKEN=X, such as 50256=-100") from None


_OPTIONS = (
    click.option(
        "--exit",
        type=parse_exit_or_auto,
        metavar=METAVAR_WITH_AUTO,
        help="Blocks to run; 'auto' decides for each token by the bundle's policy.  [default: what "
        "the build planned; 'inspect' shows it]",
    ),
    click.option(
        "--speculate",
        is_flag=True,
        help="Draft at an exit and check with the other blocks: the tokens of full depth.",
    ),
    click.option(
        "--draft-exit",
        type=click.IntRange(min=0),
        metavar="N",
        help="Blocks that draft, 0 for the bundle's draft layer [that layer if it has one, else "
        "half].",
    ),
    click.option(
        "--draft-length",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens per draft [adapted to how many are accepted].",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        default=64,
        help="For each prompt.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
    click.option(
        "--stop-token",
        "stop_token_ids",
        type=int,
        multiple=True,
        metavar="ID",
        help="End after this token; repeatable.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text."),
    click.option(
        "--sample",
        is_flag=True,
        help="Sample, as the bundle has it from generation_config.json where no option says how.",
    ),
    click.option(
        "--temperature",
        type=float,
        metavar="X",
        help="0 takes the likeliest token.  [default: 0; with --sample the bundle's, else 1]",
    ),
    click.option(
        "--top-p",
        type=float,
        metavar="X",
        help="Sample within this much probability.  [default: the bundle's, else 1]",
    ),
    click.option(
        "--top-k",
        type=int,
        metavar="N",
        help="Sample among this many tokens.  [default: the bundle's, else all]",
    ),
    click.option(
        "--min-p",
        type=float,
        metavar="X",
        help="Leave out tokens with less than this share of the likeliest one's probability.  "
        "[default: the bundle's, else 0]",
    ),
    click.option("--seed", type=int, metavar="N", default=0, help="Of sampling."),
    click.option(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="Above 1, tokens of the prompt and the text become less likely.  [default: the "
        "bundle's, else 1]",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        metavar="X",
        default=0.0,
        help="Taken from the logits of generated tokens.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        metavar="X",
        default=0.0,
        help="The same, for each time that they came.",
    ),
    click.option(
        "--logit-bias",
        type=_parse_bias,
        multiple=True,
        metavar="TOKEN=X",
        help="Add to the logit of a token id; repeatable.",
    ),
    click.option(
        "--logprobs",
        type=int,
        metavar="N",
        help="With --json: log probabilities of each token and of the N likeliest.",
    ),
)


def generation_options(function: F) -> F:
    """Gives a command the options; `read_options` makes one object of them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_options(
    draft_exit: int | None,
    draft_length: int | None,
    *,
    speculate: bool,
    logit_bias: tuple[tuple[int, float], ...],
    **options: Any,
) -> GenerationOptions:
    """What was asked for, checked.

    Raises:
        UsageError: A value out of range, or one that another makes meaningless.
    """
    from ojfa_export.decoding.options import GenerationOptions
    from ojfa_export.decoding.speculation import Speculation

    if not speculate and (draft_exit, draft_length) != (None, None):
        raise UsageError(
            "--draft-exit and --draft-length are settings of speculation", hint="add --speculate"
        )
    return GenerationOptions(
        speculate=Speculation(draft_exit, draft_length) if speculate else False,
        logit_bias=dict(logit_bias),
        **options,
    )
