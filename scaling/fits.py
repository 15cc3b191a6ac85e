"""`genrec fit --law`: one law fitted to anybody's table, its columns named by the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling.bootstrap import bootstrap
from scaling.family import mixed
from scaling.fit import CurveFit, Warn, choose, fit_forms, fit_warnings, rivals
from scaling.joint.envelope import envelope
from scaling.joint.fit import JointFit, fit_joint
from scaling.joint.isoflop import IsoFlop, Power, isoflop
from scaling.joint.laws import LAWS
from scaling.joint.uncertainty import JointDraws, Method, resample
from scaling.laws import EQUATIONS
from scaling.metrics import higher_is_better
from scaling.serialise import curve_to_json, joint_to_json, numbers, pair_of, warnings_of
from scaling.table import BoolArray, Table, TableError
from scaling.trials import configurations, done

ESTIMATED = ("curve", *LAWS, "isoflop", "envelope")
_ONE_PASS = frozenset({"chinchilla", "gadre", "history"})


@dataclass(frozen=True)
class Columns:
    """The table's columns: y the loss or metric, x what a curve is against, n parameters, d targets trained on, h
    history length, u the targets that differ, compute FLOPs, run what a checkpoint is of; and, "" for none, budget of
    IsoFLOP, cluster the unit of resampling, group what tells curves apart."""

    y: str
    x: str = "train_flops"
    n: str = "dense_params"
    d: str = "targets"
    h: str = "history"
    u: str = "unique_targets"
    compute: str = "train_flops"
    run: str = "trial"
    budget: str = ""
    cluster: str = ""
    group: str = ""

    @property
    def named(self) -> dict[str, str]:
        """The variables of joint laws."""
        return {"n": self.n, "d": self.d, "h": self.h, "u": self.u}


@dataclass(frozen=True)
class Resampling:
    """method: None for the law's own choice."""

    method: Method | None = None
    n_boot: int = 1000
    seed: int = 0


def fit_law(table: Table, law: str, columns: Columns, *, estimator: str, resampling: Resampling) -> dict[str, object]:
    """The law as plain data: of the whole table, or under "groups" by the values of the group column.

    Raises:
        TableError: an unknown law, a missing column or a word where a number should be, or runs that carry no law.
    """
    if law not in ESTIMATED:
        raise TableError(f"unknown law {law!r}: use one of {', '.join(ESTIMATED)}")
    needed = _needed(law, columns)
    table.require(*needed, *(name for name in (columns.group, columns.cluster, columns.budget) if name))
    table = table.where(done(table))
    fitted = _FITS.get(law, _joint)

    def one(part: Table, name: str) -> dict[str, object]:
        known = _known(part, [c for c in needed if c != columns.run])
        lost = int(np.count_nonzero(~known))
        more = [Warn("excluded_rows", f"{lost} rows without a positive value are left out")] if lost else []
        more += mixed(part)
        try:
            return fitted(part.where(known), law, columns, estimator, resampling, more)
        except (TableError, ValueError) as error:
            raise TableError(f"{name}{error}") from None

    head: dict[str, object] = {"law": law, "y": columns.y}
    if not columns.group:
        return head | one(table, "")
    groups = {name: one(_of(table, columns.group, name), f"{name}: ") for name in table.distinct(columns.group)}
    return head | {"group": columns.group, "groups": groups}


def _needed(law: str, columns: Columns) -> list[str]:
    if law == "curve":
        return [columns.y, columns.x]
    if law == "isoflop":
        return [columns.y, columns.n, columns.compute]
    if law == "envelope":
        return [columns.y, columns.n, columns.compute, columns.run]
    return [columns.y, *(columns.named[name] for name in LAWS[law].variables)]


def _of(table: Table, column: str, value: str) -> Table:
    return table.where(np.array([cell == value for cell in table.text(column)]))


def _known(table: Table, names: list[str]) -> BoolArray:
    """Rows that have a value everywhere, positive but for a metric, which may be what it is."""
    y, *sizes = (table.numbers(name) for name in names)
    return np.all([np.isfinite(y), *(np.isfinite(v) & (v > 0) for v in sizes)], axis=0)


def _joint(
    table: Table, law: str, columns: Columns, estimator: str, resampling: Resampling, more: list[Warn]
) -> dict[str, object]:
    data = {name: table.numbers(columns.named[name]) for name in LAWS[law].variables}
    fit = fit_joint(law, data, table.numbers(columns.y), estimator)
    draws = resample(
        fit,
        method=resampling.method,
        clusters=table.text(columns.cluster) if columns.cluster else None,
        n_boot=resampling.n_boot,
        seed=resampling.seed,
    )
    if law in _ONE_PASS and "epochs" in table.columns and np.nanmax(table.numbers("epochs"), initial=0) > 1:
        more = [*more, Warn("repeated_data", "some runs repeat their data (epochs > 1): the law assumes one pass")]
    found = joint_to_json(fit, draws, [*more, *_unidentified(fit, draws)])
    return {**found, "columns": {name: columns.named[name] for name in LAWS[law].variables}}


