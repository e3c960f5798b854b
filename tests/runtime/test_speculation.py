"""Speculation is lossless: the tokens, or the distribution, of full depth."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import given as forall
from hypothesis import strategies as st
from test_session import NAMES, examples, poison
from tiny_models import VOCAB_SIZE
from tolerances import NEAR_TIE

import ojfa_export
from ojfa_export.decoding.sampling import GREEDY, Sampling
from ojfa_export.decoding.speculation import (
    MAX_DRAFT,
    MOST_PROBE_ROUNDS,
    PROBE_ROUNDS,
    DraftLength,
    Speculation,
    check,
)
from ojfa_export.errors import UsageError
from ojfa_export.runtime.generation import Settings, collect, generate_tokens
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator
from ojfa_export.runtime.step_output import Choice

MAX_LENGTH = 40  # beyond LongRoPE's switch length (32) and the sliding window (8)


class GoodDrafts(Session):
    """Its exits often agree with the full model, as those of random checkpoints never do.

    An exit's logits are those of full depth, with noise in every second position.
    """

    def advance(self, token_ids, exit="full", **options):
        logits = super().advance(token_ids, exit, **options)
        if exit in ("full", self.spec.blocks):
            return logits
        seen = [self.tokens(row) if len(ids) else [] for row, ids in enumerate(token_ids)]
        fresh = Session(self.spec, self._engines, len(seen), self.max_length)
        full = fresh.advance(seen)
        for row, tokens in enumerate(seen):
            if tokens:
                logits[row] = full[row]
                if len(tokens) % 2:
                    noise = np.random.default_rng(tokens).normal(size=VOCAB_SIZE)
                    logits[row] += noise.astype(np.float32)
        return logits

    def choose(self, token_ids, exit="full", sampling=GREEDY, draws=()):
        if exit in ("full", self.spec.blocks):
            return super().choose(token_ids, exit, sampling, draws)
        tokens = self.advance(token_ids, exit).argmax(axis=1)
        return Choice(tokens.tolist(), [exit] * len(tokens), np.empty((0, len(tokens))))


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return ojfa_export.load(tiny_bundle)


def run(model: Model, session: Session, prompts: list[list[int]], **changes):
    chosen = {
        "exit": "full",
        "max_new_tokens": 12,
        "sampling": Sampling(),
        "stop": (),
        "eos_token_ids": (),
        "speculation": Speculation(exit=2),
        **changes,
    }
    tokens = generate_tokens(session, prompts, model.tokenizer, Settings(**chosen))
    return collect(prompts, tokens).prompts


def good_drafts(model: Model, rows: int, max_length: int = 64) -> Session:
    return GoodDrafts(model.spec, model.engines, rows, max_length)


def plain(model: Model, prompts: list[list[int]], max_length: int = 64, **changes):
    session = model.session(len(prompts), max_length)
    return run(model, session, prompts, speculation=None, **changes)


def first_difference(chain, prompt: list[int], tokens: list[int]) -> int:
    """Where tokens leave the greedy path of full depth, asserting that they do so only at a tie.

    A pass over several tokens sums in another order than one token at a time, so that logits
    which differ by less than NEAR_TIE may be ranked otherwise; after that all is another text.
    """
    session = chain.session(1, MAX_LENGTH)
    logits = session.advance(prompt)[0]
    for position, token in enumerate(tokens):
        if token != logits.argmax():
            assert logits.max() - logits[token] < NEAR_TIE
            return position
        if session.lengths[0] < MAX_LENGTH:
            logits = session.advance([token])[0]
    return len(tokens)


@pytest.mark.parametrize("sessions", [Session, GoodDrafts])
@pytest.mark.parametrize("name", NAMES)
@settings(examples, max_examples=25)  # of eight pairs each
@forall(
    prompts=st.lists(
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20), min_size=1, max_size=3
    ),
    draft=st.none() | st.integers(1, 6),
    exit=st.integers(1, 2),
)
def test_greedy_tokens_are_those_of_full_depth(name, sessions, chain_of, prompts, draft, exit):
    chain = chain_of(name)
    session = sessions(chain.spec, chain.engines, len(prompts), MAX_LENGTH)
    speculator = Speculator(
        session, Speculation(exit, draft), Sampling(), [np.random.default_rng(0)] * len(prompts)
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    while any(pending):
        poison(session)
        chosen = speculator.step(pending, [10 - len(ids) for ids in tokens])
        for row, said in enumerate(chosen):
            assert bool(said) == bool(pending[row])
            tokens[row] += [token.id for token in said]
            pending[row] = tokens[row][-1:]
            # All but the newest token, and nothing else, is in the session, at full depth.
            assert session.tokens(row) == (prompts[row] + tokens[row])[:-1]
            assert (session.watermarks[:, row] == session.lengths[row]).all()
            if len(tokens[row]) >= 10 or session.lengths[row] == MAX_LENGTH:
                pending[row] = []
    for prompt, ids in zip(prompts, tokens, strict=True):
        assert len(ids) == min(10, MAX_LENGTH - len(prompt) + 1)
        first_difference(chain, prompt, ids)
    stats = session.stats
    assert stats.accepted + stats.rounds == sum(map(len, tokens))
    if sessions is GoodDrafts and draft == 1 and max(map(len, prompts)) < 20:
        assert stats.accepted


def joint(model: Model, prompt: list[int], count: int, sampling: Sampling) -> dict:
    """The full model's distribution of the next `count` tokens, by the chain rule."""
    paths = {(): 1.0}
    for _ in range(count):
        longer = {}
        for path, weight in paths.items():
            p = sampling.probabilities(model.session().advance([*prompt, *path])[0])
            longer.update({(*path, int(t)): weight * p[t] for t in np.flatnonzero(p)})
        paths = longer
    return paths


