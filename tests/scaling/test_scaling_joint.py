"""Joint laws: known optima, exact recovery, gradients against differences, refusals and cautions."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from scaling.joint.allocate import SIX_ND, Cost, allocate, fit_cost
from scaling.joint.envelope import envelope
from scaling.joint.fit import fit_joint
from scaling.joint.isoflop import budgets_of, isoflop
from scaling.joint.laws import LAWS, Data, Model
from scaling.joint.solve import ESTIMATORS, _Problem
from scaling.joint.uncertainty import METHODS, deviation, resample
from scaling.table import FloatArray, TableError

CHINCHILLA = Path(__file__).parents[3] / "shared" / "data" / "chinchilla" / "svg_extracted_data.csv"
TRUTHS = {
    "chinchilla": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
    "gadre": {"A": 500.0, "B": 1500.0, "E": 1.8, "alpha": 0.35},
    "history": {"A": 20.0, "B": 3000.0, "G": 0.8, "E": 0.6, "alpha": 0.2, "beta": 0.45, "gamma": 0.5},
    "data_constrained": {"A": 30.0, "B": 50.0, "E": 0.5, "alpha": 0.3, "beta": 0.28, "R_N": 5.3, "R_D": 15.4},
}


def runs(count: int = 60, seed: int = 1) -> Data:
    rng = np.random.default_rng(seed)
    n, d, h, share = (10 ** rng.uniform(low, high, count) for low, high in ((5, 8), (6, 9), (1, 3.5), (-2.5, 0.3)))
    return {"n": n, "d": d, "h": h, "u": d * share}


def losses(law: str, data: Data, noise: float = 0.0) -> FloatArray:
    model = Model(LAWS[law], data)
    y = model.at(model.theta(TRUTHS[law])[None])[0]
    return y * np.exp(np.random.default_rng(6).normal(0.0, noise, len(y)))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_law_is_recovered_without_noise(law: str, estimator: str) -> None:
    fit = fit_joint(law, runs(), losses(law, runs()), estimator)
    assert fit.params == pytest.approx(TRUTHS[law], rel=1e-4)
    assert not fit.warnings


def test_repeats_are_worth_less_and_less() -> None:
    """By hand: D = 4 U with R_D = 2: U (1 + 2 (1 - e^(-3 / 2))); parameters at the optimum for U count whole."""
    law = TRUTHS["data_constrained"] | {"R_D": 2.0, "R_N": 1.0}
    data = {"n": np.array([1e3, 2e6]), "d": np.array([4e6, 4e6]), "u": np.array([1e6, 1e6])}
    model = Model(LAWS["data_constrained"], data)
    worth = 1e6 * (1 + 2 * (1 - np.exp(-1.5)))
    best = (law["alpha"] * law["A"] / (law["beta"] * law["B"]) * 1e6 ** law["beta"]) ** (1 / law["alpha"])
    more = best * (1 + (1 - np.exp(-(2e6 / best - 1))))
    assert 1e3 < best < 2e6
    expected = [0.5 + 30 * n**-0.3 + 50 * worth**-0.28 for n in (1e3, more)]
    np.testing.assert_allclose(model.at(model.theta(law)[None])[0], expected, rtol=1e-12)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("log", "width"), [(True, 1e-3), (True, np.inf), (False, 0.02)])
def test_gradients_and_hessians_are_those_of_differences(law: str, log: bool, width: float) -> None:
    data = runs()
    model = Model(LAWS[law], data)
    theta = model.theta(TRUTHS[law]) + 0.01
    problem = _Problem(model, losses(law, data, 0.02)[None], np.ones((1, 60)), log)
    _, gradient, hessian = problem.newton(theta[None], width)
    numeric = approx_fprime(theta, lambda t: problem.value(t[None], width)[0], 1e-7)
    np.testing.assert_allclose(gradient[0], numeric, rtol=2e-3, atol=1e-4 * np.abs(numeric).max())
    if law != "data_constrained" and width > 1e-3:  # exact where the terms are affine and no residual crosses the width
        slopes = [(problem.newton((theta + h)[None], width)[1] - gradient)[0] / 1e-7 for h in 1e-7 * np.eye(len(theta))]
        np.testing.assert_allclose(hessian[0], slopes, rtol=1e-2, atol=1e-3 * np.abs(hessian).max())


def chinchilla() -> tuple[Data, FloatArray]:
    """The 240 points: the five worst losses dropped."""
    with CHINCHILLA.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    n, flop, loss = (np.array([float(r[c]) for r in rows]) for c in ("Model Size", "Training FLOP", "loss"))
    keep = loss < np.sort(loss)[-5]
    return {"n": n[keep], "d": (flop / 6 / n)[keep]}, loss[keep]


@pytest.mark.skipif(not CHINCHILLA.is_file(), reason="the digitised Chinchilla points are not part of the project")
def test_chinchilla_points_give_the_known_optima() -> None:
    """Three estimators to the digits known, every start at the optimum, and Epoch's standard errors and optimum."""
    data, loss = chinchilla()
    assert len(loss) == 240
    known = {
        "huber": (477.8259, 2143.4174, 1.817218, 0.347310, 0.367172, 0.0010182740178),
        "lad": (482.0061, 2085.4362, 1.816864, 0.347813, 0.365854, 1.1294946536),
        "lsq-log": (593.322, 4875.64, 1.864550, 0.360253, 0.405883, 0.0114618870),
        "lsq": (567.805, 7581.85, 1.882814, 0.357615, 0.427621, 0.0832038077),
    }
    fits = {name: fit_joint("chinchilla", data, loss, name) for name in known}
    for name, fit in fits.items():
        assert (*fit.params.values(), fit.objective) == pytest.approx(known[name], rel=2e-6)
        assert fit.share == 1.0
    fit = fits["huber"]
    assert fit.optimal_exponent == pytest.approx(0.513900, abs=1e-5)
    draws = resample(fit, n_boot=2000, seed=42)
    errors = draws.errors()
    assert errors["alpha"] == pytest.approx(0.0154, rel=0.05)
    assert errors["beta"] == pytest.approx(0.0206, rel=0.05)
    assert errors["E"] == pytest.approx(0.0257, rel=0.05)
    plan = allocate(fit, [5.76e23], draws=draws)
    assert plan.best["n"][0] == pytest.approx(73.2e9, rel=1e-3)
    assert plan.limits["n"][0][0] < 73.2e9 < plan.limits["n"][1][0]
    assert "far_extrapolation" in {w.code for w in plan.warnings}


