"""The controls of the protocol: learning rates at the ladders' ends, one pass against several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import epochs, history_rates, history_vs_depth, rate_check
from experiments.ladders import LADDER
from experiments.paired import plus_minus
from genrec_jax.config import default_trial, override
from genrec_jax.noise import UserSums, difference
from genrec_jax.train.record import write_users


def test_rates_are_the_recipe_times_a_factor_and_nothing_else() -> None:
    planned = rate_check.STUDY.trials("data", "small")
    assert len(planned) == len(LADDER.sizes) * 2 * 5
    for one in planned:
        rung, _, factor = one.label.partition(" rate x")
        assert rung in ("s0", "s4")
        assert float(factor) == one.axis_value
        (own,) = LADDER.rungs(one.family, int(rung[1:]), int(rung[1:]))
        recipe = override(default_trial(one.family), {**rate_check.STUDY.base, "data.path": "data", **own.values})
        rates = {
            key: one.axis_value * getattr(recipe.train, key) for key in ("learning_rate", "embedding_learning_rate")
        }
        assert one.trial == override(recipe, {f"train.{key}": rate for key, rate in rates.items()})
        assert not one.trial.train.report_test
    assert {one.label.split()[0] for one in rate_check.STUDY.trials("data", "medium")} == {"s2", "s6"}


def test_rates_of_histories_are_those_of_the_study_of_histories_times_a_factor() -> None:
    """The factor 1 is a trial of that study, but for the test part."""
    of_study = [one.trial for one in history_vs_depth.STUDY.trials("data", "small")]
    planned = history_rates.STUDY.trials("data", "small")
    own = [one for one in planned if one.axis_value == 1.0]
    assert {one.label.split()[0] for one in own} == {f"history={n}" for n in (32, 64, 128, 256)}
    for one in own:
        assert override(one.trial, {"train.report_test": True}) in of_study
    for one in planned:
        (same,) = (other.trial for other in own if other.trial.data.history == one.trial.data.history)
        rates = {key: one.axis_value * getattr(same.train, key) for key in ("learning_rate", "embedding_learning_rate")}
        assert one.trial == override(same, {f"train.{key}": rate for key, rate in rates.items()})


def test_passes_differ_in_nothing_else() -> None:
    planned = epochs.STUDY.trials("data", "small")
    assert len(planned) == len(LADDER.sizes) * 4
    for one in planned:
        assert one.trial.train.epochs == one.axis_value
        same = [other.trial for other in planned if other.family == one.family]
        assert all(override(trial, {"train.epochs": one.axis_value}) == one.trial for trial in same)
    assert len(epochs.STUDY.trials("data", "medium")) == 2 * len(planned)


class Rows:
    """Rows of a results table with what the users of each trial add to NE."""

    def __init__(self, out: Path):
        self.out, self.rows = out, []
        rng = np.random.default_rng(0)
        self.users, self.labels = rng.integers(0, 40, 200), rng.integers(0, 2, (200, 1))

    def add(self, family: str, label: str, value: float, ne: float, test: float | None = None, **more: Any) -> UserSums:
        name = f"trial{len(self.rows)}"
        (self.out / "trials" / name).mkdir(parents=True)
        noise = np.random.default_rng(len(self.rows)).normal(size=self.labels.shape)
        sums = UserSums.of(("like",), noise, self.labels, self.users)
        write_users(self.out / "trials" / name / "users.npz", sums)
        known = {"trial": name, "family": family, "label": label, "axis_value": value, "status": "done"}
        self.rows.append(known | {"validation/ne": ne, "ne": test} | more)
        return sums


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path)


def test_the_verdict_on_rates(rows: Rows) -> None:
    """HSTU's small end: the recipe's own rate. Its large end: one step off. DLRM: two, at the end of the grid."""
    for factor, ne in zip(rate_check.FACTORS, (0.84, 0.82, 0.80, 0.81, 0.83), strict=True):
        rows.add("hstu", f"s0 rate x{factor:g}", factor, ne)
    sums = {
        factor: rows.add("hstu", f"s4 rate x{factor:g}", factor, ne)
        for factor, ne in zip(rate_check.FACTORS, (0.74, 0.70, 0.71, 0.72, 0.73), strict=True)
    }
    for factor, ne in zip(rate_check.FACTORS, (0.84, 0.83, 0.82, 0.81, 0.80), strict=True):
        rows.add("dlrm", f"s0 rate x{factor:g}", factor, ne)
    rows.add("dlrm", "s4 rate x1", 1.0, 0.70, status="diverged")
    rows.add("dlrm", "s4 rate x0.5", 0.5, 0.75)
    summary, dlrm, large, small_end, one_off = rate_check.verdict(rows.out, rows.rows)
    assert "at 2 of 4 ends" in summary
    assert dlrm.startswith("dlrm s0: best at 4 times the recipe's rate (validation NE 0.8000, the end of the grid")
    assert "2 steps away" in dlrm
    assert large.startswith("dlrm s4: best at 0.5 times")
    assert large.endswith("at the recipe's own no trial finished.")
    assert small_end == "hstu s0: the recipe's rate is the best of 5 (validation NE 0.8000)."
    cost = plus_minus(difference([sums[0.5]], [sums[1.0]]))
    assert one_off == (
        "hstu s4: best at 0.5 times the recipe's rate (validation NE 0.7000), 1 step away; "
        f"the recipe's is {cost} from it."
    )


def test_a_verdict_without_the_users_of_a_trial_has_no_error(rows: Rows) -> None:
    for factor, ne in ((1.0, 0.71), (2.0, 0.70)):
        rows.add("hstu", f"s4 rate x{factor:g}", factor, ne)
    (rows.out / "trials/trial1/users.npz").unlink()
    assert rate_check.verdict(rows.out, rows.rows)[1].endswith("the recipe's is +0.0100 from it.")


def test_passes_are_chosen_by_validation_and_judged_on_the_test_part(rows: Rows) -> None:
    """Over two seeds; by the test part four passes would have been chosen."""
    sums: dict[float, list[UserSums]] = {}
    for passes, ne, test in ((4.0, 0.79, 0.74), (0.5, 0.81, 0.80), (1.0, 0.80, 0.78), (2.0, 0.78, 0.77)):
        for moved in (-0.01, 0.01):
            found = rows.add("dlrm", f"s3 epochs={passes:g}", passes, ne + moved, test - moved)
            sums.setdefault(passes, []).append(found)
    rows.add("hstu", "s3 epochs=1", 1.0, 0.7, 0.71)
    rows.add("hstu", "s3 epochs=4", 4.0, 0.69, 0.70, status="diverged")
    dlrm, hstu = epochs.verdict(rows.out, rows.rows)
    assert "0.5: 0.8100 / 0.8000, 1: 0.8000 / 0.7800, 2: 0.7800 / 0.7700, 4: 0.7900 / 0.7400" in dlrm
    assert dlrm.endswith(
        f"chooses 2, whose test NE is {plus_minus(difference(sums[1.0], sums[2.0]))} from that of one pass."
    )
    assert hstu == "hstu: validation / test NE by passes 1: 0.7000 / 0.7100; validation chooses 1."
