"""Trains kinds of jump on a checkpoint, and draws how often they agree with the full model.

python -m bench.quality.trained calibration/demo/checkpoint --tokens 300k --kind mlp \
    --kind residual --rank 96 --calibrate --out bench/results/trained-demo.json

The last eighth of each text is held out from training and from calibration alike; all are measured
there. With --self-text they train on what the model writes, and are measured on that too. Drafts
have a picture of their own, FILE-drafts.png. `--kind block:2` takes two passes over the text where
others take `--passes`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.commit import commit
from bench.quality.exit_statistics import Promised
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import load, save
from ojfa_export.cli.progress import Lines
from ojfa_export.cli.train import read_exits
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.parts import calibrate_only
from ojfa_export.models.calibration_text import read_source, shipped_text
from ojfa_export.planning.machine import PACKAGES, describe_machine
from ojfa_export.system.pictures import png, whole_ticks
from ojfa_export.system.progress import SILENT
from ojfa_export.training import divergence
from ojfa_export.training.draw import held_out_positions
from ojfa_export.training.inputs import Inputs
from ojfa_export.training.kinds import KINDS
from ojfa_export.training.kinds.jump import Jump
from ojfa_export.training.kinds.mlp import MULTIPLE, Mlp
from ojfa_export.training.kinds.residual import Residual
from ojfa_export.training.loop import Trained, train_jump
from ojfa_export.training.options import TrainOptions
from ojfa_export.training.sizes import HELD_OUT_TOKENS, HELD_OUT_WINDOWS, choose
from ojfa_export.training.state import Keeper
from ojfa_export.training.windows import TrainingText, token_ids
from ojfa_export.writing.frozen import Frozen
from ojfa_export.writing.self_text import write

HELD_OUT_SHARE = 8
SELF_WRITTEN = "that the model wrote"  # what `Starts.about` says
COLOURS = {
    "identity": "#666666",
    "calibrated": "#E69F00",
    "residual": "#0072B2",
    "mlp": "#D55E00",
    "block": "#009E73",
}
TITLES = {"identity": "no jump", "calibrated": "residual, calibrated"}


def main() -> None:
    """Trains, measures, records and draws."""
    arguments = _arguments()
    before = commit()
    with tempfile.TemporaryDirectory() as temporary:
        document = run(arguments, Path(temporary))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"commit": before, **document}, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    by_unit = {
        chained: [row for row in document["kinds"] if ("chain" in row) == chained]
        for chained in (False, True)
    }
    arguments.out.with_suffix(".png").write_bytes(draw(document, by_unit[False]))
    if by_unit[True]:
        path = arguments.out.with_name(f"{arguments.out.stem}-drafts.png")
        path.write_bytes(draw_drafts(document, by_unit[True]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--kind", action="append", type=read_kind, default=[], metavar="KIND[:PASSES]"
    )
    parser.add_argument("--calibrate", action="store_true", help="the residual jump of `calibrate`")
    parser.add_argument("--width", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--exits", type=read_exits, help="of a block: one for each, beside")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--self-text", action="store_true")
    parser.add_argument("--text-cache", type=Path, help="keeps what the model writes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keeps the jumps, as files")
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="DIR",
        help="keeps what exits say, for bench.quality.promised",
    )
    parser.add_argument("--check", type=int, action="append", default=[], metavar="TOKENS")
    parser.add_argument("--tokens", default="8M")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def read_kind(asked: str) -> tuple[str, int | None]:
    """A kind, and the passes it asks for."""
    kind, _, passes = asked.partition(":")
    if kind not in KINDS or (passes and not passes.isdecimal()):
        raise argparse.ArgumentTypeError(f"{asked} isn't one of {', '.join(KINDS)}")
    return kind, int(passes) if passes else None


def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything, without the commit."""
    fitting, held_out = split(arguments.text or shipped_text(), directory)
    options = TrainOptions(
        arguments.checkpoint,
        directory / "unused.safetensors",
        text=tuple(fitting),
        self_text=arguments.self_text,
        tokens=arguments.tokens,
        device=arguments.device,
        seed=arguments.seed,
    )
    inputs = Inputs(options)
    frozen, progress = Frozen(inputs.checkpoint, inputs.device), _lines()
    text, writing = inputs.text, 0.0
    if text is None:
        assert inputs.starts is not None
        start = time.perf_counter()
        length, tokens, seed = inputs.length, options.tokens, options.seed
        kept = (arguments.text_cache or directory) / inputs.fingerprint()[:16]
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = write(frozen, inputs.starts, length, tokens, seed, kept, progress)
        text = TrainingText.of(written)
        writing = time.perf_counter() - start
    promised = None
    if arguments.statistics is not None:
        checks, windows = arguments.check, directory / "promised"
        promised = Promised(arguments.statistics, checks, inputs, text, windows, _lines())
    judge = Judge(frozen, inputs, held_out)
    identity = Mlp.begin(frozen, text, MULTIPLE, 0).to(frozen.device)
    rows = [{"kind": "identity", "parameters": 0, **judge.figures(identity)}]
    if arguments.calibrate:
        rows.append(calibrated(arguments, fitting, directory, judge))
    for kind, several in arguments.kind or [(kind, None) for kind in KINDS]:
        passes = several or arguments.passes
        for asked in _shapes(arguments, kind):
            row, jump = trained(arguments, kind, asked, passes, frozen, text, directory, judge)
            shortcut = jump.shortcut()
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.keep is not None:
                name = f"{kind}-each.safetensors" if row.get("exits") else f"{kind}.safetensors"
                arguments.keep.mkdir(parents=True, exist_ok=True)
                save(shortcut, arguments.keep / name, inputs.model_sha256)
            if promised is not None and "chain" not in row:
                promised.keep(jump, f"{kind}-each" if row.get("exits") else kind)
    return {
        "machine": describe_machine((*PACKAGES, "torch", "transformers")),
        "device": _device(inputs.device),
        "model": Path(arguments.checkpoint).resolve().parent.name,
        "text": text.about,
        "writing_seconds": round(writing, 1),  # of what wasn't kept
        "held_out_tokens": judge.tokens,
        "seed": arguments.seed,
        "kinds": rows,
    }


