"""A joint law fitted to runs, with what a reader needs to know before believing it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import stats
from scipy.optimize import nnls

from scaling.fit import MAX_CONDITION, Warn
from scaling.joint.laws import LAWS, Data, Law, Model, beyond
from scaling.joint.solve import ESTIMATORS, Estimator, minimise
from scaling.table import FloatArray, TableError

_GRID = {1: 33, 2: 16, 3: 9}  # exponents tried a side, by their number
_STARTS = 6
LEAST_EXPONENT = 0.01  # a tenfold size moves a term by 2 %
_CORRELATION, _DISTINCT = 0.99, 3
_CHANCE, _SMALLEST = 1e-3, 1e-4  # a bend that noise makes more often, or this small a part of the loss, is not told
_LABELS = {"n": "N", "d": "D", "h": "H", "u": "the unique targets"}


@dataclass(frozen=True)
class JointFit:
    """A law fitted to n runs.

    params: at full precision, as the equation has them. objective: summed over runs, see `Estimator`. share: of the
    starts that ended within 0.01 % of the best objective. gradient: the largest component of that of ln objective,
    NaN for absolute errors.
    condition: of the residuals' derivatives by theta, columns of unit length. residuals (n,): fit minus ln y or y.
    """

    law: Law
    estimator: Estimator
    model: Model = field(repr=False)
    data: Data = field(repr=False)
    y: FloatArray = field(repr=False)
    theta: FloatArray = field(repr=False)
    params: dict[str, float]
    objective: float
    share: float
    gradient: float
    condition: float
    residuals: FloatArray = field(repr=False)
    warnings: tuple[Warn, ...] = ()

    def __len__(self) -> int:
        return len(self.y)

    def at(self, data: Data) -> FloatArray:
        """The fit's values at other runs (n,)."""
        return self.model.at(self.theta[None], data)[0]

    @property
    def optimal_exponent(self) -> float | None:
        """a in N*(C) ~ C^a, beta / (alpha + beta), of a law in N and D alone."""
        if not {"alpha", "beta"} <= self.params.keys():
            return None
        return self.params["beta"] / (self.params["alpha"] + self.params["beta"])

    @property
    def rmse(self) -> float:
        """Root mean square of the residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))


def fit_joint(law: str | Law, data: Data, y: FloatArray, estimator: str | Estimator = "huber") -> JointFit:
    """Fit a law of `laws.LAWS`.

    Args:
        law: by name.
        data: each of the law's variables (runs,), positive; which parameters and FLOPs are counted is the caller's to
            state.
        y: the loss of each run (runs,), positive and falling.
        estimator: of `solve.ESTIMATORS`.

    Raises:
        TableError: fewer runs than parameters and one more, values that are not positive, or a variable with fewer than
            three distinct values.
    """
    law = LAWS[law] if isinstance(law, str) else law
    estimator = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
    data = {name: np.asarray(data[name], dtype=np.float64) for name in law.variables}
    y = np.asarray(y, dtype=np.float64)
    check(law, data, y)
    model = Model(law, data)
    ends = minimise(model, y, starts(model, y, estimator), estimator, widest=1.0 if estimator.log else float(y.max()))
    totals = estimator.total(_residuals(model, y, ends, estimator))
    best = int(np.argmin(totals))
    share = float(np.mean(totals <= totals[best] * (1 + 1e-4) + 1e-18 * len(y)))
    return result(model, data, y, ends[best], estimator, share)


def result(model: Model, data: Data, y: FloatArray, theta: FloatArray, estimator: Estimator, share: float) -> JointFit:
    """What is to be told of a minimum."""
    residuals = _residuals(model, y, theta[None], estimator)[0]
    slopes = _slopes(model, theta, estimator)
    lengths = np.linalg.norm(slopes, axis=0)
    condition = float(np.linalg.cond(slopes / np.where(lengths > 0, lengths, 1.0)))
    objective = float(estimator.total(residuals))
    return JointFit(
        law=model.law,
        estimator=estimator,
        model=model,
        data=data,
        y=y,
        theta=theta,
        params={name: float(value[0]) for name, value in model.natural(theta[None]).items()},
        objective=objective,
        share=share,
        gradient=_gradient(residuals, slopes, estimator) / max(objective, 1e-300),
        condition=condition,
        residuals=residuals,
        warnings=(*_cautions(model, data, y, theta, condition), *_bends(model, y, slopes, residuals, estimator)),
    )


def check(law: Law, data: Data, y: FloatArray) -> None:
    """Raises what `fit_joint` says."""
    needed = len(law.params) + 1
    if any(len(values) != len(y) for values in data.values()) or len(y) < needed:
        raise TableError(
            f"the law {law.name} has {len(law.params)} parameters and needs at least {needed} runs, got {len(y)}"
        )
    for name, values in {**data, "the loss": y}.items():
        if not np.all(np.isfinite(values) & (values > 0)):
            raise TableError(f"the law {law.name} needs positive finite values, {_LABELS.get(name, name)} has others")
    for name in law.variables:
        if name != "u" and len(np.unique(data[name])) < _DISTINCT:
            raise TableError(f"the law {law.name} needs at least {_DISTINCT} distinct values of {_LABELS[name]}")


def starts(model: Model, y: FloatArray, estimator: Estimator) -> FloatArray:
    """(R, P): the best exponents of a coarse grid, with the coefficients that are best for each, exactly (variable
    projection, Golub and Pereyra 1973)."""
    law = model.law
    grid = np.geomspace(0.03, 2.0, _GRID[len(law.exponents)])
    exponents = np.stack(np.meshgrid(*[grid] * len(law.exponents), indexing="ij"), axis=-1).reshape(
        -1, len(law.exponents)
    )
    theta = np.zeros((len(exponents), len(law.params)))
    first = len(law.coefficients)
    theta[:, first : first + len(law.exponents)] = exponents
    if law.repeats:
        theta[:, -2:] = np.log([5.0, 15.0])  # about those published
    found = []
    weigh = 1.0 / y if estimator.log else np.ones_like(y)
    for row, design in zip(theta, np.exp(_plain(model, theta))):
        weights, norm = nnls(design * weigh[:, None], y * weigh)
        # A zero coefficient has no logarithm: it starts small instead and the descent moves it.
        row[:first] = np.log(np.maximum(weights, 1e-6 * float(y.min())))
        found.append(norm)
    return theta[np.argsort(found)[:_STARTS]]


def _plain(model: Model, theta: FloatArray) -> FloatArray:
    """z (R, n, K) with coefficients of one; repeated data are taken as they are at the start, without saturation."""
    if not model.law.repeats:
        return model.terms(theta)[0]
    return Model(Law("", "", ("n", "d"), model.law.terms), _of(model)).terms(theta[:, :-2])[0]


def _of(model: Model) -> Data:
    return {name: np.exp(values) for name, values in model.logs.items()}


def _residuals(model: Model, y: FloatArray, theta: FloatArray, estimator: Estimator) -> FloatArray:
    """(R, n) fit minus ln y, or minus y."""
    fitted = model.at(theta)
    return np.log(fitted) - np.log(y) if estimator.log else fitted - y


def slopes_of(fit: JointFit) -> FloatArray:
    """Derivatives (n, P) of a fit's residuals by theta."""
    return _slopes(fit.model, fit.theta, fit.estimator)


