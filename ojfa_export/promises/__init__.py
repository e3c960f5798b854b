"""Promises on how much early exits may differ from the full model: chosen, certified, watched."""

from ojfa_export.bundle.promise import DomainEvidence, Limits, Promise, check_limits
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.certify import certify
from ojfa_export.promises.measures import MEASURES, confidences
from ojfa_export.promises.outcomes import Costs, Outcome, apply
from ojfa_export.promises.statistics import ExitStatistics, load_statistics, save_statistics
from ojfa_export.runtime.disagreement import DisagreementMonitor, State

__all__ = [
    "MEASURES",
    "Costs",
    "DisagreementMonitor",
    "DomainEvidence",
    "ExitPolicy",
    "ExitStatistics",
    "Limits",
    "Measure",
    "Outcome",
    "Promise",
    "State",
    "apply",
    "certify",
    "check_limits",
    "confidences",
    "load_statistics",
    "save_statistics",
]
