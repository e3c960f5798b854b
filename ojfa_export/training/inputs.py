"""Everything that a training reads, checked before anything is written."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ojfa_export.compiler.settings import DEFAULT_WINDOW
from ojfa_export.compiler.versions import tool_versions
from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CheckpointError, UsageError
from ojfa_export.models.calibration_text import CalibrationText, read_source, shipped_text
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.hub import resolve
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.training import windows
from ojfa_export.training.kinds import KINDS
from ojfa_export.training.options import SHAPES, TrainOptions
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import choose_device
from ojfa_export.writing.self_text import Starts, find_starts

if TYPE_CHECKING:
    from ojfa_export.training.kinds.jump import Jump


class Inputs:
    """Everything that a training reads, checked before anything is written.

    Attributes:
        kind: The class of the jump.
        chosen: The value of the option that shapes it.
        length: Tokens of a window.
        text: What to train on, or None where the model is to write it.
        starts: How the model begins to write, or None.

    Raises:
        OjfaError: Anything is missing, damaged, unsupported or out of range.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.device = choose_device(options.device)
        directory = resolve(options.checkpoint, options.revision)
        self.checkpoint = Checkpoint(directory, options.ignore_config_fields)
        spec = self.checkpoint.spec
        if spec.blocks < 2:
            raise CheckpointError(
                f"the model of {self.checkpoint.directory} has one block, and so no exit",
                hint="a jump needs a model of two blocks or more",
            )
        self.kind, self.chosen = self._choose_kind()
        self.tokenizer: Tokenizer = read_tokenizer(self.checkpoint.directory)
        self.length = min(DEFAULT_WINDOW, spec.max_positions, spec.rotary_switch or DEFAULT_WINDOW)
        paths = options.text or tuple(shipped_text())
        self.texts: list[CalibrationText] = [read_source(path) for path in paths]
        # So much at least tells too little text from too few tokens asked for.
        most = max(options.tokens, windows.LEAST_WINDOWS * self.length)
        self.sources: list[Int32] = windows.token_ids(self.texts, self.tokenizer, most)
        self.checkpoint.check_vocabulary(max(int(ids.max(initial=0)) for ids in self.sources))
        self.text, self.starts = self._read_text()
        self.checkpoint.check_tensors()
        self.model_sha256 = self.checkpoint.sha256()

    def fingerprint(self) -> str:
        """Digest of everything that decides the result."""
        options = {
            name: getattr(self.options, name)
            for name in ("jump", "self_text", "tokens", "passes", "seed")
        }
        parts = [
            "train",
            self.model_sha256,
            self.tokenizer.to_str(),
            [[text.name, text.sha256] for text in self.texts],
            {**options, self.kind.option: self.chosen},
            self.device.type,
            tool_versions(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _choose_kind(self) -> tuple[type[Jump], Any]:
        """The class of the jump, and the value of the option that shapes it."""
        options = self.options
        if options.jump not in KINDS:
            raise UsageError(
                f"jump '{options.jump}' is not known", hint=f"known: {', '.join(KINDS)}"
            )
        kind = KINDS[options.jump]
        for name in SHAPES:
            if getattr(options, name) is not None and name != kind.option:
                raise UsageError(
                    f"{name} is nothing that a jump of kind '{options.jump}' has",
                    hint=f"leave --{name} out; what it has is --{kind.option}",
                )
        return kind, kind.choose(getattr(options, kind.option), self.checkpoint.spec)

    def _read_text(self) -> tuple[TrainingText | None, Starts | None]:
        """The text to train on, or how the model begins to write it."""
        names, options = [text.name for text in self.texts], self.options
        if not options.self_text:
            return windows.cut(names, self.sources, self.length, options.tokens), None
        directory = self.checkpoint.directory
        starts = find_starts(directory, self.tokenizer, names, self.sources, self.length, "--text")
        self.checkpoint.check_vocabulary(max(starts.chat, default=0))
        windows.check_enough(-(-options.tokens // self.length), self.length, options.tokens)
        return None, starts
