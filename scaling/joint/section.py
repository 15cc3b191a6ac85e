"""The law in two variables of one family: L(N, D) over its configurations, where they tell its terms apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.nd import NDFit, bootstrap_nd, fit_nd, intervals_nd
from scaling.table import Table
from scaling.trials import configuration_rows

# L(N, D) has five parameters. Its exponents are told apart only where N and D vary, and not together.
_CONFIGS, _VALUES, _SPREAD, _CORRELATION = 8, 3, 2.0, 0.95
# Every draw solves the whole problem again, which is slow: more draws than these are not made.
_DRAWS = 200


@dataclass(frozen=True)
class Joint:
    """The law in parameters and targets of one family, with 95 % intervals of its parameters by name."""

    fit: NDFit
    intervals: dict[str, tuple[float, float]]


def joint_law(table: Table, loss: str, x: str, *, n_boot: int, seed: int) -> Joint | None:
    """L(N, D) of one family, N dense parameters and D targets; None where the trials do not vary them enough.

    `loss` and `x` are columns; trials of one configuration (see `trials.configuration_rows`) are averaged.
    """
    if not (table.has("dense_params") and table.has("targets")):
        return None
    rows = configuration_rows(table, x)
    columns = [table.numbers(name) for name in ("dense_params", "targets", loss)]
    n, d, y = (np.array([float(np.mean(column[one])) for one in rows]) for column in columns)
    known = np.isfinite(n) & np.isfinite(d) & (n > 0) & (d > 0)
    n, d, y = n[known], d[known], y[known]
    if len(y) < _CONFIGS or min(len(np.unique(n)), len(np.unique(d))) < _VALUES:
        return None
    if min(n.max() / n.min(), d.max() / d.min()) < _SPREAD:
        return None
    if abs(np.corrcoef(np.log(n), np.log(d))[0, 1]) > _CORRELATION:
        return None
    fit = fit_nd(n, d, y)
    return Joint(fit, intervals_nd(bootstrap_nd(n, d, y, fit, n_boot=min(n_boot, _DRAWS), seed=seed)))
