"""The two-variable law L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, approach 3).

Objective: the sum over runs of Huber(ln predicted - ln L) with delta = 1e-3. Two habits decide whether it
is found. The objective is divided by delta^2, since its raw value near 1e-3 stops optimisers at their
default tolerances; and the start comes from variable projection (E, A, B exactly for each pair of
exponents), followed by a descent in delta, so that the nearly non-smooth last problem starts at its
answer. Reference: Besiroglu et al. 2024, a re-analysis of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from scaling.bootstrap import interval
from scaling.fit import MAX_CONDITION, Warn
from scaling.table import FloatArray, TableError

DELTA = 1e-3
_DELTAS = (1.0, 3e-2, 3e-3)
_STARTS = 5
_NAMES = ("A", "B", "E", "alpha", "beta")


@dataclass(frozen=True)
class NDFit:
    """L(N, D) fitted: parameters at full precision, the summed Huber objective and how sure the optimum is.

    `share` is the share of starts that ended within 0.01 % of the best objective; `gradient` the largest component
    of the scaled objective's gradient there; `condition` that of the linearised problem with unit columns.
    """

    A: float
    B: float
    E: float
    alpha: float
    beta: float
    objective: float
    n: int
    share: float
    gradient: float
    condition: float
    warnings: tuple[Warn, ...] = ()

    @property
    def params(self) -> dict[str, float]:
        """The parameters by name, as `intervals_nd` names them, `a` included."""
        return {name: float(getattr(self, name)) for name in (*_NAMES, "a")}

    @property
    def a(self) -> float:
        """The exponent of N*(C): beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def at(self, n: FloatArray, d: FloatArray) -> FloatArray:
        """Predicted loss at N = n parameters and D = d targets."""
        return self.E + self.A * np.asarray(n) ** -self.alpha + self.B * np.asarray(d) ** -self.beta

    def optimal(self, compute: float) -> tuple[float, float]:
        """(N*, D*) that minimise the loss at compute = 6 N D FLOPs."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = g * (compute / 6) ** self.a
        return n, compute / 6 / n


class _Problem:
    """Centred logs of the data and the Huber objective over theta = (ln A', ln B', ln E, alpha, beta).

    A' and B' are the terms' values at the geometric mean of N and D, which decorrelates them from the exponents.
    """

    def __init__(self, n: FloatArray, d: FloatArray, loss: FloatArray) -> None:
        self.mean = float(np.mean(np.log(n))), float(np.mean(np.log(d)))
        self.u, self.v = np.log(n) - self.mean[0], np.log(d) - self.mean[1]
        self.loss, self.log_loss = loss, np.log(loss)

    def terms(self, theta: FloatArray) -> FloatArray:
        """ln of the three terms, (3, n)."""
        return np.stack([theta[0] - theta[3] * self.u, theta[1] - theta[4] * self.v, np.full_like(self.u, theta[2])])

    def jacobian(self, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Residuals ln predicted - ln L (n,) and their derivatives (5, n)."""
        terms = self.terms(theta)
        total = np.logaddexp.reduce(terms, axis=0)
        share = np.exp(terms - total)
        rows = np.stack([share[0], share[1], share[2], -share[0] * self.u, -share[1] * self.v])
        return total - self.log_loss, rows

    def objective(self, theta: FloatArray, delta: float) -> tuple[float, FloatArray]:
        """Summed Huber loss over delta^2, and its gradient (5,)."""
        residual, rows = self.jacobian(theta)
        scaled = np.abs(residual) / delta
        value = np.where(scaled <= 1, 0.5 * scaled**2, scaled - 0.5).sum()
        return float(value), rows @ np.clip(residual / delta, -1, 1) / delta

    def projected(self, alpha: float, beta: float) -> tuple[float, FloatArray]:
        """Non-negative E, A', B' that minimise the relative squared error at these exponents."""
        design = np.stack([np.exp(-alpha * self.u), np.exp(-beta * self.v), np.ones_like(self.u)], axis=1)
        weights, norm = nnls(design / self.loss[:, None], np.ones_like(self.loss))
        # A zero coefficient has no logarithm: it starts small instead and the descent moves it.
        floor = 1e-6 * float(np.min(self.loss))
        return float(norm), np.array([*np.log(np.maximum(weights, floor)), alpha, beta])


def fit_nd(n: FloatArray, d: FloatArray, loss: FloatArray, *, delta: float = DELTA) -> NDFit:
    """Fit E + A/N^alpha + B/D^beta by Huber loss on log residuals.

    Args:
        n: parameters of each run (runs,), positive; which count is the caller's to state.
        d: training targets of each run (runs,), positive.
        loss: the loss of each run (runs,), positive.
        delta: Huber width on the log loss.

    Raises:
        TableError: fewer than six runs, a non-positive value, or fewer than three distinct N or D.
    """
    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
    _check(n, d, loss)
    problem = _Problem(n, d, loss)
    ends = [_descend(problem, start, delta) for start in _starts(problem)]
    best = min(ends, key=lambda end: end[0])
    share = float(np.mean([end[0] <= best[0] * (1 + 1e-4) + 1e-12 for end in ends]))
    return _result(problem, best[1], delta, share)


