"""The clients that people measure servers with: `python -m bench.serving.clients --help`.

guidellm and aiperf, each in every way that it sends requests to a server of completions and chats,
against `ojfa-export serve` on the demo checkpoint with a plain chat template. Says of each way how
many requests came to an end and what the client measured; fails where one did not. Each client is
in an environment of its own:

    python -m venv g && g/bin/pip install guidellm==0.8.*
    python -m venv a && a/bin/pip install aiperf==0.13.*
    python -m bench.serving.clients --guidellm g/bin/guidellm --aiperf a/bin/aiperf
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ojfa_export
from bench.serving.http import Started
from bench.serving.result import write_result

CHECKPOINT = Path(__file__).parents[2] / "calibration" / "demo" / "checkpoint"
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
SLOTS, PROMPT, TOKENS, PATIENCE = 8, 64, 32, 300
# Requests of a trace, at once and after a while, in the words of each client.
TRACE = [(0.0, 40, 8), (0.1, 60, 12), (0.2, 20, 16), (0.8, 50, 8)]

_SYNTHETIC = f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={TOKENS}"
_FEW = ("--constraint", "kind=max_requests,count=16")
GUIDELLM: dict[str, tuple[str, ...]] = {
    "completions": ("/v1/completions", "true", "kind=concurrent,streams=4", *_FEW),
    "completions, whole": ("/v1/completions", "false", "kind=concurrent,streams=4", *_FEW),
    "chat": ("/v1/chat/completions", "true", "kind=concurrent,streams=4", *_FEW),
    "chat, whole": ("/v1/chat/completions", "false", "kind=concurrent,streams=4", *_FEW),
    "synchronous": ("/v1/completions", "true", "kind=synchronous", *_FEW),
    "throughput": ("/v1/completions", "true", "kind=throughput,max_concurrency=16", *_FEW),
    "constant": ("/v1/completions", "true", "kind=constant,rate=8", *_FEW),
    "poisson": ("/v1/completions", "true", "kind=poisson,rate=8", *_FEW),
    "sweep": ("/v1/completions", "true", "kind=sweep,sweep_size=4", *_FEW),
    "goodput": (
        "/v1/completions", "true", "kind=goodput,initial_streams=2,max_streams=4", *_FEW,
        "--metrics", '{"kind": "generative", "slo": {"ttft_ms": 5000}}',
    ),
    "knee": ("/v1/completions", "true", "kind=knee,min_streams=1,max_streams=5,count=5", *_FEW),
    "turns": (
        "/v1/chat/completions", "true", "kind=concurrent,streams=2", *_FEW,
        "--data", f"{_SYNTHETIC},turns=3",
    ),
    "replay": ("/v1/completions", "true", "kind=replay,schedule_turn=timestamp", "--data", "TRACE"),
}  # fmt: skip
_AIPERF = ("--concurrency", "4", "--request-count", "16")
AIPERF: dict[str, tuple[str, ...]] = {
    "completions": ("completions", "--streaming", *_AIPERF),
    "completions, whole": ("completions", *_AIPERF),
    "chat": ("chat", "--streaming", *_AIPERF),
    "chat, whole": ("chat", *_AIPERF),
    "constant": ("completions", "--streaming", "--request-rate", "8", "--request-count", "16",
                 "--arrival-pattern", "constant"),
    "poisson": ("completions", "--streaming", "--request-rate", "8", "--request-count", "16"),
    "gamma": ("completions", "--streaming", "--request-rate", "8", "--request-count", "16",
              "--arrival-pattern", "gamma", "--arrival-smoothness", "2"),
    "turns": ("chat", "--streaming", "--concurrency", "2", "--conversation-num", "4",
              "--conversation-turn-mean", "3"),
    "users": ("chat", "--streaming", "--user-centric-rate", "4", "--num-users", "2",
              "--conversation-turn-mean", "2", "--shared-system-prompt-length", "16",
              "--benchmark-duration", "4"),
    "trace": ("completions", "--streaming", "--fixed-schedule", "--input-file", "TRACE",
              "--custom-dataset-type", "mooncake_trace"),
    "prefixes": ("completions", "--streaming", *_AIPERF, "--prompt-prefix-pool-size", "2",
                 "--prompt-prefix-length", "32"),
    "several prompts": ("completions", *_AIPERF, "--prompt-batch-size", "3"),
    "the server's counts": ("chat", "--streaming", *_AIPERF, "--use-server-token-count"),
    "counts in every chunk": ("chat", "--streaming", *_AIPERF, "--use-server-token-count",
                              "--per-chunk-usage"),
    "max_tokens": ("chat", "--streaming", *_AIPERF, "--use-legacy-max-tokens"),
    "new connections": ("chat", "--streaming", *_AIPERF, "--connection-reuse-strategy", "never"),
    "warming up, ready": ("chat", "--streaming", *_AIPERF, "--warmup-request-count", "4",
                          "--wait-for-model-timeout", "30", "--wait-for-model-mode", "both"),
    "an exit": ("chat", "--streaming", *_AIPERF, "--extra-inputs", "exit:6"),
    "goodput": ("chat", "--streaming", *_AIPERF, "--goodput", "time_to_first_token:5000"),
    "cancelling": ("chat", "--streaming", *_AIPERF, "--request-cancellation-rate", "50",
                   "--request-cancellation-delay", "0.05"),
}  # fmt: skip


def guidellm(program: str, way: tuple[str, ...], url: str, checkpoint: Path) -> dict[str, Any]:
    """Runs guidellm in one way.

    Returns:
        Its requests by how they ended, and medians of what it measured.
    """
    path, stream, profile, *rest = way
    more = [_trace(checkpoint, each, "timestamp", 1.0) for each in rest]
    if "--data" not in more:
        more += ["--data", _SYNTHETIC]
    report = checkpoint.parent / "guidellm.json"
    done = _run([
        program, "run", "--profile", profile, *more, "--disable-progress",
        "--backend", f"kind=openai_http,target={url},request_format={path},stream={stream}",
        "--tokenizer", f"kind=hf_auto,model={checkpoint}", "--output", f"kind=json,path={report}",
    ])  # fmt: skip
    if done:
        return {"failed": done}
    benchmarks = json.loads(report.read_text())["benchmarks"]
    # Of the client's scheduler: its metrics sometimes lack a request that has ended.
    states = [each["scheduler_state"] for each in benchmarks]
    last = benchmarks[-1]["metrics"]
    return {
        "benchmarks": len(benchmarks),
        "sent": sum(each["created_requests"] for each in states),
        "ended": sum(each["successful_requests"] for each in states),
        "errors": sum(each["errored_requests"] for each in states),
        "in the metrics": sum(
            each["metrics"]["request_totals"]["successful"] for each in benchmarks
        ),
        "first token, ms": _round(last["time_to_first_token_ms"]["successful"]["median"]),
        "between tokens, ms": _round(last["inter_token_latency_ms"]["successful"]["median"]),
        "request, s": _round(last["request_latency"]["successful"]["median"]),
    }


def aiperf(program: str, way: tuple[str, ...], url: str, checkpoint: Path) -> dict[str, Any]:
    """Runs aiperf in one way; see `guidellm`."""
    kind, *rest = way
    more = [_trace(checkpoint, each, "timestamp", 1000.0) for each in rest]
    place = checkpoint.parent / "aiperf"
    shutil.rmtree(place, ignore_errors=True)
    sizes = [] if "--input-file" in more else ["--isl", str(PROMPT), "--osl", str(TOKENS)]
    done = _run([
        program, "profile", "-m", "demo", "--url", url, "--endpoint-type", kind, *more, *sizes,
        "--tokenizer", str(checkpoint), "--ui", "none", "--workers-max", "1",
        "--output-artifact-dir", str(place),
    ])  # fmt: skip
    if done:
        return {"failed": done}
    found = json.loads((place / "profile_export_aiperf.json").read_text())
    metrics = json.loads((place / "server_metrics_export.json").read_text())
    errors = {f"{each['error_details']['type']}": each["count"] for each in found["error_summary"]}
    return {
        "ended": int(found.get("request_count", {}).get("avg", 0)),
        "errors": errors,
        "server's metrics": sum(name.startswith("ojfa:") for name in metrics["metrics"]),
        "first token, ms": _round(found.get("time_to_first_token", {}).get("p50")),
        "between tokens, ms": _round(found.get("inter_token_latency", {}).get("p50")),
        "request, s": _round(found["request_latency"]["p50"] / 1000),
    }


def _trace(checkpoint: Path, argument: str, stamp: str, unit: float) -> str:
    """Writes the trace where an argument names it."""
    if argument != "TRACE":
        return argument
    file = checkpoint.parent / "trace.jsonl"
    rows = [
        {stamp: round(at * unit, 3), "input_length": tokens, "output_length": new}
        for at, tokens, new in TRACE
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        str(file) if unit > 1 else f"kind=trace_synthetic,source.kind=json_file,source.path={file}"
    )


def _run(command: list[str]) -> str:
    """Runs a client; gives the end of what it said where it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"it took more than {PATIENCE} s"
    return (done.stdout + done.stderr)[-2000:] if done.returncode else ""


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _make_bundle(place: Path) -> tuple[Path, Path]:
    """The demo checkpoint with a chat template, and a bundle of it."""
    checkpoint, bundle = place / "checkpoint", place / "demo.ojfa"
    shutil.copytree(CHECKPOINT, checkpoint)
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    build = [sys.executable, "-m", "ojfa_export", "build", str(checkpoint), "-o", str(bundle)]
    subprocess.run(
        [*build, "--shortcut", "ojfa", "--rank", "96", "--skip-verification"], check=True
    )
    return checkpoint, bundle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guidellm", help="the program; left out where it isn't given")
    parser.add_argument("--aiperf", help="the program; left out where it isn't given")
    parser.add_argument("--only", help="ways whose names hold this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, bundle = _make_bundle(Path(temporary))
        server = Started(bundle, SLOTS)
        url = f"http://127.0.0.1:{server.port}"
        clients = ((args.guidellm, guidellm, GUIDELLM), (args.aiperf, aiperf, AIPERF))
        try:
            for program, run, ways in clients:
                for name, way in ways.items() if program else ():
                    if args.only is None or args.only in name:
                        key = f"{run.__name__}: {name}"
                        found[key] = run(program, way, url, checkpoint)
                        print(key, found[key], flush=True)
        finally:
            status = server.stop()
        versions = {Path(program).name: _version(program) for program, _, _ in clients if program}
        write_result(args.out, ojfa_export.load(bundle), versions, {"ways": found})
    bad = [name for name, each in found.items() if _is_bad(name, each)]
    if bad or status:
        sys.exit(f"failed: {', '.join(bad) or f'exit status {status}'}")


def _is_bad(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a way went wrong; those that were to be cancelled may be counted as errors."""
    expected = "cancelling" in name
    if (
        "failed" in found
        or not found["ended"]
        or found.get("sent", found["ended"]) != found["ended"]
    ):
        return True
    return bool(found["errors"]) and not expected


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
