"""The calibration report: JSON for programs, one HTML page with pictures for people."""

from ojfa_export.compiler.report.model import CalibrationReport, ExitReport, LatencyRow
from ojfa_export.compiler.report.write import write_report

__all__ = ["CalibrationReport", "ExitReport", "LatencyRow", "write_report"]
