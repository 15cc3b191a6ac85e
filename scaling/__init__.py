"""Scaling laws from a results table: fits with intervals, figures and one self-contained report."""

from scaling.command import fit_command, report_command
from scaling.nd import NDFit, bootstrap_nd, fit_nd, intervals_nd
from scaling.plots import Reference
from scaling.report import write_report
from scaling.study import Analysis, analyse
from scaling.table import Table, TableError, read_table
from scaling.truth import held_against_truth

__all__ = [
    "Analysis",
    "NDFit",
    "Reference",
    "Table",
    "TableError",
    "analyse",
    "bootstrap_nd",
    "fit_command",
    "fit_nd",
    "held_against_truth",
    "intervals_nd",
    "read_table",
    "report_command",
    "write_report",
]
