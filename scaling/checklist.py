"""The twelve things a reader needs to judge a scaling law, filled in from the records themselves.

Source of the items: the (Mis)Fitting survey of published laws (2025), which found most of them
unreported. An item the table does not record says so, because a silent gap reads like a yes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from scaling.family import FamilyResult
from scaling.laws import EQUATIONS, ESTIMATORS
from scaling.panel import Panel
from scaling.records import NOT_RECORDED, evaluation_errors, range_text, sentence, split_text, values_text
from scaling.study import Analysis
from scaling.style import number
from scaling.table import Table

NO_LAW = "No law was fitted."
_MAX_WIDTHS = 8


def checklist(analysis: Analysis, table: Table) -> list[tuple[str, str]]:
    """Twelve (question, what the records say) pairs for one analysis and the table it came from."""
    named = [(_where(p, f, len(analysis.panels) > 1), f) for p in analysis.panels for f in p.families]
    families = [family for _, family in named]
    fitted = any(family.fit for family in families)
    return [
        ("Form, and the alternatives tried", _forms(named) if fitted else NO_LAW),
        ("Runs, sizes, seeds, range; what was left out", _runs(analysis, table)),
        ("Final or intermediate checkpoints", _checkpoints(table)),
        ("Parameter counts and FLOP formula", _counting(table)),
        (
            "Learning rate, batch, warm-up, decay",
            _schedule(table),
        ),
        ("Loss space, weights, optimiser", _estimation(families) if fitted else NO_LAW),
        ("Parameters with intervals; conditioning", _conditioning(families) if fitted else NO_LAW),
        ("Residuals", _residuals(named) if fitted else NO_LAW),
        ("Error at held-out scale", _held_out(named)),
        ("Data, split, metric, candidates, base rate", _data(analysis, table)),
        ("Seeds and evaluation noise", _noise(families, table)),
        ("Code, raw points, versions", _versions(table)),
    ]


def _where(panel: Panel, family: FamilyResult, several: bool) -> str:
    """A family's name, with its study, dataset and x where the page holds more than one panel."""
    words = ", ".join(word for word in (panel.study, panel.dataset, panel.axis or panel.x) if word)
    return f"{family.name} ({words})" if several else family.name


def _columns(table: Table, *names: str) -> str:
    return sentence("; ".join(f"{name.replace('_', ' ')}: {values_text(table, name)}" for name in names))


def _schedule(table: Table) -> str:
    names = ("learning_rate", "embedding_learning_rate", "batch_rows", "warmup", "decay", "precision")
    text = _columns(table, *names)
    if not table.has("learning_rate"):
        return text
    return f"{text}{_rate_by_width(table)}. How it was set: by the study's rule or flags; see the table of trials."


def _rate_by_width(table: Table) -> str:
    """The learning rates of each model width, where the table records widths and they are few."""
    pairs = list(zip(table.text("model.width"), table.text("learning_rate")))
    rates = {width: ", ".join(dict.fromkeys(r for w, r in pairs if w == width and r)) for width, _ in pairs if width}
    if not 1 < len(rates) <= _MAX_WIDTHS:
        return ""
    return "; learning rate by width: " + "; ".join(f"{width}: {rate}" for width, rate in rates.items())


def _forms(named: Sequence[tuple[str, FamilyResult]]) -> str:
    tried = ", ".join(EQUATIONS.values())
    chosen = [f"{name}: {family.chosen or 'none'}" for name, family in named]
    rule = "lowest AICc; within 2 of it the lowest held-out error on shared cuts; then fewer parameters"
    return f"Tried {tried}. Rule: {rule}. Chosen: {'; '.join(chosen)}. Errors of each are in the table of fits."


def _runs(analysis: Analysis, table: Table) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in analysis.counts.items())
    parts = [f"{len(table)} trials ({counts})", f"seeds: {values_text(table, 'seed')}"]
    parts += [
        range_text(table, name, label)
        for name, label in (("dense_params", "N (dense)"), ("targets", "D"), ("train_flops", "C"))
    ]
    rule = "left out of fits: trials that are not done or have no value, all shown in the table of trials"
    return "; ".join([*parts, rule]) + "."


def _checkpoints(table: Table) -> str:
    return f"One row is one trial's final evaluation; epochs: {values_text(table, 'epochs')}."


