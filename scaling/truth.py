"""Fitted irreducible constants against values known apart from the fits, such as the Bayes NE of synthetic data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.plots import Reference
from scaling.study import COMPUTE_AXES, Analysis

_DATA_AXES = frozenset({"data", "targets"})
_FLOOR = "Bayes"
_UNSOUND = frozenset({"b=0", "b=max", "c=0"})


@dataclass(frozen=True)
class Verdict:
    """One known floor against one family's constant c of "power + constant".

    `low` and `high` are the 95 % limits, infinite where there is none; `where` says where the known value lies from
    them: "inside", "above" or "below"; `at_bound` is True where c or the exponent stopped at the edge of its range.
    """

    panel: int
    x: str
    family: str
    metric: str
    reference: Reference
    c: float
    low: float
    high: float
    at_bound: bool

    @property
    def where(self) -> str:
        """Where the known value (or its own interval) lies from the fitted interval."""
        if self.reference.low > self.high:
            return "above"
        return "below" if self.reference.high < self.low else "inside"

    @property
    def line(self) -> str:
        """The verdict as one line of text."""
        bound = " (at its bound)" if self.at_bound else ""
        return (
            f"{self.x}, {self.family}: fitted irreducible {self.metric} {self.c:.4f}{bound} "
            f"(95 % {_limit(self.low)} to {_limit(self.high)}); "
            f"{self.reference.name} {self.reference.value:.4f} is {self.where}"
        )


def held_against_truth(analysis: Analysis | Mapping[str, Any], references: Sequence[Reference]) -> list[str]:
    """One line per panel, family and known floor: the constant of power law plus constant, its interval, the truth.

    `analysis` is an `Analysis` or its JSON data; see `verdicts` for what is held against what.
    """
    return [verdict.line for verdict in verdicts(analysis, references)]


def verdicts(analysis: Analysis | Mapping[str, Any], references: Sequence[Reference]) -> list[Verdict]:
    """Every family's constant against every floor (a reference named "Bayes ...") of its metric and dataset.

    A panel takes part where the constant is the limit of infinite data at one history length:

    - its x is the data share or the number of targets, or compute in a study that climbs in compute (its `axis` column
      is empty or says so). In a study of depth, width or history a larger x is one larger design choice on the same
      data, and the limit is no floor.
    - all its trials see one history length. A floor for that length is then preferred to those for others.

    A family without an interval for its constant is left out.
    """
    data: Mapping[str, Any] = analysis.to_json() if isinstance(analysis, Analysis) else analysis
    floors = [reference for reference in references if reference.name.startswith(_FLOOR)]
    found: list[Verdict] = []
    for i, panel in enumerate(data["panels"]):
        along = panel.get("axis") or panel["x"]
        metric = panel.get("metric") or data["metric"]
        if _tends_to_floor(along, panel):
            own = [floor for floor in floors if floor.matches(metric, panel.get("dataset") or "")]
            histories = {int(float(history)) for history in panel.get("histories") or ()}
            own = [floor for floor in own if floor.history in histories] or own
            for family in panel["families"]:
                found += [v for floor in own if (v := _verdict(i, along, metric, family, floor)) is not None]
    return found


def _tends_to_floor(along: str, panel: Mapping[str, Any]) -> bool:
    """The rule of `verdicts`; what the panel does not record does not count against it."""
    axes = set(panel.get("axes") or ())
    grows = along in _DATA_AXES or (along in COMPUTE_AXES and (not axes or bool(axes & COMPUTE_AXES)))
    return grows and len(panel.get("histories") or ()) <= 1


def _verdict(panel: int, x: str, metric: str, family: Mapping[str, Any], floor: Reference) -> Verdict | None:
    fit = family["fits"].get("power_const") or {}
    c, interval = (fit.get("params") or {}).get("c"), (fit.get("intervals") or {}).get("c")
    if c is None or not interval:
        return None
    low, high = interval
    return Verdict(
        panel,
        x,
        family["name"],
        metric,
        floor,
        c,
        -math.inf if low is None else low,
        math.inf if high is None else high,
        bool(_UNSOUND & set(fit.get("at_bound") or ())),
    )


def _limit(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "unbounded"
