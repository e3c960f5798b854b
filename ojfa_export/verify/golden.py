"""Does a bundle give its golden tokens here? Needs nothing but what runs a bundle."""

from __future__ import annotations

import numpy as np

from ojfa_export.bundle.check_entry import DecidedGolden
from ojfa_export.bundle.manifest import Golden, Manifest
from ojfa_export.errors import OjfaError
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import Config
from ojfa_export.runtime.model import Model
from ojfa_export.verify.check import Check


def verify_golden(model: Model) -> list[Check]:
    """Generates a bundle's golden tokens again; the difference is the number of other tokens.

    Args:
        model: An opened bundle.
    """
    checks = [_golden_check(model, golden) for golden in model.manifest.golden]
    check = model.manifest.check
    if check is not None and check.golden is not None:
        checks.append(_decided_check(model, check.golden))
    return checks


def verify_spec(manifest: Manifest) -> Check:
    """Reads the checkpoint's config again: is the model what it says?

    Much of a model shows in no shape and in few tokens: a window, a scale, a switching length.

    Args:
        manifest: It holds the config, and what was read from it.
    """
    model = manifest.model
    try:
        _, spec = read_spec(Config(model.config, "model.config", model.ignored_fields))
        known = {
            # Those come from generation_config.json as well.
            "eos_token_ids": model.spec.eos_token_ids,
            # Weights may hold a head of their own where config.json says that it is tied.
            "tied_head": spec.tied_head and model.spec.tied_head,
        }
        same = spec.model_copy(update=known) == model.spec
    except (OjfaError, ArithmeticError, LookupError, TypeError, ValueError):  # whatever it holds
        same = False
    return Check(
        name="model as its config says", max_abs_diff=float(not same), tolerance=0, passed=same
    )


def _golden_check(model: Model, golden: Golden) -> Check:
    session = model.session(1, len(golden.prompt_token_ids) + len(golden.token_ids) - 1)
    pending = list(golden.prompt_token_ids)
    different = 0.0
    for token in golden.token_ids:
        logits = session.advance(pending, golden.exit)[0]
        if not np.isfinite(logits).all():
            different = np.inf
            break
        pending = [int(logits.argmax())]
        different += pending[0] != token
    name = "full depth" if golden.exit == model.blocks else f"exit {golden.exit}"
    return Check(
        name=f"golden tokens {name}",
        max_abs_diff=different,
        tolerance=0,
        passed=different == 0,
    )


def _decided_check(model: Model, golden: DecidedGolden) -> Check:
    """Decides golden tokens again; the difference is the number of other tokens or depths."""
    session = model.session(1, len(golden.prompt_token_ids) + len(golden.token_ids) - 1)
    pending, different = list(golden.prompt_token_ids), 0.0
    for token, depth in zip(golden.token_ids, golden.blocks_run, strict=True):
        step = session.decide(pending, golden.policy)
        if not np.isfinite(step.logits).all():
            different = np.inf
            break
        pending = [int(step.logits[0].argmax())]
        different += pending[0] != token or int(step.blocks_run[0]) != depth
    return Check(
        name="golden tokens of a policy",
        max_abs_diff=different,
        tolerance=0,
        passed=different == 0,
    )
