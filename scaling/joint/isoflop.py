"""Chinchilla's approach 2: at each compute budget a parabola of the loss in ln N, and the law of the vertices.

The exponent is right, but N* is biased where alpha and beta differ, by some per cent over a grid of +-4x, more over
wider ones, since a valley of two different powers is no parabola. Budgets whose parabola has no minimum inside the
sizes that were trained are refused, and said to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.bootstrap import interval
from scaling.fit import Warn
from scaling.joint.uncertainty import WEBB
from scaling.table import FloatArray, TableError

_POINTS = 5
_SAME_BUDGET = 0.1  # of ln C: neighbours nearer than this are one budget
_FLAT = 1e-3  # a loss this much above the least, relative: the sizes that do as well


@dataclass(frozen=True)
class Valley:
    """One budget. n, y (k,): its runs. best: N*, and loss there; flat: the range of N within 0.1 % of it.

    problem: why there is no N*, empty if there is.
    """

    compute: float
    n: FloatArray
    y: FloatArray
    coefficients: FloatArray
    best: float
    loss: float
    flat: tuple[float, float]
    problem: str = ""


@dataclass(frozen=True)
class Power:
    """ln X = ln k + a ln C over budgets, with 95 % intervals and joint draws."""

    k: float
    a: float
    draws: dict[str, FloatArray]

    def at(self, compute: FloatArray) -> FloatArray:
        """X (m,) at budgets."""
        return self.k * np.asarray(compute) ** self.a

    def band(self, compute: FloatArray) -> tuple[FloatArray, FloatArray]:
        """95 % limits (m,)."""
        values = self.draws["k"][:, None] * np.asarray(compute)[None] ** self.draws["a"][:, None]
        low, high = np.array([interval(v) for v in values.T]).T
        return low, high

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of both parameters."""
        return {name: interval(values) for name, values in self.draws.items()}


@dataclass(frozen=True)
class IsoFlop:
    """Every budget, and the laws of N* and D* = C / (6 N*)."""

    valleys: tuple[Valley, ...]
    n: Power
    d: Power
    warnings: tuple[Warn, ...]


def budgets_of(compute: FloatArray) -> FloatArray:
    """The budget (n,) of each run: the geometric mean of those whose compute differs by little from one to the next."""
    order = np.argsort(compute)
    logs = np.log(compute[order])
    group = np.concatenate([[0], np.cumsum(np.diff(logs) > _SAME_BUDGET)])
    found = np.empty(len(compute))
    for one in np.unique(group):
        found[order[group == one]] = np.exp(logs[group == one].mean())
    return found


def isoflop(
    n: FloatArray,
    compute: FloatArray,
    y: FloatArray,
    *,
    budget: FloatArray | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> IsoFlop:
    """Fit the valleys and the law of their vertices.

    Args:
        n: parameters (runs,).
        compute: FLOPs (runs,).
        y: loss (runs,).
        budget: of each run; None for `budgets_of`.
        n_boot: draws: each valley's residuals by Webb's weights (wild bootstrap), draws without a vertex made again.
        seed: of the draws.

    Raises:
        TableError: fewer than two budgets have a minimum inside; it names each refusal.
    """
    budget = budgets_of(compute) if budget is None else budget
    valleys = tuple(_valley(float(one), n[budget == one], y[budget == one]) for one in np.unique(budget))
    sound = [valley for valley in valleys if not valley.problem]
    if len(sound) < 2:
        why = "; ".join(f"{valley.compute:.3g} FLOPs: {valley.problem}" for valley in valleys if valley.problem)
        raise TableError(f"a law of N* needs at least two budgets with a minimum inside ({why or 'one budget'})")
    logs = np.log([valley.compute for valley in sound])
    rng = np.random.default_rng([seed, 0])
    vertices = np.stack([_drawn(valley, n_boot, rng) for valley in sound], axis=1)
    slope, level = _line(logs, vertices)
    own, at = _line(logs, np.log([[valley.best for valley in sound]]))
    power = Power(float(np.exp(at[0])), float(own[0]), {"k": np.exp(level), "a": slope})
    data = Power(1 / (6 * power.k), 1 - power.a, {"k": 1 / (6 * power.draws["k"]), "a": 1 - slope})
    refused = [Warn("no_interior_minimum", f"{v.compute:.3g} FLOPs: {v.problem}") for v in valleys if v.problem]
    if len(sound) < 3:
        refused.append(Warn("few_budgets", "two budgets: how well a power law describes them cannot be seen"))
    return IsoFlop(valleys, power, data, tuple(refused))


def _valley(compute: float, n: FloatArray, y: FloatArray) -> Valley:
    order = np.argsort(n)
    n, y = n[order], y[order]
    if len(np.unique(n)) < _POINTS:
        none = np.full(3, np.nan)
        return Valley(compute, n, y, none, np.nan, np.nan, (np.nan, np.nan), f"fewer than {_POINTS} sizes")
    middle = np.log(n).mean()
    x = np.log(n) - middle
    curve, slope, level = found = np.polyfit(x, y, 2)
    problem = "the loss does not curve upwards" if curve <= 0 else ""
    vertex = -slope / (2 * curve)
    if not problem and not x[0] < vertex < x[-1]:
        problem = "the least loss lies outside the sizes trained"
    if problem:
        return Valley(compute, n, y, found, np.nan, np.nan, (np.nan, np.nan), problem)
    least = float(level - slope**2 / (4 * curve))
    half = np.sqrt(_FLAT * least / curve)
    flat = float(np.exp(middle + vertex - half)), float(np.exp(middle + vertex + half))
    return Valley(compute, n, y, found, float(np.exp(middle + vertex)), least, flat)


def _drawn(valley: Valley, n_boot: int, rng: np.random.Generator) -> FloatArray:
    """ln N* (n_boot,) of a valley whose residuals, corrected for leverage, were weighted at random."""
    middle = np.log(valley.n).mean()
    x = np.log(valley.n) - middle
    design = np.stack([x**2, x, np.ones_like(x)], axis=1)
    solve = np.linalg.pinv(design)
    leverage = np.sum(design * solve.T, axis=1)
    fitted = design @ valley.coefficients
    residual = (valley.y - fitted) / (1 - np.minimum(leverage, 0.99))
    found = np.full(n_boot, np.log(valley.best))
    missing = np.arange(n_boot)
    for _ in range(20):
        y = fitted + rng.choice(WEBB, size=(len(missing), len(x))) * residual
        curve, slope, _ = solve @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -slope / (2 * curve)
        sound = (curve > 0) & (vertex > x[0]) & (vertex < x[-1])
        found[missing[sound]] = middle + vertex[sound]
        missing = missing[~sound]
        if not len(missing):
            break
    return found


def _line(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Slopes and levels at x = 0 (R,) of least-squares lines through y (R, m)."""
    centred = x - x.mean()
    slope = y @ centred / np.sum(centred**2)
    return slope, y.mean(axis=1) - slope * x.mean()