def _counting(table: Table) -> str:
    names = ("dense_params", "embedding_params", "active_params")
    counts = ", ".join(name.replace("_", " ") for name in names if table.has(name))
    return (
        f"Counted: {counts or NOT_RECORDED}. FLOP formula: {values_text(table, 'flops_formula')}. "
        f"Candidates per request: {values_text(table, 'candidates')}; history: {values_text(table, 'history')}."
    )


def _estimation(families: Sequence[FamilyResult]) -> str:
    used = dict.fromkeys(f.chosen for f in families if f.chosen)
    estimators = "; ".join(f"{form}: {ESTIMATORS[form]}" for form in used)
    return (
        f"{estimators}. Each configuration counts once (mean over its seeds). The exponent's "
        "grid covers its whole range, so there are no starting points to choose."
    )


def _conditioning(families: Sequence[FamilyResult]) -> str:
    worst = max((f.fit.condition for f in families if f.fit), default=None)
    how = dict.fromkeys(f.boot.description for f in families if f.boot)
    text = "; ".join(how) or "no intervals: too few configurations"
    largest = number(worst, 3) if worst else NOT_RECORDED
    return f"{sentence(text)}; 95 % percentile intervals. Largest condition number: {largest}."


def _residuals(named: Sequence[tuple[str, FamilyResult]]) -> str:
    parts = [f"{name} {f.fit.mape:.2g} %" for name, f in named if f.fit]
    return f"Plotted against x. Mean absolute relative error: {', '.join(parts) or NOT_RECORDED}."


def _held_out(named: Sequence[tuple[str, FamilyResult]]) -> str:
    parts = []
    for name, family in named:
        if family.fit and family.fit.held_out:
            cuts = family.fit.held_out
            factor = max(cut.extrapolation for cut in cuts)
            bias = float(np.mean([cut.bias for cut in cuts]))
            parts.append(
                f"{name}: {family.fit.held_out_mape:.2g} % (bias {bias:+.2g} %, worst "
                f"{max(cut.max_error for cut in cuts):.2g} %, {len(cuts)} cuts, up to {factor:.0f}x)"
            )
    return "; ".join(parts) + "." if parts else "Not available: too few distinct x to fit below a cut."


def _data(analysis: Analysis, table: Table) -> str:
    rates = [c for c in table.columns if c.startswith("base_rate/") and table.has(c)]
    base = "; ".join(f"{c}: {values_text(table, c)}" for c in rates) or f"base rate: {NOT_RECORDED}"
    # The impressions that were scored; `eval_impressions` is only the limit that was asked for.
    impressions = values_text(table, "impressions" if table.has("impressions") else "eval_impressions")
    metrics = ", ".join(dict.fromkeys(panel.metric for panel in analysis.panels))
    return (
        f"Dataset: {values_text(table, 'dataset')}; split: {split_text(table)}; evaluation set: "
        f"{values_text(table, 'eval_set')}; impressions: {impressions}; metric: {metrics}; {base}."
    )


def _noise(families: Sequence[FamilyResult], table: Table) -> str:
    spread = np.concatenate([f.points.spread for f in families])
    known = spread[np.isfinite(spread)]
    seeds = f"median seed standard deviation {np.median(known):.2g}" if len(known) else "one seed: not measured"
    return f"{sentence(seeds)} over {len(known)} configurations; evaluation noise: {_evaluation_noise(table)}."


def _evaluation_noise(table: Table) -> str:
    """The standard error of NE that a finite set of evaluation users leaves, where the table records it."""
    errors = evaluation_errors(table, "ne")
    if not len(errors):
        return NOT_RECORDED
    # All trials score the same impressions, so this part of the noise is common to them.
    return (
        f"median standard error of NE {np.median(errors):.2g} over {len(errors)} trials, users resampled as wholes "
        "(trials scored on the same impressions have a part of it in common)"
    )


def _versions(table: Table) -> str:
    columns = [c for c in table.columns if "version" in c.lower() and table.has(c)]
    trained = _columns(table, *columns) if columns else f"training versions: {NOT_RECORDED}"
    own = []
    for package in ("numpy", "scipy", "matplotlib"):
        try:
            own.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{trained}. Fitted with {', '.join(own)}. Raw points: the table of trials and each figure's CSV."
