"""Ways of decoding, timed while they read a text: what each costs a token of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export import backends
from ojfa_export.decoding.arrays import Int32
from ojfa_export.decoding.exits import resolve_exit
from ojfa_export.decoding.options import ExitChoice
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import MAX_DRAFT, Speculation
from ojfa_export.errors import UsageError
from ojfa_export.models.calibration_text import read_text
from ojfa_export.models.tokenizer import encode_all
from ojfa_export.planning.machine import describe_machine
from ojfa_export.planning.turns import Clock
from ojfa_export.runtime.model import Model, load
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator
from ojfa_export.system.progress import Progress

# Tokens of the text that are read before a way begins at another place.
PIECE = 32
# Tokens at the end of the prompt that a way reads beforehand, untimed: the caches are then its own.
SETTLING = 8
# Each piece is read so often, and the median of a step's times counts.
REPEATS = 5

# A fixed exit, a policy, or speculation.
Way = int | ExitPolicy | Speculation


@dataclass(frozen=True)
class Reading:
    """How a way read.

    Attributes:
        ms_per_token: Of one sequence.
        agreement: Share of tokens that are full depth's choice; 1 for speculation.
        blocks: Of the tokens' depths the mean; for speculation, the full depth.
        tokens_per_pass: Of speculation; 1 for the others.
        steps_ms: The time of every step.
        steps_tokens: How many tokens it gave.
    """

    ms_per_token: float
    agreement: float
    blocks: float
    tokens_per_pass: float
    steps_ms: list[float]
    steps_tokens: list[int]


@dataclass(frozen=True)
class _Piece:
    """A way's steps through a piece: their seconds, tokens, depths and choices."""

    seconds: list[float]
    tokens: list[int]
    depths: list[int]
    choices: list[int]


def read_pieces(
    model: Model,
    pieces: Int32,
    ways: Mapping[str, Way],
    prompt_length: int,
    progress: Progress,
    repeats: int = REPEATS,
    clock: Clock = time.perf_counter,
) -> dict[str, Reading]:
    """Times every way on the same pieces of text, the ways taking turns.

    The tokens that follow are the text's own, whatever a way chooses. Speculation's rounds begin
    in the text as well: what a round gives is counted, then the text goes on in its place. The
    last round of a piece may give more than is left of it, as it would anywhere in a text.

    Args:
        model: The opened bundle.
        pieces: [n, length] token ids, of which the first are run beforehand.
        ways: By name.
        prompt_length: How many of them; 1 or more.
        progress: Shows pieces.
        repeats: How often each piece is read each way.
        clock: Seconds; another than the wall's where the machine is shared.
    """
    count, length = pieces.shape
    session = model.session(1, min(length + MAX_DRAFT, model.manifest.cache.max_length))
    found: dict[str, list[_Piece]] = {name: [] for name in ways}
    chosen: list[int] = []
    with progress.task("reading", count, "pieces") as task:
        for piece in pieces.tolist():
            session.rewind(0)
            session.advance(piece[:prompt_length])
            expected = session.advance(piece[prompt_length:-1], every_position=True)[0]
            chosen += expected.argmax(axis=1).tolist()
            turns = [
                {
                    name: _read(session, piece, prompt_length, way, clock)
                    for name, way in ways.items()
                }
                for _ in range(repeats)
            ]
            for name, pieces_found in found.items():
                times = np.median([turn[name].seconds for turn in turns], axis=0)
                pieces_found.append(_with_times(turns[0][name], times))
            task.advance()
    return {name: _summary(each, chosen, ways[name]) for name, each in found.items()}


def _read(session: Session, piece: Sequence[int], start: int, way: Way, clock: Clock) -> _Piece:
    step = _stepper(session, way)
    read = _Piece([], [], [], [])
    at, last = start - settling(start), len(piece) - 1
    session.rewind(at)
    while at < last:
        # No draft reaches from the settling into what is timed.
        wanted = start - at if at < start else MAX_DRAFT + 1
        before = clock()
        tokens, depth = step(piece[at], wanted)
        seconds = clock() - before
        if at >= start:
            read.seconds.append(seconds)
            read.tokens.append(len(tokens))
            read.depths.append(depth)
            read.choices.append(tokens[0])
        if isinstance(way, Speculation):
            session.rewind(at)
            session.advance(piece[at : at + len(tokens)])
        at += len(tokens)
    session.rewind(start - settling(start))
    return read


def settling(prompt_length: int) -> int:
    """How many of a prompt's tokens a way reads before it is timed."""
    return min(SETTLING, prompt_length - 1)


def _stepper(session: Session, way: Way) -> Callable[[int, int], tuple[list[int], int]]:
    """A step from a token on, with so many more at most: tokens that it gives, and its depth."""
    if isinstance(way, Speculation):
        speculator = Speculator(session, way, Sampling(), [np.random.default_rng(0)])

        def draft(token: int, wanted: int) -> tuple[list[int], int]:
            [chosen] = speculator.step([[token]], [wanted])
            return [each.id for each in chosen], session.spec.blocks

        return draft
    if isinstance(way, ExitPolicy):

        def decide(token: int, wanted: int) -> tuple[list[int], int]:
            decided = session.choose([token], way)
            return decided.tokens, decided.blocks_run[0]

        return decide
    return lambda token, wanted: (session.choose([token], way).tokens, way)


