"""Text that the model writes for its promise: planned, written, read again."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CalibrationError, UsageError
from ojfa_export.models.calibration_text import CalibrationText
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.promises.self_text import DOMAIN, divide, windows_to_write
from ojfa_export.promises.windows import PromiseWindows
from ojfa_export.system.heap import trim_heap
from ojfa_export.system.progress import Progress
from ojfa_export.writing.packages import require_packages

if TYPE_CHECKING:
    from ojfa_export.writing.self_text import Starts

# Tokens of a window: more windows say more than longer ones.
LENGTH = 256
# Not a seed of `train`, whatever its user chose: what a jump was trained on proves nothing.
SEED = 0x70726F6D << 32


@dataclass(frozen=True)
class SelfText:
    """What the model is to write.

    Attributes:
        windows: How many.
        length: Tokens of each.
        starts: How they begin.
        device: Where it writes.
    """

    windows: int
    length: int
    starts: Starts
    device: str

    @property
    def kinds(self) -> int:
        """Ways in which windows begin."""
        return 2 if self.starts.chat else 1

    @property
    def tokens(self) -> int:
        """In all."""
        return self.windows * self.length

    @property
    def about(self) -> str:
        """What the text is, for people."""
        return self.starts.about(self.tokens)

    def fingerprint(self) -> list[object]:
        """What decides the text, beside model and given text."""
        return [self.windows, self.length, SEED, self.device]


def plan_self_text(
    options: BuildOptions,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    texts: Sequence[CalibrationText],
    rest: Sequence[Int32],
    window: int,
) -> SelfText | None:
    """What the model is to write, if the promise is to be made on that.

    Args:
        options: The user's.
        checkpoint: The model.
        tokenizer: Its tokenizer.
        texts: The sources.
        rest: Of each source, the windows that neither fitted nor chose the shortcut: from their
            words it begins.
        window: Tokens of a window at most.

    Raises:
        OjfaError: A package is missing, a template can't be rendered, or something is too little.
    """
    limits = options.limits
    if options.self_text is None or limits is None:
        return None
    if options.self_text == "beside" and any(text.domain == DOMAIN for text in texts):
        raise UsageError(
            f"a file's domain is called '{DOMAIN}', as what the model writes is",
            hint="name the file's domain another way: --calibration-data DOMAIN=FILE",
        )
    require_packages("a promise on self-text")
    from ojfa_export.writing.frozen import choose_device
    from ojfa_export.writing.self_text import find_starts

    length = min(LENGTH, window)
    names, sources = [text.name for text in texts], [each.ravel() for each in rest]
    if not sum(source.size for source in sources):
        raise CalibrationError(
            "fitting takes all of the text, and leaves none that self-text could begin from",
            hint="give more --calibration-data, or use fewer --calibration-tokens",
        )
    starts = find_starts(
        checkpoint.directory, tokenizer, names, sources, length, "--calibration-data"
    )
    checkpoint.check_vocabulary(max(starts.chat, default=0))
    kinds = 2 if starts.chat else 1
    windows = windows_to_write(options.self_text_windows, limits, kinds)
    return SelfText(windows, length, starts, choose_device(None).type)


def write_self_text(checkpoint: Checkpoint, plan: SelfText, work: Work, progress: Progress) -> None:
    """Lets the model write into the scratch directory; batches that are there are kept."""
    import torch

    from ojfa_export.writing.frozen import Frozen
    from ojfa_export.writing.self_text import write

    frozen = Frozen(checkpoint, torch.device(plan.device))
    directory = work.scratch / DOMAIN
    write(frozen, plan.starts, plan.length, plan.tokens, SEED, directory, progress)
    del frozen
    gc.collect()
    trim_heap()
    if plan.device == "cuda":
        torch.cuda.empty_cache()  # engines are next


def read_self_text(plan: SelfText, work: Work) -> PromiseWindows:
    """What the model wrote, divided."""
    batches = [np.load(path) for path in sorted((work.scratch / DOMAIN).glob("*.npy"))]
    parts = list(map(len, batches))
    return divide(np.concatenate(batches), parts, plan.kinds, plan.starts.given)
