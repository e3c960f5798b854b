"""What exits per token save under a promise, by kind of jump and by what a check looks at.

    python -m bench.quality.promised STATISTICS --shape llama2-7b --shape smollm2-135m \
        --out bench/results/promised-smollm2.json

STATISTICS is what `bench.quality.trained --statistics` kept: KIND-TOKENS.npz, of text that the
model wrote, with a check of the whole head (0) or of its most frequent tokens. For each share of
tokens that may differ, exits and thresholds are chosen and certified as a build does it. Costs are
the numbers that are read at a model's shape, in blocks; tokens that wait are counted by what one
more token of a pass was measured to take. So this is what can be saved at the shape's relative
costs; times of a bundle are `ojfa-export plan`'s and `bench.quality.ways`'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.commit import commit
from ojfa_export.bundle.promise import Limits
from ojfa_export.compiler.check_stage import DEFAULT_TOKENS
from ojfa_export.planning.machine import describe_machine
from ojfa_export.promises.certify import certify
from ojfa_export.promises.measures import MEASURES
from ojfa_export.promises.outcomes import Costs
from ojfa_export.promises.statistics import ExitStatistics, load_statistics
from ojfa_export.system.pictures import png

LIMITS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
COLOURS = {"mlp": "#D55E00", "block": "#009E73", "residual": "#0072B2", "block-each": "#CC79A7"}
WHOLE = "the whole head"


@dataclass(frozen=True)
class Shape:
    """What a model reads for a token, in numbers.

    Attributes:
        hidden: H.
        mlp: Features of an MLP, which is gated.
        keys: Features of all key-value heads; queries have H.
        vocabulary: V.
        blocks: L.
        one_more: What one more token of a pass takes of a block's time.
    """

    hidden: int
    mlp: int
    keys: int
    vocabulary: int
    blocks: int
    one_more: float

    @property
    def block(self) -> int:
        """Numbers of a block."""
        return self.numbers_of_mlp + 2 * self.hidden * (self.hidden + self.keys)

    @property
    def numbers_of_mlp(self) -> int:
        """Of its MLP."""
        return 3 * self.hidden * self.mlp

    def jump(self, kind: str) -> float:
        """Numbers of a jump, in blocks; a residual one has the rank that `train` takes."""
        if kind == "mlp":
            return self.numbers_of_mlp / self.block
        if kind == "residual":
            return 2 * self.hidden * (self.hidden // 8) / self.block
        return 1.0

    def head(self, share: float) -> float:
        """Numbers of a share of the head's tokens, in blocks."""
        return share * self.hidden * self.vocabulary / self.block


# One more token: 3.79 and 4.31 ms for 1 and 4 requests on an H200
# (gpu-h200-serving-beside-vllm.json); of SmolLM2 in fp32 on two cores about a quarter of a step.
SHAPES = {
    "llama2-7b": Shape(4096, 11008, 4096, 32000, 32, 0.045),
    "smollm2-135m": Shape(576, 1536, 192, 49152, 30, 0.25),
}


def main() -> None:
    """Certifies, records and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--shape", action="append", choices=SHAPES, default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = rows(arguments.statistics, arguments.shape or list(SHAPES))
    document = {"commit": commit(), "machine": describe_machine(), "rows": found}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".png").write_bytes(draw(found))


def rows(directory: Path, shapes: Sequence[str]) -> list[dict[str, Any]]:
    """What every kind and check saves at every limit."""
    found: list[dict[str, Any]] = []
    for path in sorted(directory.glob("*.npz")):
        kind, _, tokens = path.stem.rpartition("-")
        splits = load_statistics(path)
        for name in shapes:
            costs = costs_of(SHAPES[name], kind, int(tokens), splits["tuning"].blocks)
            for limit in LIMITS:
                row = {"shape": name, "kind": kind, "check": int(tokens), "limit": limit}
                found.append(row | saved(splits, limit, costs))
                print(found[-1], flush=True)
    return found


def costs_of(shape: Shape, kind: str, tokens: int, blocks: int) -> Costs:
    """Of a token, in blocks of the model whose exits were looked at.

    Args:
        shape: Of the model whose costs they are; exits are taken at the same share of its depth.
        kind: Of jump.
        tokens: That a check looks at, of the model that was looked at; 0 for all.
        blocks: Of that model.
    """
    scale = blocks / shape.blocks
    share = tokens / SHAPES["smollm2-135m"].vocabulary if tokens else 1.0
    check = scale * (shape.jump(kind) + shape.head(share))
    head = scale * shape.head(1.0)
    return Costs(
        tuple(float(depth) for depth in range(1, blocks + 1)),
        dict.fromkeys(MEASURES, check),
        head,
        waiting=shape.one_more,
        leaving=head if tokens else 0.0,
    )


def saved(splits: Mapping[str, ExitStatistics], limit: float, costs: Costs) -> dict[str, Any]:
    """The certified policy, and what it saves of full depth."""
    promise = certify(
        splits["tuning"], splits["certification"], Limits(max_disagreement=limit), costs
    )
    [evidence] = promise.domains
    return {
        "saves": 1 - promise.relative_cost,
        "differs": evidence.disagreement,
        "depth": evidence.depth,
        "tokens": evidence.tokens,
        "policy": None if promise.policy is None else promise.policy.model_dump(mode="json"),
    }


def draw(found: Sequence[Mapping[str, Any]]) -> bytes:
    """What is saved by what may differ, a panel for each shape: a PNG file's bytes."""
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    figure = Figure(figsize=(5.5 * len(shapes), 4), layout="constrained")
    several = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axes, shape in zip(several, shapes, strict=True):
        here = [row for row in found if row["shape"] == shape]
        for kind in dict.fromkeys(row["kind"] for row in here):
            of_kind = [row for row in here if row["kind"] == kind]
            for check in sorted({row["check"] for row in of_kind} & {0, DEFAULT_TOKENS}):
                line = [row for row in of_kind if row["check"] == check]
                asks = f"check of {check:,} tokens" if check else f"check of {WHOLE}"
                axes.plot(
                    [row["limit"] for row in line],
                    [row["saves"] for row in line],
                    "o-" if check else "o:",
                    color=COLOURS.get(kind),
                    label=f"{kind}, {asks}",
                )
        axes.set_title(f"at {shape}'s relative costs")
        axes.set_xlabel("promised: tokens that may differ")
        axes.set_xticks([0, 0.05, 0.1, 0.15, 0.2])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylim(bottom=0)
    several[0].set_ylabel("saved of a token's cost at full depth")
    several[0].legend(frameon=False)
    figure.suptitle("Exits per token of SmolLM2, on text that it writes, certified at 95%")
    return png(figure)


if __name__ == "__main__":
    main()
