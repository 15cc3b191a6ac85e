"""How a law spends compute best: N*, D* and H* at a budget, with bands from the law's draws.

A run costs C = k N^p D^q H^s FLOPs. Where each term of a law has one variable, x^-e with coefficient c, the least loss
at a budget has e c x^-e / p alike for all of them (Lagrange), in closed form: x* = (c e / (lambda p))^(1/e).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.fit import MAX_EXTRAPOLATION, Warn
from scaling.joint.fit import LEAST_EXPONENT, JointFit
from scaling.joint.uncertainty import JointDraws
from scaling.table import FloatArray, TableError

_GRID, _ZOOMS = 65, 8


@dataclass(frozen=True)
class Cost:
    """C = factor times the product of each variable to its power. misfit: the root mean square of ln C around it."""

    factor: float
    powers: Mapping[str, float]
    misfit: float = 0.0

    @property
    def equation(self) -> str:
        """As text."""
        parts = [name.upper() if power == 1 else f"{name.upper()}^{power:.4g}" for name, power in self.powers.items()]
        return " ".join([f"C = {self.factor:.5g}", *parts])

    def at(self, data: Mapping[str, FloatArray]) -> FloatArray:
        """FLOPs (n,) of runs."""
        log = sum(power * np.log(data[name]) for name, power in self.powers.items())
        return self.factor * np.exp(np.asarray(log))


SIX_ND = Cost(6.0, {"n": 1.0, "d": 1.0})


def fit_cost(data: Mapping[str, FloatArray], compute: FloatArray) -> Cost:
    """The cost that runs of known compute have, by least squares in logarithms.

    Raises:
        TableError: compute that does not rise with a variable, or variables that vary together.
    """
    names = [name for name in ("n", "d", "h") if name in data]
    columns = np.stack([np.ones(len(compute)), *(np.log(data[name]) for name in names)], axis=1)
    found, _, rank, _ = np.linalg.lstsq(columns, np.log(compute), rcond=1e-10)
    if rank < len(found):
        raise TableError("what a run costs cannot be told from these runs: their sizes vary together")
    powers = dict(zip(names, found[1:].tolist()))
    for name, power in powers.items():
        if power <= 1e-3:
            raise TableError(f"compute does not rise with {name.upper()} in these runs (power {power:.2g})")
    misfit = float(np.sqrt(np.mean((columns @ found - np.log(compute)) ** 2)))
    return Cost(float(np.exp(found[0])), powers, misfit)


@dataclass(frozen=True)
class Allocation:
    """The best use of each budget (m,): each variable, and the loss there, with the limits of 95 % intervals."""

    compute: FloatArray
    best: dict[str, FloatArray]
    loss: FloatArray
    limits: dict[str, tuple[FloatArray, FloatArray]]
    one_run: tuple[FloatArray, FloatArray] | None
    warnings: tuple[Warn, ...]


def allocate(
    fit: JointFit,
    compute: Sequence[float],
    *,
    cost: Cost = SIX_ND,
    draws: JointDraws | None = None,
    unique: float | None = None,
) -> Allocation:
    """N*, D* (and H*) at budgets in FLOPs.

    Args:
        fit: the law.
        compute: budgets (m,).
        cost: what a run costs.
        draws: of the fit, for limits; without, there are none.
        unique: the targets that differ, for a law of repeated data.

    Raises:
        TableError: a cost without one of the law's variables, a law of repeated data without ``unique``, or a law
            without a best use (see `no_optimum`).
    """
    if without := no_optimum(fit):
        raise TableError(without)
    budgets = np.asarray(compute, dtype=np.float64)
    best, loss = _best(fit, fit.theta[None], budgets, cost, unique)
    limits: dict[str, tuple[FloatArray, FloatArray]] = {}
    one_run = None
    own = {name: values[0] for name, values in best.items()}
    warnings: list[Warn] = []
    if draws is not None:
        falling = np.all(
            [draws.theta[:, fit.law.params.index(name)] > LEAST_EXPONENT for name in fit.law.exponents], axis=0
        )
        if not falling.all():
            text = f"by {np.mean(~falling):.1%} of the draws a size has no best value: limits are of the others"
            warnings.append(Warn("no_optimum", text))
        each, losses = _best(fit, draws.theta[falling], budgets, cost, unique)
        for name, values in {**each, "loss": losses}.items():
            middle = loss[0] if name == "loss" else own[name]
            pairs = [draws.around(float(m), v, log=True) for m, v in zip(middle, values.T)]
            low, high = np.array(pairs).T
            limits[name] = low, high
        at = {name: own[name] for name in fit.law.variables if name != "u"}
        one_run = draws.prediction(at | ({"u": np.full(len(budgets), unique)} if unique else {}))
    spent = cost.at(fit.data)
    far = max(float(budgets.max() / spent.max()), float(spent.min() / budgets.min()))
    if far > MAX_EXTRAPOLATION:
        warnings.append(Warn("far_extrapolation", f"a budget is {far:.0f}x outside the compute of the runs"))
    return Allocation(budgets, own, loss[0], limits, one_run, tuple(warnings))


def no_optimum(fit: JointFit) -> str:
    """Why a law has no best use of a budget, in a sentence: an exponent below zero, by which less is always better, or
    so near to it that a term hardly moves with its size."""
    for name in fit.law.exponents:
        if not fit.params[name] > LEAST_EXPONENT:
            return f"the law has no best use of a budget: its exponent {name} is {fit.params[name]:.3g}"
    return ""


def _best(
    fit: JointFit, theta: FloatArray, budgets: FloatArray, cost: Cost, unique: float | None
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Each variable at its best (R, m), and the loss."""
    free = [term for term in fit.law.terms if term.variable]
    for term in free:
        if term.variable not in cost.powers:
            raise TableError(f"the cost {cost.equation} does not say what {term.variable.upper()} costs")
    if fit.law.repeats:
        if unique is None:
            raise TableError(f"the law {fit.law.name} needs the number of targets that differ to spend a budget")
        return _searched(fit, theta, budgets, cost, unique)
    # In logarithms throughout: a steep law's coefficients are too large for numbers.
    level = {name: value[:, None] for name, value in fit.model.log_coefficients(theta).items()}
    exponent = {name: theta[:, fit.law.params.index(name), None] for name in fit.law.exponents}
    scale = {t.variable: level[t.coefficient] + np.log(exponent[t.exponent] / cost.powers[t.variable]) for t in free}
    stiffness = {t.variable: cost.powers[t.variable] / exponent[t.exponent] for t in free}
    total = sum(stiffness[name] * scale[name] for name in stiffness)
    log_lambda = (total - np.log(budgets / cost.factor)[None, :]) / sum(stiffness.values())
    best = {t.variable: (scale[t.variable] - log_lambda) / exponent[t.exponent] for t in free}
    terms = [level[t.coefficient] - exponent[t.exponent] * best[t.variable] for t in free]
    loss = np.exp(level["E"]) + sum(np.exp(term) for term in terms)
    with np.errstate(over="ignore"):
        return {name: np.exp(value) for name, value in best.items()}, loss