def test_the_best_use_of_a_budget_has_no_better_neighbour() -> None:
    data = runs()
    cost = Cost(7.0, {"n": 1.0, "d": 0.9, "h": 0.5})
    fit = fit_joint("history", data, losses("history", data), "lsq-log")
    plan = allocate(fit, [1e14, 1e16], cost=cost)
    at = {name: plan.best[name] for name in "ndh"}
    np.testing.assert_allclose(cost.at(at), [1e14, 1e16], rtol=1e-9)
    np.testing.assert_allclose(fit.at(at), plan.loss, rtol=1e-9)
    for name, other in (("n", "d"), ("n", "h"), ("d", "h")):
        for factor in (0.9, 1.1):
            moved = {**at, name: at[name] * factor}
            moved[other] = at[other] * factor ** (-cost.powers[name] / cost.powers[other])
            np.testing.assert_allclose(cost.at(moved), [1e14, 1e16], rtol=1e-9)
            assert np.all(fit.at(moved) > plan.loss)


def test_a_law_by_which_less_is_better_spends_nothing() -> None:
    data = runs()
    worse = losses("chinchilla", data, 0.002) + 0.002 * data["h"] ** 0.5
    with pytest.raises(TableError, match="no best use of a budget: its exponent gamma is -"):
        allocate(fit_joint("history", data, worse), [1e14], cost=Cost(7.0, {"n": 1.0, "d": 0.9, "h": 0.5}))


