"""The joint law of one family of a results table, where its configurations tell the law's terms apart."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from scaling.joint.fit import JointFit, fit_joint
from scaling.joint.uncertainty import JointDraws, resample
from scaling.table import FloatArray, Table
from scaling.trials import configuration_rows

COLUMNS = {"n": "dense_params", "d": "targets", "h": "history"}
# A term's exponent is told apart only where its variable varies, and not together with another: along a ladder of eight
# sizes, whose parameters and targets grow together, coefficients came out anywhere up to 1e161.
_CONFIGS, _VALUES, _SPREAD, _CORRELATION = 9, 3, 2.0, 0.7


@dataclass(frozen=True)
class Joint:
    """The joint law of one family, and its draws."""

    fit: JointFit
    draws: JointDraws


def joint_law(table: Table, loss: str, x: str, *, n_boot: int, seed: int) -> Joint | None:
    """The law in dense parameters, targets and, where it varies, history length; None where the trials tell none apart.

    `loss` and `x` are columns; trials of one configuration (see `trials.configuration_rows`) are averaged.
    """
    if not all(table.has(COLUMNS[name]) for name in "nd"):
        return None
    rows = configuration_rows(table, x)
    here = {name: column for name, column in COLUMNS.items() if table.has(column)}
    data = {name: _means(table.numbers(column), rows) for name, column in here.items()}
    y = _means(table.numbers(loss), rows)
    known = np.all([np.isfinite(v) & (v > 0) for v in (*data.values(), y)], axis=0)
    data, y = {name: v[known] for name, v in data.items()}, y[known]
    for law in ("history", "chinchilla"):
        own = {name: data[name] for name in ("ndh" if law == "history" else "nd") if name in data}
        if (law == "chinchilla" or "h" in own) and _tells_apart(own, len(y)):
            fit = fit_joint(law, own, y)
            return Joint(fit, resample(fit, n_boot=n_boot, seed=seed))
    return None


def _means(values: FloatArray, rows: list[list[int]]) -> FloatArray:
    return np.array([float(np.mean(values[one])) for one in rows])


def _tells_apart(data: dict[str, FloatArray], runs: int) -> bool:
    if runs < _CONFIGS + 2 * (len(data) - 2):
        return False
    for values in data.values():
        if len(np.unique(values)) < _VALUES or values.max() / values.min() < _SPREAD:
            return False
    logs = [np.log(values) for values in data.values()]
    return all(abs(np.corrcoef(a, b)[0, 1]) <= _CORRELATION for a, b in combinations(logs, 2))