def p_value(counts: Counter, expected: dict, rng: np.random.Generator) -> float:
    """Of Pearson's statistic, by drawing from the expected distribution."""
    assert set(counts) <= set(expected)
    p = np.array(list(expected.values()))
    p /= p.sum()
    total = sum(counts.values())

    def statistic(observed: np.ndarray) -> np.ndarray:
        return ((observed - total * p) ** 2 / (total * p)).sum(axis=-1)

    null = statistic(rng.multinomial(total, p, size=4000))
    return float(np.mean(null >= statistic(np.array([counts[path] for path in expected]))))


@pytest.mark.parametrize("draft", [1, 2, None])
@pytest.mark.parametrize(
    "chosen", [{"temperature": 1.3, "top_k": 4}, {"temperature": 8.0, "top_k": 5, "top_p": 0.9}]
)
def test_sampled_tokens_have_the_full_models_distribution(model, draft, chosen):
    """The first two tokens, which may both be drafts, or one a replacement, or one a bonus."""
    prompt = [5, 6, 7]
    expected = joint(model, prompt, 2, Sampling(**chosen))
    counts: Counter = Counter()
    accepted = rejected = 0
    for seed in range(40):
        session = good_drafts(model, 16, 8)
        for completion in run(
            model,
            session,
            [prompt] * 16,
            max_new_tokens=4,
            sampling=Sampling(**chosen, seed=seed),
            speculation=Speculation(2, draft),
        ):
            counts[tuple(completion.token_ids[:2])] += 1
        accepted += session.stats.accepted
        rejected += session.stats.drafted - session.stats.accepted
    assert min(accepted, rejected) > 100
    assert p_value(counts, expected, np.random.default_rng(0)) > 0.01


def test_the_distribution_test_sees_the_exits_own_distribution(model):
    prompt, sampling = [5, 6, 7], {"temperature": 1.3, "top_k": 4}
    expected = joint(model, prompt, 2, Sampling(**sampling))
    drafted: Counter = Counter()
    for seed in range(40):
        session = good_drafts(model, 16, 8)
        rows = [np.random.default_rng([seed, row]) for row in range(16)]
        ids = [prompt] * 16
        paths = [()] * 16
        for _ in range(2):
            logits = session.advance(ids, 2)
            ids = [
                [Sampling(**sampling).choose(each, rng)]
                for each, rng in zip(logits, rows, strict=True)
            ]
            paths = [(*path, *new) for path, new in zip(paths, ids, strict=True)]
        drafted.update(path for path in paths if path in expected)
    assert p_value(drafted, expected, np.random.default_rng(0)) < 1e-3


def test_check_gives_the_targets_distribution():
    """20,000 rounds of one draft over five tokens, p and q with zeros in different places."""
    p_logits = np.log(np.array([[0.5, 0.3, 0.2, 1e-30, 1e-30], [0.1, 0.2, 0.3, 0.2, 0.2]]))
    q = np.array([0.1, 0.6, 0.0, 0.3, 0.0])
    sampling = Sampling(temperature=1.0)
    generator = np.random.default_rng(1)
    first: Counter = Counter()
    accepted = 0
    for draft in generator.choice(5, p=q, size=20_000).tolist():
        tokens = check([draft], [q], p_logits.astype(np.float32), sampling, generator)
        first[tokens[0]] += 1
        accepted += len(tokens) == 2
        assert len(tokens) == 1 or tokens[0] == draft
    expected = dict(enumerate(sampling.probabilities(p_logits[0].astype(np.float32))))
    assert p_value(first, expected, np.random.default_rng(2)) > 0.01
    share = np.minimum([*expected.values()], q).sum()  # arXiv 2211.17192, theorem 3.5
    assert abs(accepted - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))


