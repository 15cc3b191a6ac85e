"""Scaling laws from a results table: fits with intervals, figures and one self-contained report."""

from scaling.command import fit_command, report_command
from scaling.joint.allocate import allocate
from scaling.joint.fit import JointFit, fit_joint
from scaling.joint.uncertainty import JointDraws, resample
from scaling.plots import Reference
from scaling.report import write_report
from scaling.study import Analysis, analyse
from scaling.table import Table, TableError, read_table
from scaling.truth import held_against_truth

__all__ = [
    "Analysis",
    "JointDraws",
    "JointFit",
    "Reference",
    "Table",
    "TableError",
    "allocate",
    "analyse",
    "fit_command",
    "fit_joint",
    "held_against_truth",
    "read_table",
    "report_command",
    "resample",
    "write_report",
]
