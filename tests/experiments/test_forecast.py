"""Forecasts of trials to come: from the law of those that ran, once, and held against what came out."""

from pathlib import Path

import numpy as np
import pytest

from experiments.folder import read_record
from experiments.forecast import outcomes, write_forecasts
from experiments.study import PlannedTrial, Study
from experiments.table import rebuild_table
from genrec_jax.config import default_trial, override
from genrec_jax.errors import UserError
from genrec_jax.train.record import write_json

STUDY = Study("versus", "Versus", "Who wins?", {}, "ne", "train_flops")


def planned(family: str, rung: int, seed: int = 0) -> PlannedTrial:
    trial = override(default_trial("dlrm"), {"model.width": 8 + rung, "seed": seed})
    return PlannedTrial(trial, STUDY.name, family, f"s{rung}", "train_flops", cost=1e10 * 4.0**rung)


def law(flops: float) -> float:
    return 0.7 + 5.0 * flops**-0.15


def run(out: Path, one: PlannedTrial, ne: float | None) -> None:
    """The records of a trial that finished, or without a metric of one that diverged."""
    folder = out / "trials" / one.trial.hash
    folder.mkdir(parents=True, exist_ok=True)
    place = {key: getattr(one, key) for key in ("study", "family", "label", "axis", "axis_value")}
    write_json(folder / "config.json", one.trial.to_json())
    write_json(folder / "plan.json", {"placements": [place]})
    measured = {"status": "diverged"} if ne is None else {"status": "done", "ne": ne}
    write_json(folder / "result.json", {"train_flops": one.cost, "dataset": "d", **measured})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Seven rungs of one family with a tenth of a per mille of noise."""
    for rung, noise in enumerate(np.random.default_rng(0).normal(size=7)):
        one = planned("hstu", rung)
        run(tmp_path, one, law(one.cost or 0.0) * (1 + 1e-4 * noise))
    rebuild_table(tmp_path)
    return tmp_path


def test_a_forecast_is_the_law_at_the_trials_own_flops_and_made_once(out: Path) -> None:
    every = [planned("hstu", rung) for rung in range(9)]
    said = write_forecasts(STUDY, every, out)
    rows = (read_record(out / "forecast.json") or {})["forecasts"]
    assert [row["trial"] for row in rows] == [one.trial.hash for one in every[7:]]
    for row, one, line in zip(rows, every[7:], said, strict=True):
        assert row["train_flops"] == one.cost
        assert row["low"] < law(one.cost or 0.0) < row["high"]
        assert row["high"] - row["low"] < 0.01
        assert (row["from_trials"], row["from_flops"]) == (7, 1e10 * 4.0**6)
        assert f"{row['value']:.4f} ({row['low']:.4f} to {row['high']:.4f})" in line
    assert "4.0 times its family's largest trained" in said[0]
    with pytest.raises(UserError, match="has begun or been forecast already"):
        write_forecasts(STUDY, every, out)
    assert (read_record(out / "forecast.json") or {})["forecasts"] == rows


def test_how_far_a_forecast_reaches_is_told_from_its_own_family(out: Path) -> None:
    for rung in range(5):
        run(out, planned("dlrm", rung, seed=1), law(1e10 * 4.0**rung) * (1 + 1e-4 * (-1) ** rung))
    rebuild_table(out)
    said = write_forecasts(STUDY, [planned("hstu", 7), planned("dlrm", 7, seed=1)], out)
    assert "4.0 times its family's largest trained" in said[0]
    assert "64.0 times its family's largest trained" in said[1]
    assert all("from 12 trials" in line for line in said)


def test_what_came_of_them(out: Path) -> None:
    inside, above, unrun = (planned("hstu", rung) for rung in (7, 8, 9))
    write_forecasts(STUDY, [inside, above, unrun], out)
    assert outcomes(out) == []
    run(out, inside, law(inside.cost or 0.0))
    run(out, above, 0.99)
    total, *each = outcomes(out)
    assert total == "Of 2 trials forecast before they ran, 1 came out inside their 95 % intervals."
    assert each[0].endswith(f"it came to {law(inside.cost or 0.0):.4f}.")
    assert each[1].endswith("it came to 0.9900, above the interval.")
    run(out, unrun, None)
    assert len(outcomes(out)) == 3  # one that diverged came to nothing


def test_refusals_write_nothing(out: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="no family of the trials to come"):
        write_forecasts(STUDY, [planned("dlrm", 9)], out)
    begun = planned("hstu", 9)
    (out / "trials" / begun.trial.hash).mkdir()
    (out / "trials" / begun.trial.hash / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="has begun"):
        write_forecasts(STUDY, [begun], out)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no finished trials"):
        write_forecasts(STUDY, [planned("hstu", 9)], empty)
    assert not (out / "forecast.json").exists()
    assert not (empty / "forecast.json").exists()
