"""The picture of a GPU benchmark: `python -m bench.gpu.plot gpu.json --peers peers.json`.

Milliseconds per token against blocks run, with the time that the memory's bandwidth allows. Prints
the figures that the README quotes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ojfa_export.models.spec import ModelSpec

HALF_BYTES = 2
LABELS = {
    "kernels": "CUDA kernels for the whole step",
    "engines": "TensorRT engines, own attention",
    "onnxruntime-cuda": "ONNX Runtime on CUDA, as CUDA graphs",
}
COLOURS = {"kernels": "#1a6faf", "engines": "#d1711f", "onnxruntime-cuda": "#4c8f3f"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws a GPU benchmark.")
    parser.add_argument("result", type=Path, help="from bench.gpu.tensorrt; a .png comes beside it")
    parser.add_argument("--peers", type=Path, help="from bench.gpu_peers")
    parser.add_argument("--ort", type=Path, help="from bench.gpu_ort")
    parser.add_argument("--past", type=int, default=512)
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text())
    peers = json.loads(options.peers.read_text())["peers"] if options.peers else []
    ort = json.loads(options.ort.read_text())["shapes"] if options.ort else []
    for shape in result["shapes"]:
        for same in (each for each in ort if each["shape"] == shape["shape"]):
            shape["decode"] += same["decode"]
        mine = [peer for peer in peers if peer["shape"] == shape["shape"]]
        shown = [p for p in mine if (p["batch"], p["past"]) == (1, options.past)]
        draw(shape, result, shown, options.past, options.result.with_suffix(".png"))
        describe(shape, result["copy_bytes_per_second"])
        compare(shape, mine)


def step_bytes(spec: ModelSpec, blocks: int, past: int) -> int:
    """Bytes that a step at batch 1 must read: fp16 weights and cache."""
    width, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    mlp = (3 if spec.gated else 2) * spec.hidden_size * spec.intermediate_size
    block = spec.hidden_size * (2 * width + 2 * kv) + mlp
    seen = past + 1 if spec.window is None else min(past + 1, spec.window)
    rank = max(1, spec.hidden_size // 100) + 1
    head = spec.vocab_size * (spec.hidden_size if blocks == spec.blocks else rank)
    return HALF_BYTES * (blocks * (block + 2 * kv * seen) + head)


def rows_of(shape: dict[str, Any], how: str, past: int, batch: int = 1) -> list[dict[str, Any]]:
    """The measured exits of one way to decode."""
    return [
        row
        for row in shape["decode"]
        if (row["decode"], row["past"], row["batch"]) == (how, past, batch)
    ]


def draw(
    shape: dict[str, Any],
    result: dict[str, Any],
    peers: list[dict[str, Any]],
    past: int,
    path: Path,
) -> None:
    """Draws one shape."""
    from matplotlib.figure import Figure

    spec = ModelSpec.model_validate_json(json.dumps(shape["spec"]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for how, label in LABELS.items():
        rows = rows_of(shape, how, past)
        if not rows:
            continue
        blocks, times = [r["blocks"] for r in rows], [r["ms_median"] for r in rows]
        axes.plot(blocks, times, "o-", color=COLOURS[how], label=label, markersize=3)
    exits = list(range(1, spec.blocks + 1))
    speed = result["copy_bytes_per_second"]
    limit = [step_bytes(spec, each, past) / speed * 1e3 for each in exits]
    axes.plot(exits, limit, "--", color="0.5", label=f"reading alone, at {speed / 1e12:.2f} TB/s")
    for peer in peers:
        if peer["peer"].endswith("torch.compile"):
            axes.plot(spec.blocks, peer["ms_median"], "D", color="#7a3e9d", label=peer["peer"])
    axes.set_xlabel("blocks run")
    axes.set_ylabel("ms per token")
    axes.set_xlim(0, spec.blocks + 1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    gpu = result["machine"]["gpu"]
    axes.set_title(f"{shape['shape']}, fp16, batch 1, {past} tokens in the cache, {gpu}")
    figure.savefig(path, dpi=120)


def describe(shape: dict[str, Any], speed: float) -> None:
    """Prints the figures of full depth, of the exits' linearity, and of the host."""
    spec = ModelSpec.model_validate_json(json.dumps(shape["spec"]))
    print(shape["shape"])
    for row in shape["decode"]:
        if row["blocks"] == spec.blocks and row["batch"] == 1:
            share = step_bytes(spec, spec.blocks, row["past"]) / (row["ms_median"] / 1e3) / speed
            print(
                f"  {row['decode']} past {row['past']}: {row['ms_median']:.3f} ms, p95 "
                f"{row['ms_p95']:.3f}, {share:.1%} of the bandwidth of a copy"
            )
    for past in sorted({row["past"] for row in shape["decode"] if row["decode"] == "kernels"}):
        rows = {row["blocks"]: row["ms_median"] for row in rows_of(shape, "kernels", past)}
        first, last = min(rows), max(each for each in rows if each < spec.blocks)
        block = (rows[last] - rows[first]) / (last - first)
        rest = rows[first] - first * block
        worst = max(
            abs(time / (blocks * block + rest) - 1)
            for blocks, time in rows.items()
            if blocks < spec.blocks
        )
        print(f"  past {past}: {block * 1e3:.1f} us a block, {rest * 1e3:.0f} us besides;")
        print(f"    largest deviation of an exit from that line {worst:.1%}")
    parts = shape["parts_us"]
    device = spec.blocks * parts["block by kernels past 512"] + parts["final head by kernels"]
    [full] = [r for r in rows_of(shape, "kernels", 512) if r["blocks"] == spec.blocks]
    print(f"  step less its kernels, past 512: {full['ms_median'] * 1e3 - device:.0f} us")
    for row in shape.get("host_us", []):
        names = ("generating", "sampling", "step", "logits")
        said = ", ".join(f"{name} {row[name]['host_us']:.0f}" for name in names)
        print(f"  host's part at exit {row['blocks']}, us: {said}")
    for row in shape.get("checks", []):
        each = (row["checked_ms_median"] - row["plain_ms_median"]) / row["checks"] * 1e3
        print(
            f"  {row['checks']} checks in {row['blocks']} blocks: {row['share']:+.1%}, "
            f"{each:.1f} us each"
        )
    pasts = {
        row["past"]: row["ms_median"]
        for row in shape["decode"]
        if (row["decode"], row["batch"], row["blocks"]) == ("kernels", 1, spec.blocks)
    }
    short, long = min(pasts), max(pasts)
    more = step_bytes(spec, spec.blocks, long) - step_bytes(spec, spec.blocks, short)
    if more:
        print(
            f"  past {long} against {short}: {pasts[long] - pasts[short]:.3f} ms, of which reading "
            f"explains {more / speed * 1e3:.3f}"
        )


def compare(shape: dict[str, Any], peers: list[dict[str, Any]]) -> None:
    """Prints how many times longer others take for a token at full depth."""
    blocks = shape["spec"]["blocks"]
    full = [row for row in shape["decode"] if row["blocks"] == blocks]
    ours = {
        (row["batch"], row["past"]): row["ms_median"]
        for how in ("engines", "kernels")  # kernels where they run
        for row in full
        if row["decode"] == how
    }
    others = [(row["decode"], row) for row in full if row["decode"].startswith("onnxruntime")]
    for name, row in [*others, *((peer["peer"], peer) for peer in peers)]:
        place = row["batch"], row["past"]
        if place in ours:
            times = row["ms_median"] / ours[place]
            print(
                f"  {name}, batch {place[0]}, past {place[1]}: {row['ms_median']:.2f} ms, "
                f"{times:.2f}x of {ours[place]:.2f}"
            )


if __name__ == "__main__":
    main()
