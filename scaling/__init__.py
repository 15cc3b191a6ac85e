"""Scaling laws from a results table: fits with intervals, figures and one self-contained report."""

from scaling.command import fit_command, report_command, write_json
from scaling.fits import Columns, Resampling, fit_law
from scaling.joint.allocate import allocate
from scaling.joint.fit import JointFit, fit_joint
from scaling.joint.uncertainty import JointDraws, resample
from scaling.plots import Reference
from scaling.recommend import Advice, recommend
from scaling.report import write_report
from scaling.study import Analysis, analyse
from scaling.table import Table, TableError, read_table
from scaling.truth import held_against_truth

__all__ = [
    "Advice",
    "Analysis",
    "Columns",
    "JointDraws",
    "JointFit",
    "Reference",
    "Resampling",
    "Table",
    "TableError",
    "allocate",
    "analyse",
    "fit_command",
    "fit_joint",
    "fit_law",
    "held_against_truth",
    "read_table",
    "recommend",
    "report_command",
    "resample",
    "write_json",
    "write_report",
]
