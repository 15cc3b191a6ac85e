"""Where the best learning rate is, by hand, and what the study and its figure hold."""

import math

import pytest

from experiments import lr_batch
from experiments.lr_figure import best_of, curves, draw, drift, lines
from experiments.lr_transfer import STUDY


def row(family: str, rate: float, ne: float, status: str = "done") -> dict[str, object]:
    return {"family": family, "axis_value": str(rate), "validation/ne": str(ne), "status": status}


def test_the_best_rate_and_the_vertex_of_a_parabola() -> None:
    """NE = 0.8 + 0.01 (log2(rate / 0.005))^2, seen at factors of two that miss the vertex by a quarter of a step."""
    rates = [0.005 * 2 ** (k + 0.25) for k in (-2, -1, 0, 1)]
    best = best_of({rate: 0.8 + 0.01 * math.log2(rate / 0.005) ** 2 for rate in rates})
    assert best.rate == rates[2]
    assert best.vertex == pytest.approx(0.005)
    assert best.ne == pytest.approx(0.8 + 0.01 / 16)
    assert not best.edge


def test_the_end_of_the_grid_and_a_diverged_neighbour() -> None:
    assert best_of({0.01: 0.9, 0.02: 0.8, 0.04: 0.7}) == (0.04, 0.04, 0.7, True)
    assert best_of({0.01: 0.9, 0.02: 0.8, 0.04: math.inf}) == (0.02, 0.02, 0.8, False)


def test_curves_average_seeds_and_drift_counts_factors_of_two() -> None:
    rows = [row("hstu muP 32", 0.01, 0.9), row("hstu muP 32", 0.01, 0.8), row("hstu muP 32", 0.02, 0.7)]
    rows += [row("hstu muP 32", 0.04, 0.9), row("hstu muP 128", 0.01, 0.6), row("hstu muP 128", 0.02, 0.7)]
    rows += [row("hstu muP 128", 0.005, 0.9, "unfinished"), row("hstu muP 128", 0.04, 0.0, "diverged")]
    found = curves(rows)
    widths = found[("hstu", "muP")]
    assert list(widths) == [32, 128]
    assert widths[32][0.01] == pytest.approx(0.85)
    assert 0.005 not in widths[128]
    assert widths[128][0.04] == math.inf
    assert drift(widths)[0] == 1.0
    assert lines(found)[0].startswith("hstu, muP: the best rate moves by a factor of 2^1")
    assert ">128<" in draw(found, "width")


def test_the_study_differs_in_width_parametrisation_and_rate_alone() -> None:
    trials = [one.trial for one in STUDY.trials("data", "small")]
    assert len({trial.hash for trial in trials}) == len(trials)
    for model in ("hstu", "dirl", "transformer"):
        own = [trial for trial in trials if trial.model.name == model]
        assert {trial.model.width for trial in own} == {16, 32, 64, 128, 256}
        assert {trial.train.steps for trial in own} == {100}
        assert all(trial.train.embedding_learning_rate == 2 * trial.train.learning_rate for trial in own)
        assert not any(trial.train.report_test for trial in own)


def test_batches_see_equal_rows() -> None:
    trials = [one.trial for one in lr_batch.STUDY.trials("data", "small")]
    assert len({trial.hash for trial in trials}) == len(trials) == 3 * 4 * 7
    assert {trial.train.batch_rows for trial in trials} == {8, 16, 32, 64}
    assert {trial.train.batch_rows * trial.train.steps for trial in trials} == {lr_batch.ROWS}
