"""History against depth: what the grid holds fixed, and what the study makes of its law."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from experiments.history_vs_depth import STUDY, spent_best
from experiments.ladders import LADDER


def test_the_grid_varies_depth_history_and_data_apart_and_keeps_the_targets_of_a_step() -> None:
    trials = [one.trial for one in STUDY.trials("data", "small")]
    grid = {(t.model.depth, t.data.history, t.data.fraction) for t in trials}
    assert len(grid) == len(trials) == 4 * 5 * 3
    targets = [t.train.batch_rows * (t.data.history + t.data.candidates) for t in trials]
    recipe = LADDER.recipes["hstu"].batch_rows * 72
    assert np.ptp(targets) < 0.2 * recipe
    assert {t.train.batch_rows for t in trials if t.data.history == 64} == {LADDER.recipes["hstu"].batch_rows}
    fixed = {(t.model.width, t.train.learning_rate, t.train.epochs) for t in trials}
    assert len(fixed) == 1


def _rows(gain_of_history: float) -> list[dict[str, Any]]:
    rows = []
    for one in STUDY.trials("data", "small"):
        n, d, h = 6e3 * one.trial.model.depth, 8e5 * one.trial.data.fraction, one.trial.data.history
        ne = 0.7 + 3.0 * n**-0.5 + 20.0 * d**-0.5 + gain_of_history * h**-0.5
        columns = {"dense_params": n, "targets": d, "history": h, "train_flops": 6 * n * d * h**0.3, "ne": ne}
        known = {"trial": one.trial.hash, "study": STUDY.name, "family": one.family, "label": one.label}
        rows.append({**known, "dataset": "d", "seed": 0, "status": "done", **columns})
    return rows


def _said(out: Path, rows: list[dict[str, Any]]) -> list[str]:
    with (out / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return spent_best(out, rows)


def test_the_conclusion_spends_a_budget_on_what_the_law_says_pays(tmp_path: Path) -> None:
    said = _said(tmp_path, _rows(0.5))
    assert len(said) == 3
    assert all(line.startswith("hstu with ") for line in said)
    # At the best, c e x^-e / p is alike for all three: 1.5 n^-0.5 = 10 d^-0.5 = (0.5 / 0.6) h^-0.5.
    n, d, h = 7.3e3, 3.2e5, 2.2e3
    slopes = 1.5 * n**-0.5, 10 * d**-0.5, 0.5 / 0.6 * h**-0.5
    assert max(slopes) < 1.05 * min(slopes)
    for text in (f"{n:.2g} dense parameters (", f"{d:.2g} targets (", f"{h:.2g} events in view ("):
        assert text in said[1]


def test_where_less_history_is_always_better_the_conclusion_says_why_it_follows_the_best_trials(tmp_path: Path) -> None:
    said = _said(tmp_path, _rows(-0.5))
    assert len(said) == 3
    for line in said:
        assert "best configurations (the law has no best use of a budget: its exponent gamma is -" in line


def test_without_trials_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert spent_best(tmp_path, []) == []