def _searched(
    fit: JointFit, theta: FloatArray, budgets: FloatArray, cost: Cost, unique: float
) -> tuple[dict[str, FloatArray], FloatArray]:
    """As `_best`, by a grid of ln N and zooms into it: for a law of repeated data."""
    middle = np.log(budgets / cost.factor) / (cost.powers["n"] + cost.powers["d"])
    low, high = np.repeat((middle - 12.0)[None], len(theta), 0), np.repeat((middle + 12.0)[None], len(theta), 0)
    for _ in range(_ZOOMS):
        n = low[..., None] + (high - low)[..., None] * np.linspace(0.0, 1.0, _GRID)
        d = (np.log(budgets / cost.factor)[None, :, None] - cost.powers["n"] * n) / cost.powers["d"]
        losses = np.empty_like(n)
        for row, own in enumerate(theta):
            data = {"n": np.exp(n[row]).ravel(), "d": np.exp(d[row]).ravel(), "u": np.full(n[row].size, unique)}
            losses[row] = fit.model.at(own[None], data)[0].reshape(n[row].shape)
        place = np.argmin(losses, axis=-1)
        width = (high - low) / (_GRID - 1)
        at = np.take_along_axis(n, place[..., None], -1)[..., 0]
        low, high = at - width, at + width
    best = {"n": np.exp(at), "d": np.exp((np.log(budgets / cost.factor) - cost.powers["n"] * at) / cost.powers["d"])}
    return best, losses.min(axis=-1)