def _slopes(model: Model, theta: FloatArray, estimator: Estimator) -> FloatArray:
    """Derivatives (n, P) of the residuals."""
    z, design = model.terms(theta[None])
    design = design[0] if design.ndim == 4 else design
    each = np.exp(z[0] - np.logaddexp.reduce(z[0], axis=-1, keepdims=True)) if estimator.log else np.exp(z[0])
    return np.einsum("nk,nkp->np", each, design)


def _gradient(residuals: FloatArray, slopes: FloatArray, estimator: Estimator) -> float:
    """The objective's largest; NaN for absolute errors, which have a kink where they are least."""
    if estimator.loss == "lad":
        return math.nan
    pull = 2.0 * residuals if estimator.loss == "lsq" else np.clip(residuals, -estimator.delta, estimator.delta)
    return float(np.max(np.abs(slopes.T @ pull)))


def _cautions(model: Model, data: Data, y: FloatArray, theta: FloatArray, condition: float) -> list[Warn]:
    law, found = model.law, []
    for first, second in [("n", "d"), ("n", "h"), ("d", "h")]:
        if first in data and second in data:
            together = abs(np.corrcoef(model.logs[first], model.logs[second])[0, 1])
            if together > _CORRELATION:
                names = f"{_LABELS[first]} and {_LABELS[second]}"
                how = f"{names} vary together (correlation of their logarithms {together:.4f})"
                text = f"{how}: their terms cannot be told apart"
                found.append(Warn("degenerate_design", text))
    smallest = 1e-4 * float(y.min())
    for term, value in zip(law.terms, theta):
        if np.exp(value) < smallest:
            vanished = f"the term of {term.coefficient} is as good as zero in the middle of these runs"
            found.append(Warn("at_bound", vanished if term.variable else "E is at its bound of zero"))
    for name, value in zip(law.params[len(law.coefficients) :], theta[len(law.coefficients) :]):
        if name in law.exponents and not LEAST_EXPONENT < value < 3.0:
            found.append(Warn("at_bound", f"the exponent {name} = {value:.3g} describes no power law of these runs"))
    found += _unseen_decay(model, theta) if law.repeats else []
    if condition > MAX_CONDITION:
        found.append(Warn("ill_conditioned", f"condition number {condition:.1e}: parameters trade off"))
    return found