def _unidentified(fit: JointFit, draws: JointDraws) -> list[Warn]:
    """The asymptote, where its interval says little or goes down to nothing."""
    low, high = draws.intervals()["E"]
    least = float(fit.y.min())
    if low > 0.01 * least and high - low < 0.5 * least:
        return []
    return [Warn("E_unidentified", f"E lies between {low:.4g} and {high:.4g}, the least loss is {least:.4g}")]


def _curve(
    table: Table, law: str, columns: Columns, estimator: str, resampling: Resampling, more: list[Warn]
) -> dict[str, object]:
    points = configurations(table, columns.y, columns.x)
    loss = not higher_is_better(columns.y) and bool(np.all(points.mean > 0))
    fits = fit_forms(points, loss=loss)
    if not fits:
        raise TableError(f"{len(np.unique(points.x))} distinct values of {columns.x!r} are too few for any law")
    form = choose(fits)
    boots = {
        name: bootstrap(points, fit, loss=loss, n_boot=resampling.n_boot, seed=resampling.seed)
        for name, fit in fits.items()
    }
    best, boot = fits[form], boots[form]
    return {
        "x": columns.x,
        "form": form,
        "equation": EQUATIONS[form],
        "params": numbers(best.params),
        "intervals": {name: pair_of(pair) for name, pair in boot.params().items()} if boot else None,
        "objective": best.rss,
        "n": len(points),
        "runs": points.n_runs,
        "decades": points.decades,
        "bootstrap": boot.description if boot else None,
        "warnings": warnings_of((*more, *fit_warnings(points, best), *_rejected(fits, form))),
        "forms": {name: curve_to_json(fit, boots[name]) for name, fit in fits.items()},
    }


def _rejected(fits: dict[str, CurveFit], form: str) -> list[Warn]:
    """The forms that the chosen one beats where both were held out, by a factor that no scatter explains."""
    found = []
    for rival in rivals(fits, form):
        if rival.rejected:
            errors = f"held-out error {rival.held_out:.3g} % against {rival.chosen_held_out:.3g} %"
            text = f"{rival.form} is rejected: {errors}, AICc {rival.aicc_gap:.0f} higher"
            found.append(Warn("form_rejected", text))
    return found


def _isoflop(
    table: Table, law: str, columns: Columns, estimator: str, resampling: Resampling, more: list[Warn]
) -> dict[str, object]:
    n, compute, y = (table.numbers(name) for name in (columns.n, columns.compute, columns.y))
    budget = table.numbers(columns.budget) if columns.budget else None
    found = isoflop(n, compute, y, budget=budget, n_boot=resampling.n_boot, seed=resampling.seed)
    return {
        "equation": "N* = k C^a at the vertices of parabolas of y in ln N; D* = C / (6 N*)",
        **_power(found.n),
        "budgets": _budgets(found),
        "bootstrap": f"wild bootstrap of each budget's residuals, {resampling.n_boot} draws",
        "warnings": warnings_of((*more, *found.warnings)),
    }


def _budgets(found: IsoFlop) -> list[dict[str, object]]:
    return [
        {
            "compute": valley.compute,
            "runs": len(valley.n),
            "n": None if valley.problem else valley.best,
            "loss": None if valley.problem else valley.loss,
            "n_within_0.1_percent": None if valley.problem else pair_of(valley.flat),
            "refused": valley.problem or None,
        }
        for valley in found.valleys
    ]


def _envelope(
    table: Table, law: str, columns: Columns, estimator: str, resampling: Resampling, more: list[Warn]
) -> dict[str, object]:
    n, compute, y = (table.numbers(name) for name in (columns.n, columns.compute, columns.y))
    found = envelope(table.text(columns.run), n, compute, y, n_boot=resampling.n_boot, seed=resampling.seed)
    return {
        "equation": "N* = k C^a along the least loss over all training curves; D* = C / (6 N*)",
        **_power(found.power),
        "compute": pair_of((float(found.compute[0]), float(found.compute[-1]))),
        "sizes": sorted({float(size) for size in found.n}),
        "bootstrap": f"pairs bootstrap over runs, {resampling.n_boot} draws",
        "warnings": warnings_of((*more, *found.warnings)),
    }


def _power(power: Power) -> dict[str, object]:
    return {
        "params": {"k": power.k, "a": power.a, "b": 1 - power.a},
        "intervals": {name: pair_of(pair) for name, pair in power.intervals().items()}
        | {"b": pair_of((1 - power.intervals()["a"][1], 1 - power.intervals()["a"][0]))},
    }


_Fit = Callable[[Table, str, Columns, str, Resampling, list[Warn]], dict[str, object]]
_FITS: dict[str, _Fit] = {"curve": _curve, "isoflop": _isoflop, "envelope": _envelope}
