"""Everything that a build reads, checked before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ojfa_export import backends
from ojfa_export.backends.backend import Backend
from ojfa_export.backends.block_jump import check_runs_jump
from ojfa_export.backends.checks import check_runs_checks
from ojfa_export.backends.narrow_cache import with_cache
from ojfa_export.backends.precisions import check_precision
from ojfa_export.backends.quantised import RunsQuantised, check_runs
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.names import exit_names, graph_names
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.compiler.fitted_weights import WeightFitter, fitting_text
from ojfa_export.compiler.fractions import decide_fractions
from ojfa_export.compiler.given import Given, read_given
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.self_text import SelfText, plan_self_text
from ojfa_export.compiler.settings import (
    DEFAULT_GROUP_SIZE,
    BuildSettings,
    Stored,
    decide,
    decide_precision,
)
from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import UsageError
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.kept import KeptWeights, kept_weights
from ojfa_export.graphs.quantised import Quantiser
from ojfa_export.models.calibration_text import (
    CalibrationText,
    Windows,
    make_windows,
    read_source,
    shipped_text,
)
from ojfa_export.models.chat_format import ChatFormat
from ojfa_export.models.checkpoint.chat import read_chat
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.hub import resolve
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.promises.windows import PromiseWindows, planning_windows, promise_windows
from ojfa_export.shortcuts.fit import rows_needed
from ojfa_export.verify.exact import ExactModel


class Inputs:
    """Everything that a build reads, checked before anything is written.

    Raises:
        OjfaError: Anything is missing, damaged, unsupported or out of range.
    """

    def __init__(self, options: BuildOptions) -> None:
        self.options = options
        directory = resolve(options.checkpoint, options.revision)
        self.checkpoint = Checkpoint(directory, options.ignore_config_fields)
        self.tokenizer: Tokenizer = read_tokenizer(directory)
        self.chat: ChatFormat | None = read_chat(directory, self.tokenizer)
        rotary = self.checkpoint.family.rotary(self.checkpoint.config)
        self.backend: Backend = backends.load(options.backend)
        self.kept: KeptWeights | None = kept_weights(self.checkpoint, self._float_groups())
        self.settings: BuildSettings = decide(
            options, self.checkpoint.spec, rotary, self._stored(), self._group_sizes()
        )
        self.backend = with_cache(self.backend, options.cache, self.settings.precision)
        self._form = self.settings.weight_format
        check_runs(self.backend, self.weight_format, self.settings.precision)
        check_precision(self.backend, self.settings.precision)
        check_runs_checks(self.backend, self.settings.check_vocabulary)
        self.calibration_data = options.calibration_data or tuple(shipped_text())
        self.texts: list[CalibrationText] = [read_source(path) for path in self.calibration_data]
        is_directory = Path(options.checkpoint).is_dir()
        self.name = directory.resolve().name if is_directory else options.checkpoint
        self.windows: Windows = make_windows(
            self.texts,
            self.tokenizer,
            self.settings.window,
            self.settings.calibration_tokens,
            rows_needed(self.checkpoint.spec.hidden_size),
        )
        self.statistics_windows: PromiseWindows | None = self._statistics_windows()
        windows = (self.windows.fit, self.windows.held_out, *self.windows.rest)
        self.checkpoint.check_vocabulary(max(int(ids.max(initial=0)) for ids in windows))
        self.self_text: SelfText | None = plan_self_text(
            options,
            self.checkpoint,
            self.tokenizer,
            self.texts,
            self.windows.rest,
            self.settings.window,
        )
        self.checkpoint.check_tensors()
        self._decide_fractions()
        self.model_sha256 = self.checkpoint.sha256()
        self.given: Given = read_given(options.shortcuts, self.checkpoint, self.model_sha256)
        if self.given.exits is not None and options.rank is not None:
            raise UsageError(
                f"rank {options.rank} is given, and a shortcut that exists: "
                f"{self.given.exits_path}",
                hint="leave --rank out",
            )

        if isinstance(self.given.exits, BlockShortcut):
            check_runs_jump(self.backend, self.given.exits.exits)
        if self.given.draft is not None and self.settings.weights is not None:
            raise UsageError(
                f"weights {self.settings.weights} can't go with a draft layer: "
                f"{self.given.draft_path}",
                hint="leave one of them out",
            )
        self._check_draft_vocabulary()

    def _decide_fractions(self) -> None:
        form, backend = self._form, self.backend
        runs = isinstance(backend, RunsQuantised) and backend.runs_offsets
        if form is not None and form.storage == "int4" and self.kept is None and runs:
            self._form = decide_fractions(self.checkpoint, form)

    def _check_draft_vocabulary(self) -> None:
        asked, draft = self.options.draft_vocabulary, self.given.draft
        if not asked:
            return
        if draft is None:
            raise UsageError(
                f"draft-vocabulary {asked} is asked for, and there is no draft layer",
                hint="give one with --shortcut, or leave --draft-vocabulary out",
            )
        if draft.head is not None:
            raise UsageError(
                f"draft-vocabulary {asked} is asked for, and {self.given.draft_path} has a head of "
                f"its own, over {len(draft.head)} tokens",
                hint="leave --draft-vocabulary out",
            )

    def exporter(self, directory: Path) -> Exporter:
        """What writes the graphs into a directory."""
        settings, form = self.settings, self.weight_format
        quantiser = None
        if self.kept is None and form is not None and isinstance(self.backend, RunsQuantised):
            quantiser = Quantiser(form, self.backend.quantise)
        exporter = Exporter(
            self.checkpoint,
            directory,
            settings.precision,
            settings.max_cache_length,
            quantiser,
            self.kept,
        )
        if quantiser is not None and self.fitted_text is not None:
            rotary = self.checkpoint.family.rotary(self.checkpoint.config)
            tables = None if rotary is None else rotary.tables(settings.max_cache_length)
            exact = ExactModel(self.checkpoint.spec, directory, tables)
            exporter.fitter = WeightFitter(exact, self.fitted_text, quantiser)
        return exporter

    @property
    def exit_names(self) -> list[str]:
        """Graphs of the shortcut."""
        return exit_names(self._exit_blocks)

    @property
    def graph_names(self) -> list[str]:
        """All graphs of the model and its shortcut, in the order of the computation."""
        return graph_names(self.checkpoint.spec.blocks, self._exit_blocks)

    @property
    def _exit_blocks(self) -> int:
        exits = self.given.exits
        return exits.blocks if isinstance(exits, BlockShortcut) else 0

    @property
    def fitted_text(self) -> Int32 | None:
        """Windows that weights of four bits are fitted to; None without such."""
        is_fitted = self.settings.weights == "int4" and self.kept is None
        return fitting_text(self.windows.fit) if is_fitted else None

    @property
    def weight_format(self) -> WeightFormat | None:
        """What quantised matrices are stored as; None where none is."""
        return self._form if self.kept is None else self.kept.form

    def _group_sizes(self) -> tuple[int, ...]:
        """Of quantised weights that the backend runs, those that it would rather have first."""
        if isinstance(self.backend, RunsQuantised):
            return self.backend.group_sizes
        return (DEFAULT_GROUP_SIZE,)

    def _float_groups(self) -> tuple[int, ...]:
        """Of a checkpoint's 8-bit floats, where the backend runs them beside the precision."""
        backend = self.backend
        if self.checkpoint.layout is None or not isinstance(backend, RunsQuantised):
            return ()
        if backend.lacks("fp8"):
            return ()
        precision = decide_precision(self.options, self.checkpoint.spec)
        return backend.group_sizes if precision in backend.beside_quantised else ()

    def _stored(self) -> Stored | None:
        """What the checkpoint has quantised already."""
        layout = self.checkpoint.layout
        if layout is None:
            return None
        return Stored(layout.name, None if self.kept is None else self.kept.form)

    @property
    def decides_exits(self) -> bool:
        """Whether there is text to look at exits on."""
        return self.statistics_windows is not None or self.self_text is not None

    def _statistics_windows(self) -> PromiseWindows | None:
        """Windows of the files to look at exits on."""
        limits, rest = self.options.limits, self.windows.rest
        if self.options.self_text == "alone":
            return None
        if limits is None:
            return planning_windows(self.texts, rest)
        return promise_windows(self.texts, rest, limits)

    @property
    def calibrated(self) -> Int32:
        """Windows that the shortcut is fitted and measured on: [n, length] token ids.

        A shortcut that is given is only measured.
        """
        if self.given.exits is not None:
            return self.windows.held_out
        return np.concatenate([self.windows.fit, self.windows.held_out])