def test_a_law_that_hardly_moves_with_a_size_spends_nothing() -> None:
    data = runs()
    fit = fit_joint("chinchilla", data, losses("chinchilla", data), "lsq-log")
    with pytest.raises(TableError, match=r"no best use of a budget: its exponent beta is 0\.004"):
        allocate(replace(fit, params={**fit.params, "beta": 0.004}), [1e14])


def test_a_term_whose_coefficient_no_number_holds_is_spent_on() -> None:
    """A kink: the smallest of four sizes is too small, and beyond it parameters are worth nothing."""
    data = {**runs(), "n": np.tile([7e3, 1.4e4, 2.8e4, 5.6e4], 15)}
    model = Model(LAWS["history"], data)
    theta = np.array([-70.0, -1.5, -2.0, -0.5, 80.0, 0.3, 0.4])
    assert model.natural(theta[None])["A"] == np.inf
    fit = replace(fit_joint("history", data, model.at(theta[None])[0], "lsq-log"), theta=theta)
    cost = Cost(7.0, {"n": 1.0, "d": 0.9, "h": 0.5})
    plan = allocate(fit, [1e12], cost=cost)
    assert 7e3 < plan.best["n"][0] < 1.4e4
    at = {name: plan.best[name] for name in "ndh"}
    np.testing.assert_allclose(fit.at(at), plan.loss, rtol=1e-9)
    for factor in (0.9, 1.1):
        assert fit.at({**at, "n": at["n"] * factor, "d": at["d"] * factor ** (-1 / 0.9)})[0] > plan.loss[0]


def test_draws_by_which_less_is_better_give_no_limits() -> None:
    """History is worth nothing: in about half the draws its exponent is below zero."""
    data = runs()
    fit = fit_joint("history", data, losses("chinchilla", data, 0.02), "lsq-log")
    assert fit.params["gamma"] > 0
    cost = Cost(7.0, {"n": 1.0, "d": 0.9, "h": 0.5})
    plan = allocate(fit, [1e14], cost=cost, draws=resample(fit, n_boot=60, seed=1))
    assert "no_optimum" in {w.code for w in plan.warnings}
    assert all(np.isfinite(limit).all() for pair in plan.limits.values() for limit in pair)


def test_a_law_of_repeated_data_spends_a_budget_with_the_data_there_are() -> None:
    """With more targets that differ than it wants it is the law without repeats; with few the loss is higher, and no
    other size is better."""
    data, truth = runs(), TRUTHS["data_constrained"]
    fit = fit_joint("data_constrained", data, losses("data_constrained", data), "lsq-log")
    a = truth["beta"] / (truth["alpha"] + truth["beta"])
    g = (truth["alpha"] * truth["A"] / (truth["beta"] * truth["B"])) ** (1 / (truth["alpha"] + truth["beta"]))
    many, few = allocate(fit, [1e14], unique=1e12), allocate(fit, [1e14], unique=1e5)
    assert many.best["n"][0] == pytest.approx(g * (1e14 / 6) ** a, rel=1e-3)
    assert few.loss[0] > many.loss[0]
    for factor in (0.8, 1.25):
        other = {"n": few.best["n"] * factor, "d": few.best["d"] / factor, "u": np.array([1e5])}
        assert fit.at(other)[0] > few.loss[0]
    with pytest.raises(TableError, match="that differ"):
        allocate(fit, [1e14])


def test_what_a_run_costs_is_read_off_the_runs() -> None:
    data = runs()
    found = fit_cost(data, 5.0 * data["n"] ** 1.1 * data["d"] * data["h"] ** 0.3)
    assert found.factor == pytest.approx(5.0, rel=1e-6)
    assert found.powers == pytest.approx({"n": 1.1, "d": 1.0, "h": 0.3})
    with pytest.raises(TableError, match="does not rise with H"):
        fit_cost(data, data["n"] * data["d"])
    with pytest.raises(TableError, match="vary together"):
        fit_cost({"n": data["n"], "d": data["n"] * 20}, data["n"])


