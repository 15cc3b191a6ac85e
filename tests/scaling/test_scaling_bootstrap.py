"""Bootstrap: coverage on simulated laws, the method named, determinism; comparisons computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from scaling.bootstrap import Bootstrap, bootstrap, interval
from scaling.fit import CurveFit, Points, fit_form, fit_forms
from scaling.frontier import Family, compare, compare_exponents, compute_ratio, pareto, slope_per_decade
from scaling.table import FloatArray

NOISE = 0.004


def simulated(rng: np.random.Generator, n: int, seeds: int, form: str) -> tuple[Points, FloatArray]:
    x = np.geomspace(1e14, 1e18, n)
    truth = 0.9 - 0.01 * np.log(x / 1e14) if form == "loglin" else 0.6 + 0.3 * (x / 1e14) ** -0.3
    return Points(x, tuple(value + rng.normal(0, NOISE, seeds) for value in truth)), truth


@pytest.mark.parametrize(
    ("n", "seeds", "form", "method"),
    [(6, 1, "loglin", "residual"), (16, 3, "loglin", "pairs"), (8, 2, "power_const", "residual")],
)
def test_coverage_of_curve_and_prediction_intervals(n: int, seeds: int, form: str, method: str) -> None:
    """95 % intervals of the curve at mid-range and of one new run there cover about as often as they claim."""
    rng = np.random.default_rng(11)
    trials, curve_hits, run_hits = 100, 0, 0
    middle = n // 2
    for trial in range(trials):
        points, truth = simulated(rng, n, seeds, form)
        fit = fit_form(points, form, loss=True)
        boot = bootstrap(points, fit, loss=True, n_boot=200, seed=trial)
        assert boot is not None
        assert boot.method == method
        at = points.x[middle : middle + 1]
        low, high = boot.curve(at)
        curve_hits += bool(low[0] <= truth[middle] <= high[0])
        low, high = boot.prediction(at)
        run_hits += bool(low[0] <= truth[middle] + rng.normal(0, NOISE) <= high[0])
    assert 0.9 <= curve_hits / trials <= 0.99
    assert 0.88 <= run_hits / trials <= 1.0


def test_prediction_interval_contains_and_exceeds_the_curve_interval() -> None:
    points, _ = simulated(np.random.default_rng(0), 10, 2, "loglin")
    boot = bootstrap(points, fit_form(points, "loglin", loss=True), loss=True)
    assert boot is not None
    (a, b), (c, d) = boot.curve(points.x), boot.prediction(points.x)
    assert np.all(c < a)
    assert np.all(d > b)


@pytest.mark.parametrize("n", [8, 15])
def test_same_seed_same_bits_other_seed_other_draws(n: int) -> None:
    points, _ = simulated(np.random.default_rng(0), n, 2, "power_const")
    fit = fit_form(points, "power_const", loss=True)
    first, again, other = (bootstrap(points, fit, loss=True, n_boot=100, seed=s) for s in (5, 5, 6))
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.params() == again.params()
    assert first.params() != other.params()
    np.testing.assert_array_equal(first.prediction(points.x), again.prediction(points.x))


def test_no_residual_freedom_gives_no_interval() -> None:
    points = Points(np.array([1.0, 10.0, 100.0]), tuple(np.array([v]) for v in (0.9, 0.8, 0.75)))
    assert bootstrap(points, fit_form(points, "power_const", loss=True), loss=True) is None
    assert bootstrap(points, fit_form(points, "loglin", loss=True), loss=True, n_boot=50) is not None


def test_interval_uses_order_statistics_and_allows_infinity() -> None:
    values = np.concatenate([np.arange(90.0), np.full(10, np.inf)])
    assert interval(values) == (2.0, np.inf)


def test_pareto_keeps_only_unbeaten_points() -> None:
    x = np.array([1.0, 1.0, 2.0, 3.0, 4.0])
    y = np.array([0.9, 0.8, 0.85, 0.7, 0.7])
    np.testing.assert_array_equal(pareto(x, y, rising=False), [False, True, False, True, False])
    np.testing.assert_array_equal(pareto(x, -y, rising=True), [False, True, False, True, False])


def family(name: str, x: FloatArray, y: FloatArray, form: str = "loglin") -> Family:
    points = Points(x, tuple(np.array([v]) for v in y))
    fit = fit_form(points, form, loss=True)
    return Family(name, points, fit, bootstrap(points, fit, loss=True, n_boot=200))


def test_compute_ratio_slopes_and_crossing_by_hand() -> None:
    """base 1.0 - 0.01 log10 C and new 1.1 - 0.02 log10 C: equal at C = 1e10, and R(q) follows from the inverses."""
    x = np.geomspace(1e8, 1e13, 6)
    base = family("dlrm", x, 1.0 - 0.01 * np.log10(x))
    new = family("hstu", x, 1.1 - 0.02 * np.log10(x))
    result = compare(base, new)
    # base sees 0.92 .. 0.87, new 0.94 .. 0.84: both see 0.87 .. 0.92
    assert result.ratio.quality[[0, -1]] == pytest.approx([0.87, 0.92])
    expected = (1.0 - result.ratio.quality) / 0.01 - (1.1 - result.ratio.quality) / 0.02
    np.testing.assert_allclose(np.log10(result.ratio.ratio), expected, atol=1e-9)
    # q = 0.87: the base needs 1e13, the new family 10^11.5
    assert result.ratio.ratio[0] == pytest.approx(10**1.5)
    assert result.ratio.low[0] <= result.ratio.ratio[0] * 1.0001
    assert result.ratio.high[0] >= result.ratio.ratio[0] * 0.9999
    assert result.slopes == pytest.approx((-0.01, -0.02))
    assert result.slope_difference == pytest.approx(-0.01)
    assert result.crossing == pytest.approx(1e10, rel=1e-6)
    assert result.crossing_share == 1.0
    assert slope_per_decade(new)[0] == pytest.approx(-0.02)


def test_ranges_that_do_not_overlap_give_a_reason_not_a_number() -> None:
    x = np.geomspace(1e8, 1e12, 5)
    base, new = family("a", x, 0.95 - 0.001 * np.log10(x)), family("b", x * 1e6, 0.7 - 0.01 * np.log10(x))
    ratio = compute_ratio(base, new)
    assert len(ratio.quality) == 0
    assert "do not overlap" in ratio.reason
    result = compare(base, new)
    assert result.slope_difference is None
    assert result.slope_range is None


def test_a_plateau_the_base_never_leaves_gives_an_infinite_upper_limit() -> None:
    """Noise at the base's plateau makes some draws never reach the quality: the limit is infinite, not absent."""
    x = np.geomspace(1e12, 1e16, 9)
    noise = np.random.default_rng(2).normal(0, 0.002, 9)
    base = family("dlrm", x, 0.8 + 0.1 * (x / 1e12) ** -0.9 + noise, "power_const")
    new = family("hstu", x, 0.9 - 0.025 * np.log10(x / 1e12))
    ratio = compute_ratio(base, new)
    assert np.all(np.isfinite(ratio.ratio))
    assert np.isinf(ratio.high[0])


