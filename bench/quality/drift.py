"""What `ojfa-export monitor` says of text that is read, text that is generated, and other text.

python -m bench.quality.drift --case demo demo.ojfa --out bench/results/drift.json

The bundles were built with --max-disagreement on the text that ships; the logs are held-out text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.commit import commit
from calibration.multidomain.prepare import HELD_OUT
from ojfa_export.planning.machine import describe_machine
from ojfa_export.promises.drift.figure import draw
from ojfa_export.promises.drift.log import Request
from ojfa_export.promises.drift.replay import replay, watched
from ojfa_export.promises.drift.report import make_report
from ojfa_export.runtime.model import Model, load
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.system.progress import SILENT

# Characters of a piece: of a text that is read, and of a prompt that is gone on from.
TEXT, PROMPT = 600, 200
NEW_TOKENS = 64
SHARE, FALSE_ALARMS = 1.0, 0.01
# Of the tokens, where the cost of shadow checks is measured: what a service might choose.
SERVICE_SHARE = 0.1


def main() -> None:
    """Runs every case, writes one JSON file after each, and draws each log beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", nargs=2, action="append", required=True, metavar=("NAME", "BUNDLE")
    )
    parser.add_argument("--requests", type=int, default=100, help="of each domain and log")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    measured = commit()  # now: the tree may change while this runs
    cases: dict[str, Any] = {}
    for name, bundle in arguments.case:
        model = load(bundle)
        cases[name] = {
            log: measure(model, requests, arguments.out.with_suffix(f".{name}.{log}.png"))
            for log, requests in logs(arguments.requests).items()
        }
        cases[name]["shadow_checks"] = cost(model, arguments.requests)
        document = {"machine": describe_machine(), "commit": measured, "cases": cases}
        arguments.out.write_text(json.dumps(document) + "\n", encoding="utf-8")
        print(name, flush=True)


def logs(count: int) -> dict[str, list[Request]]:
    """Held-out code and prose read as they are and gone on from, and text of another domain."""
    read, generated = [], []
    for domain in ("code", "docs"):
        read += [Request(domain, text, False, domain) for text in pieces(domain, count, TEXT)]
        prompts = pieces(domain, count, PROMPT)
        generated += [Request(domain, text, True, domain) for text in prompts]
    other = [Request("headers", text, False, None) for text in pieces("headers", count, TEXT)]
    return {"read": read, "generated": generated, "other": other}


def pieces(domain: str, count: int, size: int) -> list[str]:
    """Evenly spread over a domain's held-out text."""
    text = (HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8")
    return [text[at : at + size] for at in range(0, len(text) - size, len(text) // count)][:count]


def measure(model: Model, requests: Sequence[Request], picture: Path) -> dict[str, Any]:
    """Replays a log with every token compared."""
    known = watched(model)
    replayed = replay(
        model, requests, known.promise, SILENT, share=SHARE, false_alarms=FALSE_ALARMS,
        max_new_tokens=NEW_TOKENS, seed=0,
    )  # fmt: skip
    report = make_report(model.manifest.model.name, known, replayed, SHARE, FALSE_ALARMS)
    picture.write_bytes(draw(report))
    losses: dict[str, list[float | None]] = {}
    for each in replayed:
        losses.setdefault(each.request.domain or "other", []).append(each.unit.loss)
    return {"report": report.model_dump(mode="json"), "losses": losses}


def cost(model: Model, count: int) -> dict[str, Any]:
    """Seconds of generations with and without shadow checks, taking turns, and of the checks."""
    prompts = pieces("code", count, PROMPT)[:40]
    monitor = Monitor(SERVICE_SHARE, seed=0)
    samples: dict[str, list[float]] = {"plain": [], "watched": [], "with_checks": []}
    for prompt in prompts:
        plain = model.generate(prompt, exit="auto", max_new_tokens=NEW_TOKENS)
        start = time.perf_counter()
        seen = model.generate(prompt, exit="auto", max_new_tokens=NEW_TOKENS, monitor=monitor)
        samples["with_checks"].append(time.perf_counter() - start)
        for key, generation in (("plain", plain), ("watched", seen)):
            samples[key].append(len(generation.prompts[0].token_ids) / generation.tokens_per_second)
    return {
        "share": SERVICE_SHARE,
        "checks": monitor.stats.shadow_checks,
        "seconds": samples,
        "watched_over_plain": sum(samples["watched"]) / sum(samples["plain"]),
        "with_checks_over_plain": sum(samples["with_checks"]) / sum(samples["plain"]),
    }


if __name__ == "__main__":
    main()
