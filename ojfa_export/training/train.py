"""`ojfa-export train`: from a checkpoint to the file of a jump."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ojfa_export.bundle.names import SHORTCUT
from ojfa_export.bundle.shortcut_file import save
from ojfa_export.compiler.work import Work, check_output
from ojfa_export.system.progress import SILENT, Progress
from ojfa_export.training.options import TrainOptions
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.packages import require_packages

if TYPE_CHECKING:
    from ojfa_export.training.divergence import Figures
    from ojfa_export.training.inputs import Inputs
    from ojfa_export.training.kinds.jump import Jump
    from ojfa_export.training.loop import Trained


def train(options: TrainOptions, progress: Progress = SILENT) -> dict[str, Any]:
    """Trains a jump on a checkpoint's frozen model and writes its file.

    Args:
        options: What is asked for.
        progress: Shows what is done.

    Returns:
        What came of it, for JSON.

    Raises:
        OjfaError: Bad input.
        OSError: The disk is full, or can't be written.
    """
    check_output(options.output, options.overwrite, holds=None)
    require_packages("training")
    from ojfa_export.training.inputs import Inputs

    inputs = Inputs(options)
    with Work(options.output, inputs.fingerprint()).open() as work:
        jump, text, trained = _train(inputs, work, progress)
        about = {
            "jump": options.jump,
            inputs.kind.option: inputs.chosen,
            "text": text.about,
            "passes": options.passes,
            "seed": options.seed,
            "steps": trained.steps,
            "best_step": trained.best_step,
        }
        shortcut = jump.shortcut()
        result = work.bundle / SHORTCUT
        save(shortcut, result, inputs.model_sha256, training=about)
        check_output(options.output, options.overwrite, holds=None)  # it may have come to be
        work.publish(result)
    return {
        "shortcut": str(options.output),
        **about,
        "parameters": shortcut.parameters,
        "device": str(inputs.device),
        **describe(trained, inputs.kind.unit, jump.outputs),
    }


def describe(trained: Trained, unit: str, outputs: Sequence[int]) -> dict[str, Any]:
    """Figures of a training, for JSON.

    Args:
        trained: What came of it.
        unit: What an output of the jump is.
        outputs: Their numbers.
    """

    def row(figures: Figures, index: int) -> dict[str, float]:
        found = {"loss": figures.loss[index], "agreement": figures.agreement[index]}
        return found if figures.chain is None else {**found, "chain": figures.chain[index]}

    both = {"begin": trained.begin, "jump": trained.figures}

    return {
        "seconds": round(trained.seconds, 1),
        "tokens_per_second": round(trained.tokens / max(trained.seconds, 1e-9)),
        "held_out_tokens": trained.held_out_tokens,
        "history": [{"step": step, "loss": loss} for step, loss in trained.history],
        "outputs": [
            {unit: number, **{name: row(figures, index) for name, figures in both.items()}}
            for index, number in enumerate(outputs)
        ],
    }


def _train(inputs: Inputs, work: Work, progress: Progress) -> tuple[Jump, TrainingText, Trained]:
    """Loads the model, lets it write where that is asked for, and trains."""
    from ojfa_export.training.loop import train_jump
    from ojfa_export.training.state import Keeper
    from ojfa_export.writing.frozen import Frozen
    from ojfa_export.writing.self_text import write

    frozen, options = Frozen(inputs.checkpoint, inputs.device), inputs.options
    text = inputs.text
    if text is None:
        assert inputs.starts is not None
        written = write(
            frozen,
            inputs.starts,
            inputs.length,
            options.tokens,
            options.seed,
            work.scratch / "text",
            progress,
        )
        text = TrainingText.of(written)
    jump = inputs.kind.begin(frozen, text, inputs.chosen, options.seed)
    keeper = Keeper(work.scratch / "state.pt")
    return (
        jump,
        text,
        train_jump(frozen, jump, text, options.passes, options.seed, keeper, progress),
    )
