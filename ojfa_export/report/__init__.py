"""The calibration report: JSON for programs, one HTML page with pictures for people."""

from ojfa_export.report.model import CalibrationReport, Check, ExitReport, LatencyRow
from ojfa_export.report.write import write_report

__all__ = ["CalibrationReport", "Check", "ExitReport", "LatencyRow", "write_report"]