def test_equal_distributions_take_every_draft(rng):
    logits = rng.normal(size=(3, 50)).astype(np.float32)
    sampling = Sampling(temperature=1.0)
    q = [sampling.probabilities(row) for row in logits[:2]]
    for seed in range(50):
        generator = np.random.default_rng(seed)
        draft = [int(generator.choice(50, p=row)) for row in q]
        assert check(draft, q, logits, sampling, generator)[:2] == draft


@pytest.mark.parametrize("draft", [1, 3, 8])
def test_each_end_inside_a_draft(model, draft):
    """End of text, a stop string, max_new_tokens, a full cache: as without speculation."""
    prompts = [[5, 6, 7], [9], [4] * 6]
    text = plain(model, prompts)
    ends = tuple({completion.token_ids[4] for completion in text})
    stops = tuple(
        piece for each in text if (piece := model.tokenizer.decode(each.token_ids[5:7]).strip())
    )
    reasons = set()
    for changes in (
        {"eos_token_ids": ends},
        {"stop": stops},
        *({"max_new_tokens": count} for count in range(1, 8)),
    ):
        expected = plain(model, prompts, **changes)
        session = good_drafts(model, len(prompts))
        given = run(model, session, prompts, speculation=Speculation(2, draft), **changes)
        assert_same(given, expected)
        reasons |= {completion.finish_reason for completion in given}
    for length in range(6, 12):
        expected = plain(model, prompts, length)
        session = good_drafts(model, len(prompts), length)
        given = run(model, session, prompts, speculation=Speculation(2, draft))
        assert_same(given, expected)
        reasons |= {completion.finish_reason for completion in given}
    assert reasons == {"end_of_text", "stop_string", "max_new_tokens", "cache_full"}
    assert given[1].passes < expected[1].passes


def assert_same(given, expected) -> None:
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        assert ours.exit_blocks == theirs.exit_blocks
        assert theirs.passes == len(theirs.token_ids)
        assert 1 <= ours.passes <= theirs.passes


def test_tokens_stream_in_order_and_drafts_are_named(model):
    prompts = [[5, 6, 7], [9, 9]]
    session = good_drafts(model, 2)
    settings = Settings("full", 12, Sampling(), (), (), Speculation(2, 2))
    tokens = list(generate_tokens(session, prompts, model.tokenizer, settings))
    rounds = []
    for row, group in itertools.groupby(tokens, key=lambda token: token.row):
        flags = [token.drafted for token in group]
        rounds.append((row, flags))
    assert [row for row, _ in rounds[:4]] == [0, 1, 0, 1]
    # Within a round a sequence's accepted drafts come first, then the full model's own token.
    for _, flags in rounds[:4]:
        assert flags == [True] * (len(flags) - 1) + [False]
        assert len(flags) <= 3
    assert any(len(flags) > 1 for _, flags in rounds)
    assert {token.blocks_run for token in tokens} == {4}


def test_rows_keep_their_tokens_whatever_their_neighbours(model):
    chosen = {"sampling": Sampling(1.0, seed=4)}
    [_, first] = run(model, good_drafts(model, 2), [[9], [5, 6, 7]], **chosen)
    [_, second, _] = run(model, good_drafts(model, 3), [[1, 2], [5, 6, 7], [3]], **chosen)
    assert first == second


def test_the_draft_length_follows_the_acceptance():
    lengths = DraftLength(cost=0.4)
    for _ in range(50):
        lengths.learn(accepted=4, drafted=4)
    assert lengths.acceptance > 0.9
    assert lengths.next() == MAX_DRAFT
    for _ in range(200):
        lengths.learn(accepted=0, drafted=1)
    assert lengths.acceptance < 0.01
    # It doesn't pay; now and then one token is drafted, to see whether that has changed.
    for rounds in (PROBE_ROUNDS, 2 * PROBE_ROUNDS, 4 * PROBE_ROUNDS, *[MOST_PROBE_ROUNDS] * 2):
        drafted, rests = zip(*((lengths.next(), lengths.rests) for _ in range(rounds)), strict=True)
        assert drafted == (*[0] * (rounds - 1), 1)
        assert rests == (*[True] * (rounds - 2), False, False)
    for _ in range(50):
        lengths.learn(accepted=4, drafted=4)
    assert lengths.next() == MAX_DRAFT
    for _ in range(200):
        lengths.learn(accepted=0, drafted=1)
    assert [lengths.next() for _ in range(PROBE_ROUNDS)] == [*[0] * (PROBE_ROUNDS - 1), 1]


