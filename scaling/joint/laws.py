"""The joint laws as sums of positive terms, ln y = ln sum_k exp(z_k), with z_k affine in the parameters or nearly so.

    chinchilla        y = E + A N^-alpha + B D^-beta                       Hoffmann et al. 2022
    gadre             y = E + (a M^eta + b M^-eta) C^-eta, M = D / N       Gadre et al. 2024: alpha = beta = 2 eta above
    history           y = E + A N^-alpha + B D^-beta + G H^-gamma          a third axis, the history's length
    data_constrained  chinchilla in N' and D', which repeated data saturate  Muennighoff et al. 2023

A law is solved for theta: the logarithms of its coefficients at the geometric mean of the data, which decorrelates them
from the exponents, and the exponents. Arrays: R problems, n runs, K terms, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scaling.table import FloatArray

Data = Mapping[str, FloatArray]


@dataclass(frozen=True)
class Term:
    """coefficient * variable^-exponent; the constant has neither variable nor exponent."""

    coefficient: str
    variable: str = ""
    exponent: str = ""


@dataclass(frozen=True)
class Law:
    """A law by name.

    variables: the columns it needs, ``n`` parameters, ``d`` targets trained on, ``h`` history length, ``u`` the targets
    among them that differ. exponents: each once. repeats: whether N and D are those of `repeated`.
    """

    name: str
    equation: str
    variables: tuple[str, ...]
    terms: tuple[Term, ...]
    repeats: bool = False

    @property
    def coefficients(self) -> tuple[str, ...]:
        """In the order of the terms."""
        return tuple(term.coefficient for term in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(term.exponent for term in self.terms if term.exponent))

    @property
    def params(self) -> tuple[str, ...]:
        """The names of the parameters, as theta has them."""
        return (*self.coefficients, *self.exponents, *(("R_N", "R_D") if self.repeats else ()))


_POWERS = (Term("A", "n", "alpha"), Term("B", "d", "beta"))
_TIED = (Term("A", "n", "alpha"), Term("B", "d", "alpha"))
_FLOOR = Term("E")
LAWS = {
    law.name: law
    for law in (
        Law("chinchilla", "y = E + A N^-alpha + B D^-beta", ("n", "d"), (*_POWERS, _FLOOR)),
        Law("gadre", "y = E + A N^-alpha + B D^-alpha, alpha = 2 eta", ("n", "d"), (*_TIED, _FLOOR)),
        Law(
            "history",
            "y = E + A N^-alpha + B D^-beta + G H^-gamma",
            ("n", "d", "h"),
            (*_POWERS, Term("G", "h", "gamma"), _FLOOR),
        ),
        Law(
            "data_constrained",
            "y = E + A N'^-alpha + B D'^-beta, X' = U_X (1 + R_X (1 - exp(-(X / U_X - 1) / R_X)))",
            ("n", "d", "u"),
            (*_POWERS, _FLOOR),
            repeats=True,
        ),
    )
}


class Model:
    """A law over the runs of one data set."""

    def __init__(self, law: Law, data: Data) -> None:
        self.law = law
        self.logs = {name: np.log(np.asarray(data[name], dtype=np.float64)) for name in law.variables}
        self.means = {name: float(np.mean(values)) for name, values in self.logs.items()}
        self.runs = len(next(iter(self.logs.values())))
        self._index = {name: place for place, name in enumerate(law.params)}
        self._design = self._derivatives({name: self.logs[name] - self.means[name] for name in self.logs})

    def _derivatives(self, centred: Data) -> FloatArray:
        """dz/dtheta (n, K, P) where z is affine in theta."""
        runs = len(next(iter(centred.values())))
        design = np.zeros((runs, len(self.law.terms), len(self.law.params)))
        for k, term in enumerate(self.law.terms):
            design[:, k, self._index[term.coefficient]] = 1.0
            if term.exponent:
                design[:, k, self._index[term.exponent]] = -centred[term.variable]
        return design

    def terms(self, theta: FloatArray, data: Data | None = None) -> tuple[FloatArray, FloatArray]:
        """z (R, n, K) and dz/dtheta, (n, K, P) where it is the same for all R, else (R, n, K, P); theta (R, P).

        ``data``: at other runs than the model's own.
        """
        logs = self.logs if data is None else {name: np.log(data[name]) for name in self.law.variables}
        if not self.law.repeats:
            design = self._design if data is None else self._derivatives(self._centred(logs))
            return np.einsum("nkp,rp->rnk", design, theta, optimize=True), design
        z = self._saturated(theta, logs)
        steps = 1e-6 * np.eye(theta.shape[1])
        slopes = [(self._saturated(theta + h, logs) - self._saturated(theta - h, logs)) / 2e-6 for h in steps]
        return z, np.stack(slopes, axis=-1)

    def _centred(self, logs: Data) -> dict[str, FloatArray]:
        return {name: values - self.means[name] for name, values in logs.items()}

    def _saturated(self, theta: FloatArray, logs: Data) -> FloatArray:
        """z (R, n, K) with the N' and D' of repeated data."""
        n, d = repeated(self.natural(theta), logs)
        z = np.empty((*n.shape, 3))
        centred = {"n": n - self.means["n"], "d": d - self.means["d"]}
        for k, term in enumerate(self.law.terms):
            z[:, :, k] = theta[:, None, self._index[term.coefficient]]
            if term.exponent:
                z[:, :, k] -= theta[:, None, self._index[term.exponent]] * centred[term.variable]
        return z

    def at(self, theta: FloatArray, data: Data | None = None) -> FloatArray:
        """The law's values (R, n)."""
        return np.exp(np.logaddexp.reduce(self.terms(theta, data)[0], axis=-1))

    def natural(self, theta: FloatArray) -> dict[str, FloatArray]:
        """The parameters (R,) of the equation as written."""
        found = {name: theta[:, self._index[name]] for name in self.law.exponents}
        with np.errstate(over="ignore"):
            found |= {name: np.exp(value) for name, value in self.log_coefficients(theta).items()}
        if self.law.repeats:
            found |= {name: np.exp(theta[:, self._index[name]]) for name in ("R_N", "R_D")}
        return {name: found[name] for name in self.law.params}

    def log_coefficients(self, theta: FloatArray) -> dict[str, FloatArray]:
        """The logarithms (R,) of the coefficients of the equation as written: finite where these are too large."""
        found = {}
        for term in self.law.terms:
            shift = self.means[term.variable] * theta[:, self._index[term.exponent]] if term.exponent else 0.0
            found[term.coefficient] = theta[:, self._index[term.coefficient]] + shift
        return found

    def theta(self, natural: Mapping[str, float]) -> FloatArray:
        """(P,), of parameters as the equation has them."""
        theta = np.empty(len(self.law.params))
        for name in self.law.exponents:
            theta[self._index[name]] = natural[name]
        for term in self.law.terms:
            shift = self.means[term.variable] * natural[term.exponent] if term.exponent else 0.0
            theta[self._index[term.coefficient]] = np.log(natural[term.coefficient]) - shift
        if self.law.repeats:
            theta[[self._index["R_N"], self._index["R_D"]]] = np.log([natural["R_N"], natural["R_D"]])
        return theta


