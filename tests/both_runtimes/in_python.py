"""Operations in the Python runtime; engines/tests/replay/operations.cpp does them in C++."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from both_runtimes.operations import Operation
from vectors.cases import event_of

from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import UsageError
from ojfa_export.runtime.batch import check_tokens
from ojfa_export.runtime.generation import Settings, generate_tokens
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.runtime.session import Session

Answer = dict[str, Any]


class InPython:
    """Does operations, and says what came of each and what the session is like then."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def answer_to(self, asked: Operation) -> Answer:
        try:
            result = self._done(asked)
        except UsageError as error:
            result = {"error": "usage", "message": error.message}
            if asked["do"] == "begin":
                return result
        return result | {"state": self._state()}

    def _done(self, asked: Operation) -> Answer:
        kind = asked["do"]
        if kind == "begin":
            return self._begin(asked)
        if kind == "generate":
            return self._generate(asked)
        do: Callable[[Session, Operation], Answer] = OPERATIONS[kind]
        self._fresh = False
        return do(self._session, asked)

    def _begin(self, asked: Operation) -> Answer:
        shadow = asked["shadow"]
        monitor = None if shadow is None else Monitor(shadow["share"], seed=shadow["seed"])
        self._session = self._model.session(
            asked["batch_size"], asked["max_length"], monitor=monitor
        )
        self._events: list[list[Any]] = []
        self._session.on_event = lambda event: self._events.append(event_of(event))
        # Whether nothing was done yet; then, what generations have left in each sequence.
        self._fresh = self._counted = True
        self._held: list[list[int]] | None = None
        return {}

    def _generate(self, asked: Operation) -> Answer:
        """Python generates in new sessions only: one with all the tokens so far gives the same."""
        session, tokens = self._session, asked["tokens"]
        held = self._held or [session.tokens(row) for row in range(session.batch_size)]
        if len(tokens) != session.batch_size:
            raise UsageError("a prompt for each sequence")
        settings = settings_of(self._model, asked)
        if settings.speculation is not None and session.shadow is not None:
            raise UsageError("as of a monitor: there is nothing to check in the shadow")
        prompts = [[*old, *new] if new else [] for old, new in zip(held, tokens, strict=True)]
        if not self._fresh:
            session = self._model.session(session.batch_size, session.max_length)
            self._counted = False  # the other session goes on counting
        self._fresh = False
        check_tokens(prompts, session._sequences, session.max_length, session.spec.vocab_size)
        steps = [
            [token.row, token.id, token.blocks_run, token.drafted, token.finish_reason or ""]
            for token in generate_tokens(session, prompts, self._model.tokenizer, settings)
        ]
        self._held = [prompt or old for prompt, old in zip(prompts, held, strict=True)]
        for row, token, _, _, finish in steps:
            if not finish:  # the last one isn't in the session
                self._held[row].append(token)
        return {"steps": steps}

    def _state(self) -> Answer:
        session, blocks = self._session, self._model.blocks
        if self._held is not None:
            state: Answer = {"tokens": self._held, "lengths": [len(ids) for ids in self._held]}
        else:
            rows = range(session.batch_size)
            state = {
                "tokens": [session.tokens(row) for row in rows],
                "lengths": session.lengths,
                "watermarks": session.watermarks.reshape(-1).tolist(),
            }
        events, self._events = self._events, []
        if not self._counted:
            return state
        return state | {"events": events} | stats_of(session, blocks)


def stats_of(session: Session, blocks: int) -> Answer:
    """Counts as the C++ runtime gives them: by blocks run, the first unused."""
    result = {}
    for name, value in vars(session.stats).items():
        counted = isinstance(value, int)
        result[name] = value if counted else [value.get(i, 0) for i in range(blocks + 1)]
    return result


def policy_of(asked: Operation) -> ExitPolicy:
    return ExitPolicy(
        exits=tuple(asked["exits"]),
        measure=asked["measure"],
        thresholds=tuple(asked["thresholds"]),
    )


def settings_of(model: Model, asked: Operation) -> Settings:
    """How to generate, checked as `Model.generate` does."""
    exit, how = asked["exit"], asked["speculation"]
    if isinstance(exit, dict):
        exit = policy_of(exit)
    options = GenerationOptions(
        exit=None if exit == "default" else exit,
        speculate=False if how is None else Speculation(**how),
        max_new_tokens=asked["max_new_tokens"],
        ignore_eos=asked["ignore_eos"],
        **asked["sampling"],
    )
    settings = model._settings(options, len(asked["tokens"]))
    return replace(settings, eos_token_ids=(*settings.eos_token_ids, *asked["stop_tokens"]))


def advance(session: Session, asked: Operation) -> Answer:
    return {"logits": session.advance(asked["tokens"], asked["exit"])}


def advance_every(session: Session, asked: Operation) -> Answer:
    every = session.advance(asked["tokens"], asked["exit"], every_position=True)
    return {"logits": np.concatenate(every)}


def deepen(session: Session, asked: Operation) -> Answer:
    return {"logits": session.deepen(asked["exit"])}


def complete(session: Session, asked: Operation) -> Answer:
    return {"logits": np.concatenate(session.complete(asked["tokens"], asked["counts"]))}


def decide(session: Session, asked: Operation) -> Answer:
    step = session.decide(asked["tokens"], policy_of(asked["policy"]))
    said = [None if math.isnan(x) else x for x in step.confidence.reshape(-1).tolist()]
    return {"logits": step.logits, "blocks_run": step.blocks_run.tolist(), "confidence": said}


def choose(session: Session, asked: Operation) -> Answer:
    """In C++ a generation of one token."""
    sampling, exit, tokens = Sampling(**asked["sampling"]), asked["exit"], asked["tokens"]
    generators = [sampling.generator(row) for row in range(len(tokens))]
    draws = [
        sampling.draw(generator) if ids else 0.0
        for ids, generator in zip(tokens, generators, strict=True)
    ]
    choice = session.choose(
        tokens,
        policy_of(exit) if isinstance(exit, dict) else exit,
        sampling,
        draws if sampling.temperature else (),
    )
    steps = []
    for row, (token, blocks_run) in enumerate(zip(choice.tokens, choice.blocks_run, strict=True)):
        if blocks_run:
            ended = token in session.spec.eos_token_ids
            finish = "end_of_text" if ended else "max_new_tokens"
            steps.append([row, token, blocks_run, False, finish])
    return {"steps": steps}


def rewind(session: Session, asked: Operation) -> Answer:
    session.rewind(asked["length"], asked["row"])
    return {}


def shadow_checks(session: Session, asked: Operation) -> Answer:
    return {"done": len(session.run_shadow_checks(asked["budget"]))}


def shadow_loss(session: Session, asked: Operation) -> Answer:
    if session.shadow is None:
        raise UsageError("no shadow")
    return {"loss": session.shadow.loss(asked["row"])}


def reset_stats(session: Session, asked: Operation) -> Answer:
    session.stats = type(session.stats)()
    return {}


OPERATIONS: dict[str, Callable[[Session, Operation], Answer]] = {
    each.__name__: each
    for each in (
        advance,
        advance_every,
        deepen,
        complete,
        decide,
        choose,
        rewind,
        shadow_checks,
        shadow_loss,
        reset_stats,
    )
}