def test_what_was_not_checked_is_not_learnt():
    one, other = DraftLength(0.4), DraftLength(0.4)
    one.learn(accepted=1, drafted=2)
    other.learn(accepted=1, drafted=8)
    assert one.acceptance == other.acceptance


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [0.1, 0.5, 0.9])
def test_the_draft_length_has_the_most_tokens_per_cost(acceptance, cost):
    lengths = DraftLength(cost)
    lengths._accepted, lengths._checked = acceptance, 1.0
    speed = [
        sum(acceptance**i for i in range(k + 1)) / (1 + k * cost) for k in range(MAX_DRAFT + 1)
    ]
    assert speed[lengths.next()] == max(speed)


@given(
    together=st.integers(1, 64),
    token=st.floats(0.0, 2.0),
    draft=st.floats(0.0, 0.5),
    acceptance=st.floats(0.05, 0.95),
)
def test_the_draft_length_counts_who_runs_beside(
    together: int, token: float, draft: float, acceptance: float
) -> None:
    """A pass takes 1 and `token` for each of its tokens; a draft a share of the sequence's step.

    Beside others what pays least is left out.
    """
    alone = 1 + token
    lengths = DraftLength(draft + token / alone, check_cost=token / alone)
    lengths._accepted, lengths._checked = acceptance, 1.0
    step = 1 + together * token
    rates = [
        sum(acceptance**i for i in range(k + 1))
        / (1 + together * (k + 1) * token + k * draft * step)
        for k in range(MAX_DRAFT + 1)
    ]
    length = lengths.next(together)
    gain = max(rates) / rates[0]
    if together == 1 or gain > 1.1001:
        assert rates[length] == pytest.approx(max(rates))
    elif gain < 1.0999:
        assert length == 0


def test_beside_others_a_sequence_tries_drafts_as_often_as_all_would_alone():
    lengths = DraftLength(cost=0.4)
    for _ in range(200):
        lengths.learn(accepted=0, drafted=1)
    found = [(lengths.next(4), lengths.rests) for _ in range(4 * PROBE_ROUNDS)]
    assert [length for length, _ in found] == [*[0] * (4 * PROBE_ROUNDS - 1), 1]
    # Where the others may end, the next round may be the one that tries.
    assert [rests for _, rests in found].index(False) == 4 * PROBE_ROUNDS - 5


def test_a_sequence_that_would_draft_alone_does_not_rest():
    lengths = DraftLength(cost=0.4, check_cost=0.1)
    for _ in range(200):
        lengths.learn(accepted=4, drafted=8)
    assert (lengths.next(16), lengths.rests) == (0, False)
    assert lengths.next(1) > 0


@pytest.mark.parametrize("exit", ["full", 4])
def test_generate_speculates(model, exit):
    prompts = ["def parse(self", "x"]
    expected = model.generate(prompts, max_new_tokens=20).prompts
    for speculate in (True, ojfa_export.Speculation(exit=3, draft=3)):
        given = model.generate(prompts, exit=exit, speculate=speculate, max_new_tokens=20).prompts
        assert_same(given, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit": 2, "speculate": True}, "an exit was asked for"),
        ({"speculate": Speculation(exit=4)}, "exit 4 can't draft for this model of 4 blocks"),
        ({"speculate": Speculation(exit=0)}, "has no draft layer"),
    ],
)
def test_arguments_out_of_range(model, arguments, message):
    with pytest.raises(UsageError, match=message):
        model.stream("x", **arguments)


@pytest.mark.parametrize("settings", [{"draft": 0}, {"draft_cost": -1}, {"check_cost": np.nan}])
def test_settings_out_of_range(settings):
    with pytest.raises(UsageError, match=r"of speculation must be|draft length must be"):
        Speculation(**settings)


def test_completing_more_than_waits_changes_nothing(model):
    session = model.session(2, 10)
    session.advance([[1, 2, 3], [4]], 2)
    for counts in ([5, 1], [0, 1]):
        with pytest.raises(UsageError, match=f"logits of {counts[0]} tokens of sequence 0"):
            session.complete([[5], []], counts)
    assert session.lengths == [3, 1]
    logits = session.complete([[5], []], [4, 1])
    assert [len(rows) for rows in logits] == [4, 1]
