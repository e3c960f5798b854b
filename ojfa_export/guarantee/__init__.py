"""Promises on how much early exits may differ from the full model: chosen, certified, watched."""

from ojfa_export.guarantee.certify import certify
from ojfa_export.guarantee.confidence import MEASURES, confidences
from ojfa_export.guarantee.monitor import DisagreementMonitor, State
from ojfa_export.guarantee.policy import Costs, Outcome, apply
from ojfa_export.guarantee.promise import DomainEvidence, Limits, Promise, check_limits
from ojfa_export.guarantee.statistics import ExitStatistics, load_statistics, save_statistics
from ojfa_export.runtime.policy import ExitPolicy, Measure

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