@pytest.mark.parametrize("method", METHODS)
def test_intervals_hold_the_truth_and_repeat_to_the_bit(method: str) -> None:
    data = runs()
    fit = fit_joint("chinchilla", data, losses("chinchilla", data, 0.003), "lsq-log")
    draws, again = (resample(fit, method=method, n_boot=200, seed=3) for _ in range(2))
    np.testing.assert_array_equal(draws.theta, again.theta)
    for name, (low, high) in draws.intervals().items():
        truth = 0.28 / 0.62 if name == "a" else TRUTHS["chinchilla"][name]
        assert low < truth < high
        assert high - low < 3 * truth
    low, high = draws.curve({"n": np.array([1e7]), "d": np.array([1e8])})
    one_low, one_high = draws.prediction({"n": np.array([1e7]), "d": np.array([1e8])})
    assert one_low[0] < low[0] < high[0] < one_high[0]


def test_the_deviation_of_numbers_whose_squares_are_none() -> None:
    values = np.array([1.0, 2.0, 4.0])
    for scale in (1.0, 1e-200, 1e200):
        assert deviation(scale * values, ddof=1) == pytest.approx(scale * np.std(values, ddof=1), rel=1e-12)
    assert deviation(np.zeros(3)) == 0
    assert deviation(np.array([1.0, np.inf])) == np.inf


def test_clusters_are_resampled_whole() -> None:
    """Copies of every run as one cluster: errors are those of the runs alone; each by itself they would be smaller."""
    data = runs(30)
    y = losses("chinchilla", data, 0.01)
    alone = resample(fit_joint("chinchilla", data, y, "lsq-log"), method="pairs", n_boot=400).errors()
    copied = fit_joint("chinchilla", {name: np.tile(v, 4) for name, v in data.items()}, np.tile(y, 4), "lsq-log")
    names = [f"{i % 30:02d}" for i in range(120)]
    clustered = resample(copied, method="pairs", clusters=names, n_boot=400)
    assert clustered.units == 30
    assert clustered.errors()["alpha"] == pytest.approx(alone["alpha"], rel=0.01)
    assert resample(copied, method="pairs", n_boot=400).errors()["alpha"] < 0.7 * alone["alpha"]


def test_what_carries_no_law_is_refused_or_flagged() -> None:
    data = runs()
    y = losses("chinchilla", data, 0.01)
    with pytest.raises(TableError, match="at least 6 runs, got 5"):
        fit_joint("chinchilla", {name: v[:5] for name, v in data.items()}, y[:5])
    with pytest.raises(TableError, match="distinct values of N"):
        fit_joint("chinchilla", {"n": np.ones(60), "d": data["d"]}, y)
    with pytest.raises(TableError, match="the loss has others"):
        fit_joint("chinchilla", data, -y)
    together = {"n": data["n"], "d": 20 * data["n"]}
    flagged = fit_joint("chinchilla", together, losses("chinchilla", together, 0.01))
    assert "degenerate_design" in {w.code for w in flagged.warnings}
    rising = fit_joint("chinchilla", data, 1.0 / y)
    assert "at_bound" in {w.code for w in rising.warnings}


def test_when_repeats_stop_to_count_is_not_told_by_runs_in_which_they_all_count() -> None:
    """At most half a repeat; parameters as far beyond the data's worth as ever."""
    data = runs()
    seldom = {**data, "u": data["d"] / np.random.default_rng(2).uniform(1.0, 1.5, 60)}
    model = Model(LAWS["data_constrained"], seldom)
    natural = {**TRUTHS["data_constrained"], "R_D": 1e6}
    exact = model.at(model.theta(natural)[None])[0]
    said = [w.text for w in fit_joint("data_constrained", seldom, exact).warnings if w.code == "at_bound"]
    assert len(said) == 1
    assert said[0].startswith("R_D = ")
    assert f"repeat targets at most {np.max(data['d'] / seldom['u']) - 1:.2g} times" in said[0]


