"""Cases that the Python runtime and the C++ runtime must agree on, and running them in Python.

A case is plain JSON, so that both read it: what to do, and what came of it. `make.py` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ojfa_export
from ojfa_export.decoding.events import DraftChecked, ExitTaken, ShadowCheck
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.generation import Settings, generate_tokens
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.runtime.session import Session

DIRECTORY = Path(__file__).parents[2] / "engines" / "tests" / "vectors"
BUNDLES = ("llama", "gpt2", "phi3", "qwen3", "gemma3")
# Logits that are stored of each row.
KEPT = 4

Case = dict[str, Any]


def open_bundle(name: str) -> Model:
    """A stored bundle."""
    return ojfa_export.load(DIRECTORY / f"{name}.ojfa")


def run_generation(model: Model, case: Case) -> Case:
    """What a generation gives: tokens of each sequence, how they came, counts and events."""
    shadow = case.get("shadow")
    monitor = Monitor(shadow["share"], seed=shadow["seed"]) if shadow else None
    session = model.session(len(case["prompts"]), case["max_length"], monitor=monitor)
    events: list[list[Any]] = []
    session.on_event = lambda event: events.append(event_of(event))
    keys = ("tokens", "blocks_run", "drafted")
    result: Case = {key: [[] for _ in case["prompts"]] for key in keys}
    result["finish"] = [None] * len(case["prompts"])
    for token in generate_tokens(session, case["prompts"], model.tokenizer, _settings(model, case)):
        result["tokens"][token.row].append(token.id)
        result["blocks_run"][token.row].append(token.blocks_run)
        result["drafted"][token.row].append(token.drafted)
        result["finish"][token.row] = token.finish_reason
    if session.shadow is not None:
        session.run_shadow_checks()
        result["losses"] = [session.shadow.loss(row) for row in range(session.batch_size)]
    return result | {"stats": _stats(session), "events": events}


def run_steps(model: Model, case: Case) -> list[Case]:
    """What each step of a session gives: likeliest tokens, some logits, confidences, watermarks."""
    session = model.session(case["batch_size"], case["max_length"])
    return [_step(session, step) for step in case["steps"]]


def _settings(model: Model, case: Case) -> Settings:
    exit: Any = case["exit"]
    if exit == "auto":
        exit = model.auto_policy()
    elif isinstance(exit, dict):
        exit = ExitPolicy(**{key: _tuple(value) for key, value in exit.items()})
    speculation = None if case.get("speculation") is None else Speculation(**case["speculation"])
    if exit == "default":
        default = model.default(len(case["prompts"]), case["temperature"])
        exit = default.exit if default else "full"
        speculation = default.speculation if default else None
    sampling = Sampling(case["temperature"], case["top_k"], case["top_p"], case["seed"])
    eos = model.spec.eos_token_ids
    return Settings(exit, case["max_new_tokens"], sampling, (), eos, speculation)


def _step(session: Session, step: Case) -> Case:
    kind, result = step["do"], {}
    if kind == "advance":
        logits = session.advance(step["tokens"], step["exit"])
    elif kind == "advance_every":
        logits = np.concatenate(session.advance(step["tokens"], step["exit"], every_position=True))
    elif kind == "deepen":
        logits = session.deepen(step["exit"])
    elif kind == "complete":
        logits = np.concatenate(session.complete(step["tokens"], step["counts"]))
    elif kind == "rewind":
        session.rewind(step["length"], step["row"])
        logits = np.zeros((0, session.spec.vocab_size))
    else:
        policy = ExitPolicy(**{key: _tuple(value) for key, value in step["policy"].items()})
        decided = session.decide(step["tokens"], policy)
        logits = decided.logits
        result["blocks_run"] = decided.blocks_run.tolist()
        result["confidence"] = [
            [None if np.isnan(value) else float(value) for value in row]
            for row in decided.confidence
        ]
    result["likeliest"] = [int(row.argmax()) if row.any() else -1 for row in logits]
    result["logits"] = [[float(value) for value in row[:KEPT]] for row in logits]
    return result | {"lengths": session.lengths, "watermarks": session.watermarks.tolist()}


def _stats(session: Session) -> Case:
    stats = session.stats
    by_blocks = {
        name: {str(blocks): value for blocks, value in sorted(getattr(stats, name).items())}
        for name in ("exits", "stopped", "confidence_sums")
    }
    counts = {
        name: getattr(stats, name)
        for name in (
            "exit_heads",
            "final_heads",
            "checks",
            "drafted",
            "accepted",
            "rounds",
            "shadow_checks",
            "shadow_disagreements",
        )
    }
    return by_blocks | counts


def event_of(event: ExitTaken | DraftChecked | ShadowCheck) -> list[Any]:
    if isinstance(event, ExitTaken):
        return ["exit", event.row, event.position, event.blocks_run]
    if isinstance(event, DraftChecked):
        return ["draft", event.row, event.drafted, event.accepted]
    return ["shadow", event.row, event.position, event.blocks_run, event.agrees]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
