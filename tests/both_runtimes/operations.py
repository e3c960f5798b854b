"""Random operations of sessions, as plain JSON that both runtimes read.

A program is a list of sessions, each a list of operations. The first begins the session; the
others are, by `do`: advance, advance_every, deepen, decide, complete, choose (one token), rewind,
shadow_checks, shadow_loss, reset_stats, and in the end some generate. Most are right, some are
refused: both runtimes must refuse them then and leave the session as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Operation = dict[str, Any]
Sessions = list[list[Operation]]

# Of the stored bundles, which are of one size.
BLOCKS, VOCABULARY, MAX_LENGTH, MAX_BATCH = 4, 320, 64, 4

token = st.integers(0, VOCABULARY - 1)


def run_of_tokens(first: int, count: int) -> list[int]:
    """Tokens that take two numbers to draw, so that long ones shrink fast."""
    return [(first + 37 * index) % VOCABULARY for index in range(count)]


few = st.lists(token, min_size=1, max_size=4)
many = st.builds(run_of_tokens, token, st.integers(5, 36))  # beyond window and LongRoPE's switch
new_tokens = few | few | many
out_of_range = st.sampled_from([[-1], [0, VOCABULARY], [VOCABULARY]])

exits = st.integers(1, BLOCKS) | st.just("full")
wrong_exits = st.sampled_from([-3, BLOCKS + 1])  # -1 and -2 have meanings in C++

# Confidences of the stored bundles are near these: of 320 tokens that are about equally likely.
THRESHOLDS = {
    "top": st.floats(0.01, 0.2),
    "margin": st.floats(0.0, 0.05),
    "entropy": st.floats(-5.76, -4.0),
}
wrong_policies = st.sampled_from(
    [
        {"exits": [BLOCKS], "measure": "top", "thresholds": [0.5]},
        {"exits": [2, 1], "measure": "top", "thresholds": [0.5, 0.5]},
        {"exits": [0], "measure": "entropy", "thresholds": [0.5]},
        {"exits": [1, 2], "measure": "margin", "thresholds": [0.5]},
    ]
)


@st.composite
def policies(draw: st.DrawFn) -> Operation:
    measure = draw(st.sampled_from(sorted(THRESHOLDS)))
    chosen = sorted(draw(st.sets(st.integers(1, BLOCKS - 1))))
    anything = THRESHOLDS[measure] | st.sampled_from([-9.0, 9.0])
    return {
        "exits": chosen,
        "measure": measure,
        "thresholds": [draw(anything) for _ in chosen],
    }


greedy = st.just({"temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": 0})
samplings = greedy | st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 4) | st.sampled_from([0.0, 1.0, 1e-300]),
        "top_k": st.none() | st.integers(1, 40) | st.sampled_from([VOCABULARY, 2 * VOCABULARY]),
        "top_p": st.just(1.0) | st.floats(0.01, 1),
        "seed": st.integers(0, 9) | st.integers(0, 2**64 - 1),
    }
)
wrong_samplings = st.sampled_from(
    [
        {"temperature": -1.0, "top_k": None, "top_p": 1.0, "seed": 0},
        {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 0},
        {"temperature": 1.0, "top_k": None, "top_p": 0.0, "seed": 0},
        {"temperature": 0.0, "top_k": None, "top_p": 1.5, "seed": 0},
    ]
)

costs = st.just(0.1) | st.floats(0, 2)
speculations = st.fixed_dictionaries(
    {
        "exit": st.none() | st.integers(1, BLOCKS - 1),
        "draft": st.none() | st.integers(1, 9),
        "draft_cost": st.none() | costs,
        "check_cost": costs,
        "round_cost": st.just(0.0) | costs,
        "acceptance": st.floats(0, 1),
    }
)
right = {"exit": None, "draft": None, "draft_cost": None}
right |= {"check_cost": 0.1, "round_cost": 0.0, "acceptance": 0.7}
wrong_speculations = st.sampled_from(
    [
        right | {"exit": BLOCKS},
        right | {"exit": -1},
        right | {"draft": -1},
        right | {"check_cost": -0.1},
        right | {"round_cost": -1.0},
        right | {"acceptance": 1.01},
    ]
)


def sometimes(draw: st.DrawFn, usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> Any:
    """Something right, or one time in sixteen something to be refused."""
    return draw(rare if draw(st.integers(0, 15)) == 15 else usual)


def tokens_for(draw: st.DrawFn, lengths: list[int], *, some: bool = False) -> list[list[int]]:
    """New tokens of each sequence, often one each, as of a decode step; `some`: not none at all."""
    if draw(st.booleans()):
        result = [[draw(token)] for _ in lengths]
    else:
        each = st.just([]) | new_tokens
        result = [draw(each) for _ in lengths]
    if some and not any(result):
        result[0] = [draw(token)]
    if draw(st.integers(0, 31)) == 31:
        result[-1] = draw(out_of_range)
    if draw(st.integers(0, 63)) == 63:
        result.append([])
    return result


def advance(draw: st.DrawFn, lengths: list[int]) -> Operation:
    kind = draw(st.sampled_from(["advance", "advance", "advance_every"]))
    exit = sometimes(draw, exits, wrong_exits)
    return {"do": kind, "tokens": tokens_for(draw, lengths), "exit": exit}


def decide(draw: st.DrawFn, lengths: list[int]) -> Operation:
    policy = sometimes(draw, policies(), wrong_policies)
    return {"do": "decide", "tokens": tokens_for(draw, lengths), "policy": policy}


def choose(draw: st.DrawFn, lengths: list[int]) -> Operation:
    return {
        "do": "choose",
        "tokens": tokens_for(draw, lengths, some=True),
        "exit": sometimes(draw, exits | policies(), wrong_exits | wrong_policies),
        "sampling": sometimes(draw, samplings, wrong_samplings),
    }


def deepen(draw: st.DrawFn, lengths: list[int]) -> Operation:
    return {"do": "deepen", "exit": sometimes(draw, exits, wrong_exits)}


def complete(draw: st.DrawFn, lengths: list[int]) -> Operation:
    tokens = tokens_for(draw, lengths)
    counts = [draw(st.integers(min(len(ids), 1), max(len(ids), 1))) for ids in tokens]
    return {"do": "complete", "tokens": tokens, "counts": counts}


def rewind(draw: st.DrawFn, lengths: list[int]) -> Operation:
    row = draw(st.integers(0, len(lengths) - 1))
    length = sometimes(draw, st.integers(0, lengths[row]), st.sampled_from([-1, MAX_LENGTH]))
    row = sometimes(draw, st.just(row), st.sampled_from([-1, len(lengths)]))
    return {"do": "rewind", "length": length, "row": row}


def shadow_checks(draw: st.DrawFn, lengths: list[int]) -> Operation:
    row = draw(st.integers(0, len(lengths) - 1))
    loss = {"do": "shadow_loss", "row": row}
    budget = draw(st.none() | st.integers(0, 3))
    return draw(st.sampled_from([loss, {"do": "shadow_checks", "budget": budget}]))


def reset_stats(draw: st.DrawFn, lengths: list[int]) -> Operation:
    return {"do": "reset_stats"}


KINDS: list[Callable[[st.DrawFn, list[int]], Operation]] = [
    *[advance] * 3,
    *[decide, choose, rewind] * 2,
    complete,
    deepen,
    reset_stats,
]


def generate(draw: st.DrawFn, lengths: list[int]) -> Operation:
    speculation = sometimes(draw, st.none() | speculations, wrong_speculations)
    anyhow = exits | policies() | st.sampled_from(["auto", "default"])
    exit = draw(st.sampled_from(["full", "default"])) if speculation else draw(anyhow)
    return {
        "do": "generate",
        "tokens": tokens_for(draw, lengths, some=True),
        "exit": sometimes(draw, st.just(exit), wrong_exits | exits | wrong_policies),
        "speculation": speculation,
        "max_new_tokens": sometimes(draw, st.integers(1, 24), st.just(0)),
        "sampling": sometimes(draw, samplings, wrong_samplings),
        "stop_tokens": draw(st.lists(token, max_size=3) | st.just(list(range(0, VOCABULARY, 64)))),
        "ignore_eos": draw(st.booleans()),
    }


@st.composite
def sessions(draw: st.DrawFn) -> list[Operation]:
    """One session: its operations, and generations after them."""
    shares = st.floats(0.05, 1)
    shadow = st.fixed_dictionaries({"share": shares, "seed": st.integers(0, 99)})
    rows = sometimes(draw, st.integers(1, MAX_BATCH), st.sampled_from([-1, MAX_BATCH + 1]))
    begin = {
        "do": "begin",
        "batch_size": rows,
        "max_length": sometimes(
            draw, st.just(MAX_LENGTH) | st.integers(1, MAX_LENGTH), st.just(MAX_LENGTH + 1)
        ),
        "shadow": draw(st.none() | st.none() | shadow),
    }
    if not 1 <= rows <= MAX_BATCH or begin["max_length"] > MAX_LENGTH:
        return [begin]  # is refused
    can_do = [*KINDS, shadow_checks] if begin["shadow"] else KINDS
    lengths, operations = [0] * rows, [begin]
    for kinds, most in ((can_do, 10), ([generate], 2)):
        # Each is drawn next to the decision that there is one, so that it can be left out alone.
        while most and draw(st.integers(0, most)):
            operations.append(draw(st.sampled_from(kinds))(draw, lengths))
            follow(lengths, operations[-1], begin["max_length"])
            most -= 1
    return operations


def follow(lengths: list[int], done: Operation, max_length: int) -> None:
    """Makes lengths of sequences those after an operation, if it isn't refused."""
    if done["do"] == "rewind" and 0 <= done["row"] < len(lengths):
        row, length = done["row"], done["length"]
        lengths[row] = length if 0 <= length <= lengths[row] else lengths[row]
    tokens = done.get("tokens", ())
    if len(tokens) == len(lengths):
        after = [length + len(ids) for length, ids in zip(lengths, tokens, strict=True)]
        if max(after) <= max_length:
            lengths[:] = after


programs: st.SearchStrategy[Sessions] = st.lists(sessions(), min_size=1, max_size=3)