def _shapes(arguments: argparse.Namespace, kind: str) -> list[Any]:
    """Values of the kind's option to train with: of a block one for all exits, and one each."""
    if kind == "block":
        return [None, arguments.exits] if arguments.exits else [None]
    return [getattr(arguments, KINDS[kind].option)]


def split(texts: Sequence[Path], directory: Path) -> tuple[list[Path], list[Path]]:
    """Files of the first seven eighths of each text, and of the rest."""
    fitting, held_out = directory / "fitting", directory / "held_out"
    for folder in (fitting, held_out):
        folder.mkdir()
    for path in texts:
        text = "\n".join(read_source(path).documents)
        cut = len(text) - len(text) // HELD_OUT_SHARE
        (fitting / f"{path.stem}.txt").write_text(text[:cut], encoding="utf-8")
        (held_out / f"{path.stem}.txt").write_text(text[cut:], encoding="utf-8")
    return sorted(fitting.iterdir()), sorted(held_out.iterdir())


class Judge:
    """Measures jumps on held-out text that neither training nor calibration saw."""

    def __init__(self, frozen: Frozen, inputs: Inputs, files: Sequence[Path]) -> None:
        ids = token_ids(
            [read_source(path) for path in files], inputs.tokenizer, HELD_OUT_TOKENS * 64
        )
        length = inputs.length
        each = max(1, HELD_OUT_WINDOWS // len(ids))
        parts = [torch.from_numpy(i[: len(i) // length * length].copy()) for i in ids]
        self._windows = torch.cat([part.view(-1, length)[:each] for part in parts]).long()
        self._frozen, self.device = frozen, frozen.device
        sizes = choose(frozen.spec, len(self._windows), length, 1, 1, frozen.memory_left)
        self._at_once = sizes.rows_at_once, sizes.logits_rows
        self.tokens = 0

    def figures(self, jump: Jump) -> dict[str, Any]:
        """Agreement and loss of every output."""
        count, length = self._windows.shape
        positions = held_out_positions(
            0, count, length, jump.first, HELD_OUT_TOKENS, together=jump.chained
        )
        self.tokens = max(self.tokens, positions.size)
        found = divergence.measure(
            self._frozen, jump, self._windows, torch.from_numpy(positions).long(), *self._at_once
        )
        return {
            "outputs": jump.outputs,
            "mean_agreement": found.mean_agreement,
            "mean_loss": found.mean_loss,
            **shown(found),
        }


def shown(figures: divergence.Figures) -> dict[str, Any]:
    """Figures that there are, for JSON."""
    return {name: value for name, value in vars(figures).items() if value is not None}


def calibrated(
    arguments: argparse.Namespace, fitting: list[Path], directory: Path, judge: Judge
) -> dict[str, Any]:
    """The residual jump that `ojfa-export calibrate` fits on thousands of tokens, and distils."""
    options = BuildOptions(
        arguments.checkpoint,
        directory / "calibrated.safetensors",
        rank=arguments.rank,
        shortcut="residual",
        calibration_data=tuple(fitting),
    )
    start = time.perf_counter()
    calibrate_only(options, SILENT)
    seconds = time.perf_counter() - start
    shortcut, _ = load(options.output)
    assert isinstance(shortcut, Shortcut)
    figures = judge.figures(Residual.of(shortcut).to(judge.device))
    return {
        "kind": "calibrated",
        "rank": shortcut.rank,
        "parameters": shortcut.parameters,
        "seconds": round(seconds, 1),
        **figures,
    }


def trained(
    arguments: argparse.Namespace,
    kind: str,
    asked: Any,
    passes: int,
    frozen: Frozen,
    text: TrainingText,
    directory: Path,
    judge: Judge,
) -> tuple[dict[str, Any], Jump]:
    """One kind: what training it took, and what it gives; the jump."""
    option = KINDS[kind].option
    chosen = KINDS[kind].choose(asked, frozen.spec)
    if frozen.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    jump = KINDS[kind].begin(frozen, text, chosen, arguments.seed)
    keeper = Keeper(directory / f"{kind}-{chosen}.pt")
    found = train_jump(frozen, jump, text, passes, arguments.seed, keeper, _lines())
    row = {
        "kind": kind,
        option: chosen,
        "passes": passes,
        "parameters": jump.shortcut().parameters,
        "seconds": round(found.seconds, 1),
        "tokens_per_second": round(found.tokens / found.seconds),
        "peak_memory_bytes": _peak(frozen.device),
        "steps": found.steps,
        "best_step": found.best_step,
        "history": found.history,
        **judge.figures(jump),
        "on_its_text": _own(found),
    }
    return row, jump


def _own(found: Trained) -> dict[str, Any]:
    """Figures on the part of the training's text that it held out."""
    return {
        "tokens": found.held_out_tokens,
        "begin": shown(found.begin),
        "jump": shown(found.figures),
    }


def _peak(device: torch.device) -> int:
    """Of the GPU's memory, or of the process's up to now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _lines() -> Lines:
    return Lines(sys.stderr)


def draw(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bytes:
    """Agreement by exit on each of the texts, a line for each kind: a PNG file's bytes."""
    given = [(row, row["agreement"]) for row in rows]
    panels = {"on given text": given}
    own = [(row, row["on_its_text"]["jump"]["agreement"]) for row in rows if "on_its_text" in row]
    if SELF_WRITTEN in document["text"]:
        begun = next(row["on_its_text"]["begin"] for row, _ in given if row["kind"] == "mlp")
        panels["on what the model writes"] = [(rows[0], begun["agreement"]), *own]
    figure = Figure(figsize=(6.5 * len(panels), 4), layout="constrained")
    figure.suptitle(f"{document['model']}: agreement with the full model, held out")
    several = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(several, panels.items(), strict=True):
        for row, agreement in lines:
            _line(axes, row, agreement)
        axes.set_title(title)
        axes.set_xlabel("blocks run")
        _finish(axes, len(rows[0]["outputs"]))
    several[0].set_ylabel("same token as the full model")
    return png(figure)


def _line(axes: Axes, row: dict[str, Any], agreement: Sequence[float]) -> None:
    kind, each = row["kind"], " for each exit" if row.get("exits") else ""
    title = TITLES.get(kind, f"{kind}{each}, trained")
    size = f" ({row['parameters'] / 1000:,.0f}k)" if row["parameters"] else ""
    style = "--" if kind == "identity" else "o:" if each else "-"
    axes.plot(row["outputs"], agreement, style, color=COLOURS.get(kind), label=title + size)


def draw_drafts(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bytes:
    """Chains of drafts that agree, by their length: a PNG file's bytes."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        size, given = f"{row['kind']} ({row['parameters'] / 1e6:,.1f}M)", row["chain"]
        axes.plot(row["outputs"], given, "o-", color="#0072B2", label=f"{size}, on given text")
        own = row["on_its_text"]["jump"]["chain"]
        axes.plot(row["outputs"], own, "s--", color="#CC79A7", label=f"{size}, on what it writes")
    axes.set_title(f"{document['model']}: chains of drafts")
    axes.set_xlabel("drafts")
    axes.set_ylabel("all are the full model's tokens")
    _finish(axes, len(rows[0]["outputs"]))
    return png(figure)


def _finish(axes: Axes, outputs: int) -> None:
    axes.set_ylim(0, 1)
    whole_ticks(axes, outputs)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
