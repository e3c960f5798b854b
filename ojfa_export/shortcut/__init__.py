"""The shortcut: fitted in closed form, chosen by measurement, folded into an exit head."""

from ojfa_export.shortcut.choose import Choice, TransferMatrix, choose, transfer_matrix
from ojfa_export.shortcut.fit import fit_levels, fit_n_njtc, rows_needed, training_loss
from ojfa_export.shortcut.fold import FoldedHead, fold
from ojfa_export.shortcut.head import FinalNorm, LanguageHead
from ojfa_export.shortcut.metrics import ExitQuality, FullModelReference, evaluate
from ojfa_export.shortcut.moments import Moments
from ojfa_export.shortcut.shortcut import FORMAT_VERSION, Shortcut, load, save

__all__ = [
    "FORMAT_VERSION",
    "Choice",
    "ExitQuality",
    "FinalNorm",
    "FoldedHead",
    "FullModelReference",
    "LanguageHead",
    "Moments",
    "Shortcut",
    "TransferMatrix",
    "choose",
    "evaluate",
    "fit_levels",
    "fit_n_njtc",
    "fold",
    "load",
    "rows_needed",
    "save",
    "training_loss",
    "transfer_matrix",
]