def bootstrap_nd(
    n: FloatArray, d: FloatArray, loss: FloatArray, fit: NDFit, *, n_boot: int = 1000, seed: int = 0
) -> dict[str, FloatArray]:
    """Joint pairs-bootstrap draws over runs, warm-started at `fit`: {A, B, E, alpha, beta, a: (n_boot,)}."""
    rng = np.random.default_rng(seed)
    draws: dict[str, FloatArray] = {name: np.empty(n_boot) for name in (*_NAMES, "a")}
    for i in range(n_boot):
        pick = rng.integers(len(n), size=len(n))
        problem = _Problem(n[pick], d[pick], loss[pick])
        _, theta = _polish(problem, _theta(problem, fit), DELTA)
        values = _natural(problem, theta)
        for name, value in zip(_NAMES, values):
            draws[name][i] = value
        draws["a"][i] = values[4] / (values[3] + values[4])
    return draws


def intervals_nd(draws: dict[str, FloatArray]) -> dict[str, tuple[float, float]]:
    """The 95 % percentile interval of each quantity drawn by `bootstrap_nd`."""
    return {name: interval(values) for name, values in draws.items()}


def _check(n: FloatArray, d: FloatArray, loss: FloatArray) -> None:
    if not len(n) == len(d) == len(loss) or len(n) < 6:
        raise TableError(f"L(N, D) has five parameters and needs at least six runs, got {len(n)}")
    for name, values in (("N", n), ("D", d), ("loss", loss)):
        if not np.all(np.isfinite(values) & (values > 0)):
            raise TableError(f"L(N, D) needs positive finite values, {name} has others")
    for name, values in (("N", n), ("D", d)):
        if len(np.unique(values)) < 3:
            raise TableError(f"L(N, D) needs at least three distinct values of {name}")


def _starts(problem: _Problem) -> list[FloatArray]:
    """The best pairs of exponents of a coarse grid, E, A and B solved exactly at each."""
    grid = np.geomspace(0.03, 2.0, 16)
    found = [problem.projected(alpha, beta) for alpha in grid for beta in grid]
    found.sort(key=lambda pair: pair[0])
    return [theta for _, theta in found[:_STARTS]]


def _descend(problem: _Problem, theta: FloatArray, delta: float) -> tuple[float, FloatArray]:
    for wide in (*(w for w in _DELTAS if w > delta), delta):
        value, theta = _polish(problem, theta, wide)
    return value, theta


def _polish(problem: _Problem, theta: FloatArray, delta: float) -> tuple[float, FloatArray]:
    """BFGS, restarted while it improves: a Huber this narrow can stall a line search at a kink."""
    value, _ = problem.objective(theta, delta)
    for _ in range(6):
        end = minimize(
            problem.objective, theta, args=(delta,), jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 500}
        )
        gained = value - float(end.fun)
        if gained > 0:
            value, theta = float(end.fun), end.x
        if gained <= 1e-10 * max(value, 1e-12):
            break
    return value, theta


def _natural(problem: _Problem, theta: FloatArray) -> tuple[float, ...]:
    a, b, e, alpha, beta = (float(v) for v in theta)
    return (
        float(np.exp(a + alpha * problem.mean[0])),
        float(np.exp(b + beta * problem.mean[1])),
        float(np.exp(e)),
        alpha,
        beta,
    )


def _theta(problem: _Problem, fit: NDFit) -> FloatArray:
    return np.array(
        [
            np.log(fit.A) - fit.alpha * problem.mean[0],
            np.log(fit.B) - fit.beta * problem.mean[1],
            np.log(fit.E),
            fit.alpha,
            fit.beta,
        ]
    )


def _result(problem: _Problem, theta: FloatArray, delta: float, share: float) -> NDFit:
    value, gradient = problem.objective(theta, delta)
    _, rows = problem.jacobian(theta)
    lengths = np.linalg.norm(rows, axis=1)
    condition = float(np.linalg.cond((rows / np.where(lengths > 0, lengths, 1.0)[:, None]).T))
    A, B, E, alpha, beta = _natural(problem, theta)
    warnings = []
    if min(E, np.exp(theta[0]), np.exp(theta[1])) < 1e-4 * float(np.min(problem.loss)):
        warnings.append(Warn("at_bound", "a term of L(N, D) vanished: E, A or B is at its bound of zero"))
    if condition > MAX_CONDITION:
        warnings.append(Warn("ill_conditioned", f"condition number {condition:.1e}: parameters trade off"))
    return NDFit(
        A=A,
        B=B,
        E=E,
        alpha=alpha,
        beta=beta,
        objective=value * delta**2,
        n=len(problem.u),
        share=share,
        gradient=float(np.max(np.abs(gradient))),
        condition=condition,
        warnings=tuple(warnings),
    )
