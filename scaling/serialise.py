"""An `Analysis` as plain JSON data: full precision, None for what does not exist."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from scaling.bootstrap import LEVEL, Bootstrap
from scaling.family import FamilyResult
from scaling.fit import CurveFit, Warn
from scaling.frontier import Comparison, Exponents
from scaling.joint.fit import JointFit
from scaling.joint.section import COLUMNS, Joint
from scaling.joint.uncertainty import JointDraws
from scaling.laws import EQUATIONS, ESTIMATORS
from scaling.metrics import higher_is_better
from scaling.panel import Panel
from scaling.study import Analysis


def analysis_to_json(analysis: Analysis) -> dict[str, object]:
    """See `Analysis.to_json`."""
    return {
        "metric": analysis.metric,
        "x": analysis.x,
        "group": analysis.group,
        "higher_is_better": analysis.rising,
        "interval_level": 0.95,
        "bootstrap_draws": analysis.n_boot,
        "bootstrap_seed": analysis.seed,
        "trials": dict(analysis.counts),
        "equations": dict(EQUATIONS),
        "estimators": dict(ESTIMATORS),
        "panels": [_panel(panel) for panel in analysis.panels],
    }


def _panel(panel: Panel) -> dict[str, object]:
    return {
        "study": panel.study,
        "dataset": panel.dataset,
        "metric": panel.metric,
        "higher_is_better": higher_is_better(panel.metric),
        "x": panel.x,
        "axis": panel.axis,
        "axes": list(panel.axes),
        "histories": list(panel.histories),
        "plain": panel.plain or None,
        "families": [_family(family) for family in panel.families],
        "comparisons": [_comparison(comparison) for comparison in panel.comparisons],
        "warnings": warnings_of(panel.warnings),
    }


def _family(family: FamilyResult) -> dict[str, object]:
    points = family.points
    return {
        "name": family.name,
        "configurations": len(points),
        "runs": points.n_runs,
        "decades": _finite(points.decades),
        "best": {
            "label": points.labels[family.best] if points.labels else "",
            "x": float(points.x[family.best]),
            "value": float(points.mean[family.best]),
            "seeds": len(points.runs[family.best]),
        },
        "points": [
            {"label": label, "x": float(x), "mean": float(mean), "seeds": [float(v) for v in run]}
            for label, x, mean, run in zip(points.labels, points.x, points.mean, points.runs)
        ],
        "form": family.chosen,
        "bootstrap": family.boot.description if family.boot else None,
        "change_per_decade": (
            {"value": family.slope[0], "interval": pair_of(family.slope[1])} if family.slope else None
        ),
        "fits": {form: curve_to_json(fit, family.boots[form]) for form, fit in family.fits.items()},
        "predictions": [
            {
                "x": p.x,
                "value": _finite(p.value),
                "curve_interval": pair_of(p.curve),
                "one_run_interval": pair_of(p.one_run),
                "extrapolation_factor": p.extrapolation,
            }
            for p in family.predictions
        ],
        "joint": _joint(family.joint) if family.joint else None,
        "warnings": warnings_of(family.warnings),
    }


def _joint(joint: Joint) -> dict[str, object]:
    return {**joint_to_json(joint.fit, joint.draws), "columns": {n: COLUMNS[n] for n in joint.fit.law.variables}}


def joint_to_json(fit: JointFit, draws: JointDraws, more: Iterable[Warn] = ()) -> dict[str, object]:
    """A joint law with its intervals; ``more``: cautions beside the fit's own."""
    return {
        "law": fit.law.name,
        "equation": fit.law.equation,
        "estimator": fit.estimator.name,
        "params": numbers(fit.params),
        "intervals": {name: pair_of(pair) for name, pair in draws.intervals().items()},
        "standard_errors": numbers(draws.errors()),
        "objective": fit.objective,
        "n": len(fit),
        "rmse": fit.rmse,
        "share_of_starts": fit.share,
        "gradient": _finite(fit.gradient),
        "condition": _finite(fit.condition),
        "bootstrap": draws.description,
        "interval_level": LEVEL,
        "warnings": warnings_of((*fit.warnings, *more)),
    }


def curve_to_json(fit: CurveFit, boot: Bootstrap | None) -> dict[str, object]:
    """One form fitted to one family's points."""
    return {
        "params": numbers(fit.params),
        "intervals": {name: pair_of(pair) for name, pair in boot.params().items()} if boot else None,
        "bootstrap": boot.method if boot else None,
        "n": fit.n,
        "rss": fit.rss,
        "r2": _finite(fit.r2),
        "mape_percent": _finite(fit.mape),
        "aicc": _finite(fit.aicc),
        "held_out_mape_percent": _finite(fit.held_out_mape),
        "held_out": [
            {
                "cut": cut.cut,
                "n_train": cut.n_train,
                "n_test": cut.n_test,
                "mape_percent": cut.mape,
                "bias_percent": cut.bias,
                "max_percent": cut.max_error,
                "extrapolation_factor": cut.extrapolation,
            }
            for cut in fit.held_out
        ],
        "condition": _finite(fit.condition),
        "at_bound": list(fit.at_bound),
    }


def _comparison(comparison: Comparison) -> dict[str, object]:
    ratio = comparison.ratio
    return {
        "base": ratio.base,
        "new": ratio.new,
        "compute_ratio": [
            {"quality": float(q), "ratio": float(r), "interval": pair_of((float(low), float(high)))}
            for q, r, low, high in zip(ratio.quality, ratio.ratio, ratio.low, ratio.high)
        ],
        "compute_ratio_missing": ratio.reason or None,
        "compute_ratio_mean": _finite(ratio.mean),
        "compute_ratio_mean_interval": pair_of(ratio.mean_interval),
        "exponents": _exponents(comparison.exponents) if comparison.exponents else None,
        "common_x": pair_of(comparison.slope_range),
        "change_per_decade": pair_of(comparison.slopes),
        "change_per_decade_difference": comparison.slope_difference,
        "change_per_decade_interval": pair_of(comparison.slope_interval),
        "crossings": comparison.crossings,
        "crossing": comparison.crossing,
        "crossing_interval": pair_of(comparison.crossing_interval),
        "crossing_share": comparison.crossing_share,
    }


def _exponents(exponents: Exponents) -> dict[str, object]:
    return {
        "form": exponents.form,
        "base": exponents.base,
        "new": exponents.new,
        "difference": exponents.difference,
        "interval": pair_of(exponents.interval),
        "differ": exponents.differ,
    }


def warnings_of(warnings: Iterable[Warn]) -> list[dict[str, str]]:
    """Codes and texts."""
    return [{"code": w.code, "text": w.text} for w in warnings]


def pair_of(pair: Iterable[float] | None) -> list[float | None] | None:
    """An interval; a limit that is not finite is None."""
    return [_finite(float(value)) for value in pair] if pair is not None else None


def numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    """Parameters by name."""
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: float | None) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