def _unseen_decay(model: Model, theta: FloatArray) -> list[Warn]:
    """Of each scale of decay so far beyond the runs' repeats that the worth of what is repeated falls by nothing."""
    natural = model.natural(theta[None])
    found = []
    for name, times in beyond(natural, model.logs).items():
        most, scale = float(np.max(times)), float(natural[name][0])
        if scale > 100 * most:
            has = f"have at most {most:.2g} times more parameters than their data are worth"
            has = has if name == "R_N" else f"repeat targets at most {most:.2g} times"
            text = f"{name} = {scale:.3g} is not told: the runs {has}, and all of it counts in full"
            found.append(Warn("at_bound", text))
    return found


def _bends(model: Model, y: FloatArray, slopes: FloatArray, residuals: FloatArray, estimator: Estimator) -> list[Warn]:
    """Of each size along which the runs curve away from the law: its logarithm squared is one more regressor, what the
    parameters can do is taken out of it, and errors may differ from run to run (HC3, MacKinnon and White 1985)."""
    found = []
    for name in model.law.variables:
        square = (model.logs[name] - model.logs[name].mean()) ** 2
        free = len(residuals) - slopes.shape[1] - 1
        if name == "u" or free < 3:
            continue
        own = square - slopes @ np.linalg.lstsq(slopes, square, rcond=None)[0]
        if np.linalg.norm(own) < 1e-6 * np.linalg.norm(square):
            continue
        basis, _ = np.linalg.qr(np.column_stack([slopes, square]))
        errors = residuals - basis @ (basis.T @ residuals)
        errors /= np.maximum(1 - np.sum(basis**2, axis=1), 1e-3)
        bend = -(own @ residuals) / (own @ own)
        spread = float(np.linalg.norm(own * errors)) / (own @ own)
        most = float(np.max(np.abs(bend * own / (1.0 if estimator.log else y))))
        if abs(bend) > spread * stats.t.isf(_CHANCE / 2, free) and most > _SMALLEST:
            side = "above" if bend > 0 else "below"
            how = f"runs bend away from the law along {_LABELS[name]}, {side} it at both ends, by up to {most:.2%}"
            found.append(Warn("bent", f"{how}: what it says beyond them is doubtful"))
    return found
