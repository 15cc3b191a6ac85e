"""Fitted constants against known floors: which panels and references take part, and what a line says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scaling import Reference, Table, analyse, held_against_truth

FLOOR = Reference("Bayes NE", 0.75, 0.75, 0.75)


def record(
    c: float | None = 0.8, limits: object = (0.7, 0.9), bound: tuple[str, ...] = (), **panel: object
) -> dict[str, Any]:
    fit = {"params": {"c": c}, "intervals": {"c": limits}, "at_bound": list(bound)}
    family = {"name": "hstu", "fits": {"loglin": {"params": {}, "intervals": None}, "power_const": fit}}
    return {"metric": "ne", "panels": [{"axis": None, "x": "train_flops", "families": [family], **panel}]}


@pytest.mark.parametrize(
    ("panel", "dataset", "lines"),
    [
        ({}, "world", 1),
        ({"dataset": "world"}, "world", 1),
        ({"dataset": "world"}, "", 1),
        ({"dataset": "ml-1m"}, "world", 0),
        ({"axis": "data", "x": "axis_value"}, "", 1),
        ({"axis": "targets", "x": "axis_value"}, "", 1),
        ({"axis": "history", "x": "axis_value"}, "", 0),
        ({"axis": "depth", "x": "axis_value"}, "", 0),
        ({"metric": "auc"}, "", 0),
        ({"axes": ["train_flops"], "histories": ["64"]}, "", 1),
        ({"axes": ["compute", "depth"]}, "", 1),
        ({"axes": ["depth"]}, "", 0),
        ({"axes": ["data"]}, "", 0),  # the panel along data says it
        ({"axis": "data", "x": "axis_value", "axes": ["data"], "histories": ["64"]}, "", 1),
        ({"histories": ["32", "64"]}, "", 0),
    ],
)
def test_only_floors_of_the_panel_are_held_against_it(panel: dict[str, object], dataset: str, lines: int) -> None:
    floors = [Reference("Bayes NE", 0.75, 0.75, 0.75, dataset=dataset), Reference("oracle NE", 0.1, 0.1, 0.1)]
    assert len(held_against_truth(record(**panel), floors)) == lines


def test_the_floor_of_the_trials_own_history_is_preferred() -> None:
    floors = [Reference(f"Bayes NE, {n} events", 0.75, 0.75, 0.75, history=n) for n in (8, 64)]
    floors.append(Reference("Bayes NE, all events", 0.7, 0.7, 0.7))
    (line,) = held_against_truth(record(histories=["64.0"]), floors)
    assert "Bayes NE, 64 events" in line
    assert len(held_against_truth(record(histories=["32"]), floors)) == 3


def test_a_line_names_a_bound_and_survives_missing_limits() -> None:
    (line,) = held_against_truth(record(bound=("b=max",)), [FLOOR])
    assert "ne 0.8000 (at its bound) (95 % 0.7000 to 0.9000); Bayes NE 0.7500 is inside" in line
    (line,) = held_against_truth(record(limits=(None, 0.7)), [FLOOR])
    assert line.endswith("(95 % unbounded to 0.7000); Bayes NE 0.7500 is above")
    (line,) = held_against_truth(record(limits=[None, None]), [FLOOR])
    assert line.endswith("is inside")
    assert held_against_truth(record(c=None), [FLOOR]) == []
    assert held_against_truth(record(limits=None), [FLOOR]) == []


def test_an_analysis_and_its_data_give_the_same_lines() -> None:
    x = np.geomspace(1e12, 1e16, 8)
    y = 0.75 + 0.2 * (x / 1e12) ** -0.5 + np.random.default_rng(0).normal(0, 1e-4, 8)
    rows = [{"family": "a", "train_flops": repr(float(c)), "ne": repr(float(v))} for c, v in zip(x, y)]
    analysis = analyse(Table(list(rows[0]), rows, ["t.csv, line 2"] * 8), n_boot=50)
    (line,) = held_against_truth(analysis, [FLOOR])
    assert line.startswith("train_flops, a: fitted irreducible ne 0.75")
    assert held_against_truth(analysis.to_json(), [FLOOR]) == [line]