def fitted(x: FloatArray, y: FloatArray, seed: int) -> dict[str, tuple[CurveFit, Bootstrap | None]]:
    points = Points(x, tuple(np.array([v]) for v in y * np.exp(np.random.default_rng(seed).normal(0, 0.002, len(x)))))
    fits = fit_forms(points, loss=True)
    return {form: (fit, bootstrap(points, fit, loss=True, n_boot=300, seed=seed)) for form, fit in fits.items()}


def test_exponents_are_told_apart_from_offsets() -> None:
    """Laws that differ in a factor alone are not told apart; those that differ in the exponent are."""
    x = np.geomspace(1e10, 1e14, 9)
    base, lower, steeper = (
        fitted(x, y, seed) for seed, y in enumerate((2 * x**-0.03, 1.8 * x**-0.03, 2.5 * x**-0.045))
    )
    same, other = compare_exponents(base, lower), compare_exponents(base, steeper)
    assert same is not None
    assert other is not None
    assert (same.form, other.form) == ("power", "power")
    assert not same.differ
    assert other.differ
    assert other.difference == pytest.approx(0.015, abs=0.002)
    assert other.interval[0] < 0.015 < other.interval[1]
    assert compare_exponents({}, steeper) is None


def test_the_mean_ratio_of_parallel_laws_is_the_ratio() -> None:
    x = np.geomspace(1e8, 1e13, 6)
    result = compute_ratio(family("dlrm", x, 1.0 - 0.01 * np.log10(x)), family("hstu", x, 0.98 - 0.01 * np.log10(x)))
    assert result.mean == pytest.approx(100.0)
    assert result.mean_interval is not None
    assert result.mean_interval[0] <= 100.001
    assert result.mean_interval[1] >= 99.999
    assert compute_ratio(family("a", x, 0.9 + 0 * x), family("b", x, 0.5 + 0 * x)).mean is None
