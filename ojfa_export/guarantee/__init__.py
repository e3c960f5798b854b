"""Promises on how much early exits may differ from the full model: chosen, certified, watched."""

from ojfa_export.guarantee.certify import certify
from ojfa_export.guarantee.confidence import MEASURES, Measure, confidences
from ojfa_export.guarantee.monitor import DisagreementMonitor, State
from ojfa_export.guarantee.policy import Costs, Outcome, ThresholdPolicy, apply
from ojfa_export.guarantee.promise import DomainEvidence, Limits, Promise, check_limits
from ojfa_export.guarantee.statistics import ExitStatistics, load_statistics, save_statistics

__all__ = [
    "MEASURES",
    "Costs",
    "DisagreementMonitor",
    "DomainEvidence",
    "ExitStatistics",
    "Limits",
    "Measure",
    "Outcome",
    "Promise",
    "State",
    "ThresholdPolicy",
    "apply",
    "certify",
    "check_limits",
    "confidences",
    "load_statistics",
    "save_statistics",
]
