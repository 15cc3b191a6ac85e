"""Fits: exact recovery, the global optimum against brute force, form choice, warnings, breaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import nnls

from scaling import laws
from scaling.fit import Points, choose, condition_number, fit_form, fit_forms, fit_warnings, jacobian, leverage
from scaling.table import FloatArray

COMPUTE = np.geomspace(1e15, 1e19, 12)


def points(x: FloatArray, y: FloatArray) -> Points:
    return Points(x, tuple(np.array([value]) for value in y))


@pytest.mark.parametrize(("a", "b"), [(1.2, -0.0113), (0.15, 0.0195)])
def test_loglin_is_recovered_exactly(a: float, b: float) -> None:
    fit = fit_form(points(COMPUTE, a + b * np.log(COMPUTE)), "loglin", loss=False)
    assert fit.params == pytest.approx({"a": a, "b": b}, rel=1e-10)


@pytest.mark.parametrize("b", [0.05, 0.4, -0.02])
def test_power_law_is_recovered_exactly(b: float) -> None:
    fit = fit_form(points(COMPUTE, 3.0 * COMPUTE**-b), "power", loss=b > 0)
    assert fit.params == pytest.approx({"a": 3.0, "b": b}, rel=1e-9)


@pytest.mark.parametrize("b", [0.003, 0.02, 0.15, 0.5, 1.3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_power_with_constant_is_recovered_exactly(b: float, sign: float) -> None:
    """Exponents from nearly log-linear to steep; a falling loss and a rising hit rate."""
    scale = 0.3 * 1e15**b
    y = 0.6 + sign * scale * COMPUTE**-b
    fit = fit_form(points(COMPUTE, y), "power_const", loss=sign > 0)
    assert fit.params == pytest.approx({"c": 0.6, "a": sign * scale, "b": b}, rel=1e-6 if b > 0.01 else 1e-4)
    np.testing.assert_allclose(fit.at(COMPUTE), y, rtol=1e-11)


def test_a_log_linear_metric_degenerates_and_is_flagged_not_chosen() -> None:
    """The trap of a meaningless asymptote: HR@K = 0.15 + 0.0195 ln C under "power + constant"."""
    y = 0.15 + 0.0195 * np.log(COMPUTE / 1e14) + np.random.default_rng(0).normal(0, 1e-4, 12)
    y[-3:] += 4e-4  # convex: the best exponent is below zero, so the search must end at its bound
    fits = fit_forms(points(COMPUTE, y), loss=False)
    assert fits["power_const"].degenerate
    assert choose(fits) != "power_const"
    assert "at_bound" in {w.code for w in fit_warnings(points(COMPUTE, y), fits["power_const"])}
    np.testing.assert_allclose(fits["power_const"].at(COMPUTE), fits["loglin"].at(COMPUTE), rtol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_variable_projection_beats_a_brute_force_grid(seed: int) -> None:
    """A dense oracle (3000 exponents, an independent NNLS for c and a) never finds a smaller residual."""
    rng = np.random.default_rng(seed)
    x = np.sort(10 ** rng.uniform(14, 18, 9))
    y = 0.5 + 0.4 * (x / 1e14) ** -rng.uniform(0.02, 1.0) + rng.normal(0, 0.01, 9)
    fit = fit_form(points(x, y), "power_const", loss=True)
    best = np.inf
    for b in np.geomspace(*laws.exponent_bounds(x), 3000):
        design = np.stack([np.ones_like(x), (x / x[0]) ** -b], axis=1)
        best = min(best, nnls(design, y)[1] ** 2)
    assert fit.rss <= best * (1 + 1e-9)
    assert fit.rss == pytest.approx(best, rel=1e-3)
    assert fit.params["c"] >= 0
    assert fit.params["a"] >= 0


def test_a_batch_of_curves_equals_its_members() -> None:
    rng = np.random.default_rng(1)
    y = 0.5 + 0.3 * (COMPUTE / 1e15) ** -0.3 + rng.normal(0, 0.01, (5, 12))
    w = rng.integers(1, 4, (5, 12)).astype(float)
    batch = laws.solve("power_const", COMPUTE, y, w, loss=True)
    for i in range(5):
        # Integer weights are repeated points: the same problem, stated twice.
        repeated = laws.solve("power_const", COMPUTE, y[i], w[i], loss=True)
        np.testing.assert_allclose(batch.at(COMPUTE)[i], repeated.at(COMPUTE)[0], rtol=1e-12)


@pytest.mark.parametrize("form", laws.FORMS)
def test_inverse_undoes_the_curve_and_is_infinite_beyond_the_asymptote(form: str) -> None:
    curve = laws.solve(form, COMPUTE, 0.5 + 0.3 * (COMPUTE / 1e15) ** -0.3, loss=True)
    np.testing.assert_allclose(curve.inverse(curve.at(COMPUTE)[0])[0], np.log(COMPUTE), rtol=1e-9)
    beyond = curve.inverse(np.array([0.4]))[0, 0]
    assert np.isinf(beyond) if form == "power_const" else np.isfinite(beyond)


def test_aicc_picks_the_true_form() -> None:
    rng = np.random.default_rng(7)
    x = np.geomspace(1e14, 1e19, 20)
    u = np.log(x / 1e14)
    truths = {"loglin": 0.9 - 0.012 * u, "power": 0.9 * np.exp(-0.06 * u), "power_const": 0.6 + 0.3 * np.exp(-0.4 * u)}
    for form, y in truths.items():
        fits = fit_forms(points(x, y + rng.normal(0, 5e-4, 20)), loss=True)
        assert min(fits, key=lambda name: fits[name].aicc) == form
        assert choose(fits) == form


def test_held_out_errors_by_hand() -> None:
    """y = ln x below the cut, one point off the line above it: error, bias and factor are known."""
    x = np.array([1.0, 10.0, 100.0, 1e3])
    y = 1 + np.log(x)
    y[-1] *= 0.5
    fit = fit_form(points(x, y), "loglin", loss=False)
    (cut,) = fit.held_out
    assert (cut.cut, cut.n_train, cut.n_test) == (1e3, 3, 1)
    assert cut.extrapolation == pytest.approx(10)
    assert (cut.mape, cut.bias, cut.max_error) == pytest.approx((100, 100, 100))


def test_leverages_sum_to_the_parameter_count() -> None:
    y = 0.5 + 0.3 * (COMPUTE / 1e15) ** -0.3
    for form, k in laws.N_PARAMS.items():
        curves = laws.solve(form, COMPUTE, y, loss=True)
        assert leverage(curves, COMPUTE).sum() == pytest.approx(k)
        assert condition_number(curves, COMPUTE) < 1e4


def test_warning_codes() -> None:
    few = points(np.array([1.0, 2.0, 4.0]), np.array([0.9, 0.8, 0.75]))
    codes = {w.code for w in fit_warnings(few, fit_form(few, "loglin", loss=True))}
    assert codes == {"few_configurations", "short_range", "one_seed"}
    flat = points(COMPUTE, 0.7 - 1e-5 * np.arange(12) ** 2)
    fit = fit_form(flat, "power_const", loss=True)
    assert "ill_conditioned" in {w.code for w in fit_warnings(flat, fit)} or fit.at_bound


def test_too_few_points_and_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="two distinct"):
        laws.solve("loglin", np.ones(3), np.ones(3), loss=True)
    with pytest.raises(ValueError, match="unknown form"):
        laws.solve("cubic", COMPUTE, COMPUTE, loss=True)
    with pytest.raises(ValueError, match="positive metric"):
        fit_form(points(COMPUTE, -COMPUTE), "power", loss=False)


def broken(x: FloatArray) -> FloatArray:
    return 2.0 * x**-0.02 * (1 + (x / 1e12) ** (1 / 0.8)) ** (-0.05 * 0.8)


def test_a_broken_power_law_is_recovered_inverted_and_chosen() -> None:
    x = np.geomspace(1e9, 1e15, 16)
    curves = laws.solve("broken", x, broken(x), loss=True)
    found = {name: float(value[0]) for name, value in curves.params().items()}
    assert found == pytest.approx({"a": 2.0, "b": 0.02, "c": 0.05, "d": 1e12, "f": 0.8}, rel=1e-4)
    np.testing.assert_allclose(curves.inverse(broken(x))[0], np.log(x), atol=1e-4)
    noisy = points(x, broken(x) * np.exp(np.random.default_rng(0).normal(0, 0.003, 16)))
    assert choose(fit_forms(noisy, loss=True)) == "broken"
    straight = points(x, (0.5 + 30 * x**-0.2) * np.exp(np.random.default_rng(0).normal(0, 0.003, 16)))
    assert choose(fit_forms(straight, loss=True)) == "power_const"
    assert "broken" not in fit_forms(points(x[:11], broken(x[:11])), loss=True)


@pytest.mark.parametrize(
    ("place", "width", "bound"),
    [(1e12, 0.8, ()), (1e12, 0.02, ("f=min",)), (1e12, 9.0, ("f=max",)), (1e15, 0.5, ("d",))],
)
def test_a_break_at_the_edge_of_what_runs_can_tell_is_said(place: float, width: float, bound: tuple[str, ...]) -> None:
    """A bend narrower than a hundredth of the runs' range is a kink to them, and one wider than half of it no bend."""
    x = np.geomspace(1e9, 1e15, 16)
    fit = fit_form(points(x, x**-0.02 * (1 + (x / place) ** (1 / width)) ** (-0.05 * width)), "broken", loss=True)
    assert set(bound) <= set(fit.at_bound)
    assert bool(bound) == bool(fit.at_bound)


def test_derivatives_of_a_broken_law_are_those_of_differences() -> None:
    x = np.geomspace(1e9, 1e15, 16)
    curves = laws.solve("broken", x, broken(x), loss=True)
    columns, step = jacobian(curves, x), 1e-6
    for place, name in ((3, "m"), (4, "f")):
        moved = replace(curves, breaks={**curves.breaks, name: curves.breaks[name] + step})
        slope = (np.log(moved.at(x)[0]) - np.log(curves.at(x)[0])) / step
        np.testing.assert_allclose(slope, -curves.breaks["c"] * columns[:, place], rtol=1e-3, atol=1e-6)