@pytest.mark.parametrize("estimator", ["huber", "lsq", "lad"])
def test_runs_that_bend_away_from_their_law_are_told(estimator: str) -> None:
    """A history of 300 is best: a law that only falls cannot say so. Parameters and data are innocent."""
    data = runs()
    turned = losses("history", data, 0.002) * (1 + 0.02 * np.log(data["h"] / 300) ** 2)
    (told,) = (w.text for w in fit_joint("history", data, turned, estimator).warnings if w.code == "bent")
    assert "along H, above it at both ends" in told


def test_noise_is_rarely_told_as_a_bend() -> None:
    """One variable in a thousand, of noise as large again where data are few: of 240, three would be too many."""
    count = 0
    for seed in range(120):
        data, rng = runs(seed=seed), np.random.default_rng(seed)
        noise = rng.normal(0.0, 0.003, 60) * np.where(data["d"] < 1e7, 2.0, 1.0)
        fit = fit_joint("chinchilla", data, losses("chinchilla", data) * np.exp(noise), "lsq-log")
        count += sum(w.code == "bent" for w in fit.warnings)
    assert count < 3


def valleys(noise: float = 0.0) -> tuple[FloatArray, FloatArray, FloatArray]:
    compute = np.repeat(np.geomspace(1e18, 1e21, 5), 7)
    best = 0.6 * (compute / 6) ** 0.5
    n = best * np.tile(np.geomspace(1 / 3, 3, 7), 5)
    y = 2.0 + 0.1 * np.log(n / best) ** 2 - 0.05 * np.log(compute / 1e18)
    return n, compute, y * np.exp(np.random.default_rng(0).normal(0.0, noise, len(n)))


def test_valleys_give_the_sizes_and_their_law() -> None:
    n, compute, y = valleys()
    found = isoflop(n, compute * (1 + 0.01 * np.sin(np.arange(35))), y, n_boot=50)
    assert len(found.valleys) == 5
    assert found.n.a == pytest.approx(0.5, abs=1e-3)
    assert found.n.at(np.array([1e20]))[0] == pytest.approx(0.6 * (1e20 / 6) ** 0.5, rel=0.01)
    assert SIX_ND.at({"n": found.n.at(np.array([1e20])), "d": found.d.at(np.array([1e20]))})[0] == pytest.approx(1e20)
    low, high = found.valleys[0].flat
    assert low < found.valleys[0].best < high
    low, high = isoflop(*valleys(0.002), n_boot=300).n.intervals()["a"]
    assert low < 0.5 < high


def test_budgets_without_a_minimum_inside_are_refused() -> None:
    n, compute, y = valleys()
    outside = np.where(compute == compute[0], 3.0 - 0.1 * np.log(n), y)
    found = isoflop(n, compute, outside, n_boot=20)
    assert [bool(valley.problem) for valley in found.valleys] == [True, False, False, False, False]
    assert "no_interior_minimum" in {w.code for w in found.warnings}
    with pytest.raises(TableError, match="does not curve upwards"):
        isoflop(n, compute, -y, n_boot=20)
    np.testing.assert_allclose(budgets_of(np.array([1.0, 100.0, 1.02, 98.0])), [1.01, 99.0, 1.01, 99.0], rtol=1e-3)


def test_the_envelope_of_curves_has_the_exponent_of_its_sizes() -> None:
    sizes, steps = np.geomspace(1e6, 1e9, 13), np.geomspace(1e5, 1e10, 60)
    n, d = (v.ravel() for v in np.meshgrid(sizes, steps, indexing="ij"))
    y = 1.7 + 400 * n**-0.34 + 400 * d**-0.34
    found = envelope([f"{size:g}" for size in n], n, 6 * n * d, y, n_boot=50)
    assert found.power.a == pytest.approx(0.5, abs=0.03)
    low, high = found.power.intervals()["a"]
    assert low < 0.5 < high
    with pytest.raises(TableError, match="three sizes"):
        envelope(["a", "a", "b"], n[:3], n[:3], y[:3])