def repeated(natural: Mapping[str, FloatArray], logs: Data) -> tuple[FloatArray, FloatArray]:
    """ln N' and ln D' (R, n): what N parameters and D targets of which U differ are worth (Muennighoff et al. 2023).

    Of parameters, as many are worth their number as the law finds optimal for U targets; the others, and repeated
    targets, count for less and less, with R_N and R_D as the scales of decay.
    """
    (n, once_n), (d, once_d) = _counted(natural, logs)
    return _worth(n, once_n, natural["R_N"][:, None]), _worth(d, once_d, natural["R_D"][:, None])


def beyond(natural: Mapping[str, FloatArray], logs: Data) -> dict[str, FloatArray]:
    """What R_N and R_D are the scales of, (R, n) each: how many times more parameters there are than are worth their
    number, and more targets than differ."""
    pairs = zip(("R_N", "R_D"), _counted(natural, logs), strict=True)
    return {name: np.expm1(whole - once) for name, (whole, once) in pairs}


def _counted(natural: Mapping[str, FloatArray], logs: Data) -> list[tuple[FloatArray, FloatArray]]:
    """ln of N and of D (R, n), each with the ln of what counts in full of it."""
    n, d, u = (logs[name][None, :] for name in ("n", "d", "u"))
    alpha, beta, a, b = (natural[name][:, None] for name in ("alpha", "beta", "A", "B"))
    # Optimal is where both terms fall alike: alpha A N^-alpha = beta B D^-beta.
    optimal = (np.log(alpha * a) - np.log(beta * b) + beta * u) / alpha
    return [(n, np.minimum(optimal, n)), (d, np.minimum(u, d))]


def _worth(whole: FloatArray, once: FloatArray, scale: FloatArray) -> FloatArray:
    """ln of U (1 + R* (1 - exp(-(X / U - 1) / R*))); expm1, for R* may be large."""
    again = np.expm1(np.minimum(whole - once, 700.0))
    return once + np.log1p(-scale * np.expm1(-again / scale))