def _with_times(piece: _Piece, seconds: NDArray[np.float64]) -> _Piece:
    return _Piece(seconds.tolist(), piece.tokens, piece.depths, piece.choices)


def _summary(pieces: Sequence[_Piece], expected: list[int], way: Way) -> Reading:
    milliseconds = [1e3 * second for piece in pieces for second in piece.seconds]
    tokens = [count for piece in pieces for count in piece.tokens]
    choices = [choice for piece in pieces for choice in piece.choices]
    drafting = isinstance(way, Speculation)
    agreement = 1.0 if drafting else float(np.mean(np.array(choices) == expected))
    return Reading(
        ms_per_token=sum(milliseconds) / sum(tokens),
        agreement=agreement,
        blocks=float(np.mean([depth for piece in pieces for depth in piece.depths])),
        tokens_per_pass=sum(tokens) / len(tokens),
        steps_ms=milliseconds,
        steps_tokens=tokens,
    )


@dataclass(frozen=True)
class ReadingResult:
    """What `ojfa-export bench --text` says.

    Attributes:
        machine: See `planning.machine`.
        ways: By name, full depth among them.
    """

    machine: dict[str, Any]
    prompt_length: int
    tokens: int
    ways: dict[str, Reading]

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)


def read_bundle(
    bundle: Path,
    text: Path,
    exits: Sequence[ExitChoice],
    speculation: Speculation | None,
    prompt_length: int,
    tokens: int,
    progress: Progress,
    backend: str = backends.DEFAULT,
) -> ReadingResult:
    """Times a bundle's ways of decoding on a text.

    Args:
        bundle: Its directory.
        text: A text or JSONL file.
        exits: Fixed exits, "full" and "auto"; none for full depth and what the bundle has.
        speculation: How to draft, if that is to be timed.
        prompt_length: Tokens in the cache before those that are timed.
        tokens: To time, each way; rounded up to whole pieces.
        progress: Told of every piece.
        backend: Which of its engines to run.

    Raises:
        BundleError: It can't be opened, or "auto" is asked and it has no policy.
        CalibrationError: The text can't be read.
        UsageError: An exit outside the model, or too little text.
    """
    model = load(bundle, backend=backend)
    ways = _ways(model, exits, speculation)
    pieces = cut_pieces(model, [text], prompt_length, tokens)
    readings = read_pieces(model, pieces, ways, prompt_length, progress)
    counted = len(pieces) * (pieces.shape[1] - prompt_length - 1)
    machine = describe_machine(backend=backends.load(backend))
    return ReadingResult(machine, prompt_length, counted, readings)


def _ways(
    model: Model, exits: Sequence[ExitChoice], speculation: Speculation | None
) -> dict[str, Way]:
    ways: dict[str, Way] = {"full": model.blocks}
    asked: list[ExitChoice] = list(exits)
    if not exits and speculation is None:
        asked = list(model.exits)
        if model.manifest.auto:
            asked.append("auto")
    for exit in asked:
        if exit == "auto":
            ways["auto"] = model.auto_policy()
        elif not isinstance(exit, ExitPolicy) and exit != "full":
            ways[f"exit {exit}"] = resolve_exit(exit, model.blocks, model.exits)
    if speculation is not None:
        length = "" if speculation.draft is None else f", {speculation.draft} drafted"
        exit = speculation.resolve_exit(
            model.blocks, has_layer=model.drafts is not None, served=model.exits
        )
        ways[f"speculation, exit {exit}{length}"] = speculation
    return ways


def cut_pieces(model: Model, texts: Sequence[Path], prompt_length: int, tokens: int) -> Int32:
    """Pieces of texts, spread evenly over each, an equal share of each text.

    Args:
        model: Whose tokens.
        texts: Text or JSONL files.
        prompt_length: Tokens before those that are timed.
        tokens: To time.

    Returns:
        [n, prompt_length + PIECE + 1] token ids; the last token of each is only predicted.

    Raises:
        CalibrationError: A text can't be read.
        UsageError: Too little text, or a piece that the cache can't hold.
    """
    length = prompt_length + PIECE + 1
    longest = model.manifest.cache.max_length - PIECE - 1
    if not 1 <= prompt_length <= longest:
        raise UsageError(
            f"prompt length {prompt_length} is outside 1..{longest}",
            hint=f"the cache holds {model.manifest.cache.max_length} tokens, and {PIECE} of the "
            "text are read after the prompt",
        )
    share = -(-tokens // (PIECE * len(texts)))
    pieces = []
    for path in texts:
        documents = read_text(path).documents
        ids = [i for each in encode_all(model.tokenizer, documents) for i in each]
        if len(ids) < length:
            raise UsageError(
                f"{path} has {len(ids)} tokens; a piece to read takes {length}",
                hint="give a longer text, or a smaller --prompt-length",
            )
        starts = np.linspace(0, len(ids) - length, share).astype(int)
        pieces += [ids[start : start + length] for start in starts]
    return np.array(pieces, np.int32)
