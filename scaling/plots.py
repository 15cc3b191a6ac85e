"""The figures of a report, each drawn from one panel of an analysis; see `scaling.style` for how they look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from scaling.family import FamilyResult
from scaling.fit import MAX_EXTRAPOLATION
from scaling.metrics import metric_name
from scaling.panel import Panel
from scaling.style import (
    GRID,
    INK,
    PAPER,
    SOFT,
    FamilyStyle,
    Plot,
    equation,
    family_styles,
    linear_y,
    log_x,
    log_y,
    new_axes,
    number,
    render,
    styled,
    tick,
    value_ticks,
)
from scaling.table import FloatArray

X_NAMES = {
    "train_flops": "training compute C (FLOPs)",
    "flops_per_target": "training FLOPs per target",
    "targets": "supervised targets D",
    "dense_params": "dense parameters N",
    "active_params": "active parameters",
    "train_seconds": "training time (s)",
    "wall_seconds": "wall-clock time (s)",
}
_SYMBOLS = {"train_flops": "C", "targets": "D", "dense_params": "N"}


@dataclass(frozen=True)
class Reference:
    """A value known apart from the fits, such as the Bayes NE of synthetic data, for one metric and dataset.

    `low` and `high` bound it (equal to `value` where it is exact); `dataset` empty means every dataset; `history` is
    the number of past events it assumes known, None for all of them or where there is no such number.
    """

    name: str
    value: float
    low: float
    high: float
    metric: str = "ne"
    dataset: str = ""
    history: int | None = None

    def applies(self, panel: Panel) -> bool:
        """True where the panel shows this reference's metric and dataset, and its history length.

        Where trials of several lengths share one x, the value for one length would be read as the floor of all: only
        a panel along history shows it then.
        """
        lengths = {int(float(length)) for length in panel.histories}
        mixed = len(lengths) > 1 and panel.axis != "history"
        seen = self.history is None or not lengths or (self.history in lengths and not mixed)
        return seen and self.matches(panel.metric, panel.dataset)

    def matches(self, metric: str, dataset: str) -> bool:
        """True for this metric and dataset; an unnamed dataset, on either side, is taken to match."""
        return self.metric == metric and (not self.dataset or not dataset or self.dataset == dataset)


def x_name(panel: Panel) -> str:
    """The x axis' label."""
    return (panel.axis or "").replace("_", " ") or X_NAMES.get(panel.x, panel.x)


def x_symbol(panel: Panel) -> str:
    """The letter (or word) that stands for x in an equation."""
    return (panel.axis or "").replace("_", " ") or _SYMBOLS.get(panel.x, "x")


def base_name(panel: Panel) -> str | None:
    """The family the panel compares the others with."""
    return panel.comparisons[0].ratio.base if panel.comparisons else None


def panel_styles(panel: Panel) -> dict[str, FamilyStyle]:
    """A style per family of the panel."""
    return family_styles([f.name for f in panel.families])


@styled
def law_figure(
    panel: Panel,
    *,
    references: Sequence[Reference] = (),
    styles: dict[str, FamilyStyle] | None = None,
    compact: bool = False,
) -> Plot:
    """Metric against x for every family: runs, means with seed error bars, law, 95 % band, extrapolation dashed.

    Args:
        panel: what to draw.
        references: known values, drawn as horizontal rules where they apply.
        styles: family styles, so that one family looks the same in every figure of a page.
        compact: a small multiple: no equations in the legend, no single runs.
    """
    styles = styles or panel_styles(panel)
    names = metric_name(panel.metric), x_symbol(panel)
    height = 3.1 if compact else 3.7 + 0.36 * len(panel.families)
    figure, axes = new_axes(4.4 if compact else 5.2, height)
    rows: list[dict[str, object]] = []
    every = np.concatenate([f.points.x for f in panel.families])
    low, high = float(every.min()), float(every.max())
    for family in panel.families:
        _draw_family(axes, panel, family, styles[family.name], high, rows, compact)
    shown = [reference for reference in references if reference.applies(panel)]
    along = [reference for reference in shown if panel.axis == "history" and reference.history is not None]
    across = [reference for reference in shown if reference not in along]
    values = [*np.concatenate([f.points.mean for f in panel.families]), *(r.value for r in across)]
    for reference in across:
        above = [other.value - reference.value for other in across if other.value > reference.value]
        _draw_reference(axes, reference, rows, below=min(above, default=np.inf) < 0.06 * np.ptp(values))
    _draw_along_history(axes, along, rows)
    log_x(axes, low / 1.35, high * 1.35)
    if panel.axis:
        value_ticks(axes, every)
    linear_y(axes)
    axes.set_xlabel(x_name(panel))
    axes.set_ylabel(names[0])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=min(len(labels), 3) if compact else 1,
        frameon=False,
        handlelength=3.2,
    )
    title = f"{names[0]} against {x_name(panel)}"
    return Plot(_key(panel, "law"), title, render(figure, title), rows, _law_alt(panel, title), figure)


@styled
def ratio_figure(panel: Panel, styles: dict[str, FamilyStyle] | None = None) -> Plot | None:
    """R(q), the base family's compute over each other family's at equal quality; None where no ranges overlap."""
    shown = [c for c in panel.comparisons if len(c.ratio.quality)]
    if not shown:
        return None
    styles = styles or panel_styles(panel)
    figure, axes = new_axes(5.2, 3.4)
    rows: list[dict[str, object]] = []
    said = []
    for comparison in shown:
        ratio, style = comparison.ratio, styles[comparison.ratio.new]
        axes.plot(ratio.quality, ratio.ratio, color=style.colour, linestyle=style.line, lw=2, label=ratio.new)
        if np.isfinite(ratio.low).any():
            # Off the axis, but not so far that its margins overflow.
            low, high = np.clip((ratio.low, np.where(np.isnan(ratio.high), np.inf, ratio.high)), 1e-99, 1e99)
            axes.fill_between(ratio.quality, low, high, color=style.colour, alpha=0.16, lw=0)
        for q, r, lo, hi in zip(ratio.quality, ratio.ratio, ratio.low, ratio.high):
            rows.append(_row(ratio.new, "ratio", q, r, lo, hi))
        said.append(f"{ratio.new}: {number(ratio.ratio.min(), 3)} to {number(ratio.ratio.max(), 3)} times")
    axes.axhline(1.0, color=SOFT, lw=1, linestyle=(0, (2, 2)))
    values = np.concatenate([c.ratio.ratio for c in shown])
    limits = np.concatenate([np.concatenate([c.ratio.low, c.ratio.high]) for c in shown])
    # A limit where the base never gets there is infinite: the axis shows at most 30 times past the curves.
    limits = limits[np.isfinite(limits) & (limits > values.min() / 30) & (limits < values.max() * 30)]
    span = np.concatenate([values, limits, [1.0]])
    log_y(axes, span.min() / 1.3, span.max() * 1.3)
    name = metric_name(panel.metric)
    axes.set_xlabel(name)
    axes.set_ylabel(f"C({base_name(panel)}) / C(family)")
    figure.legend(loc="outside lower left", ncols=min(len(shown), 3), frameon=False, handlelength=3.2)
    title = f"Compute that {base_name(panel)} needs for equal {name}, relative to each family"
    alt = f"{title}, inside both observed ranges. {'; '.join(said)}."
    return Plot(_key(panel, "equal-quality"), title, render(figure, title), rows, alt, figure)


@styled
def residual_figure(panel: Panel, styles: dict[str, FamilyStyle] | None = None) -> Plot | None:
    """Log residual of every run against x; points beyond three median absolute deviations are labelled."""
    fitted = [f for f in panel.families if f.fit is not None and np.all(f.points.mean > 0)]
    if not fitted:
        return None
    styles = styles or panel_styles(panel)
    figure, axes = new_axes(5.2, 3.3)
    rows: list[dict[str, object]] = []
    for family in fitted:
        _draw_residuals(axes, family, styles[family.name], rows)
    axes.axhline(0.0, color=SOFT, lw=1)
    every = np.concatenate([f.points.x for f in fitted])
    log_x(axes, float(every.min()) / 1.35, float(every.max()) * 1.35)
    if panel.axis:
        value_ticks(axes, every)
    linear_y(axes)
    axes.set_xlabel(x_name(panel))
    axes.set_ylabel(f"ln({metric_name(panel.metric)} / fitted) × 100")
    figure.legend(loc="outside lower left", ncols=min(len(fitted), 4), frameon=False)
    worst = max(abs(float(str(row["y"]))) for row in rows)
    title = f"Residuals of {metric_name(panel.metric)}"
    alt = f"{title}: log residual of each run in per cent against {x_name(panel)}; the largest is {worst:.3g}."
    return Plot(_key(panel, "residuals"), title, render(figure, title), rows, alt, figure)


@styled
def held_out_figure(panel: Panel, styles: dict[str, FamilyStyle] | None = None) -> Plot | None:
    """Held-out error of each form against the cut, one small axes' worth of lines per form; None without cuts."""
    cuts = [(f, form, fit) for f in panel.families for form, fit in f.fits.items() if fit.held_out]
    if not cuts:
        return None
    styles = styles or panel_styles(panel)
    figure, axes = new_axes(5.2, 3.4 + 0.2 * len(panel.families))
    rows: list[dict[str, object]] = []
    dashes = {"loglin": (0, (5, 2)), "power": (0, (1, 1.5)), "power_const": "-", "broken": (0, (6, 1.5, 1, 1.5))}
    for family, form, fit in cuts:
        x, y = [c.cut for c in fit.held_out], [c.mape for c in fit.held_out]
        style = styles[family.name]
        label = f"{family.name}, {form.replace('_', ' + ')}"
        axes.plot(x, y, color=style.colour, marker=style.marker, ms=5, linestyle=dashes[form], label=label)
        rows += [{**_row(family.name, form, a, b), "n_train": c.n_train} for a, b, c in zip(x, y, fit.held_out)]
    every = [c.cut for _, _, fit in cuts for c in fit.held_out]
    log_x(axes, min(every) / 1.35, max(every) * 1.35)
    axes.set_ylim(bottom=0)
    linear_y(axes)
    axes.set_xlabel(f"cut: fitted below, scored from here up ({x_symbol(panel)})")
    axes.set_ylabel("held-out error (MAPE, %)")
    figure.legend(loc="outside lower left", ncols=2, frameon=False, handlelength=3.2)
    means = "; ".join(f"{f.name} {form} {fit.held_out_mape:.3g} %" for f, form, fit in cuts)
    title = f"Held-out error of each form, {metric_name(panel.metric)}"
    alt = f"{title}, mean over cuts: {means}."
    return Plot(_key(panel, "held-out"), title, render(figure, title), rows, alt, figure)


def _draw_family(
    axes: Axes,
    panel: Panel,
    family: FamilyResult,
    style: FamilyStyle,
    high: float,
    rows: list[dict[str, object]],
    compact: bool,
) -> None:
    points, fit = family.points, family.fit
    label = family.name
    if fit is not None:
        if not compact:
            law = equation(fit.form, fit.params, metric_name(panel.metric), x_symbol(panel))
            label += f" (error {fit.mape:.2g} %)\n{law}"
        _draw_curve(axes, family, style, high, rows)
    for line in map(list, family.lines):
        axes.plot(points.x[line], points.mean[line], color=style.colour, lw=1.6, linestyle=style.line, zorder=3)
    axes.plot([], [], color=style.colour, marker=style.marker, ms=6, lw=2, linestyle=style.line, label=label)
    if not compact:
        for x, run in zip(points.x, points.runs):
            if len(run) > 1:
                axes.plot(
                    np.full(len(run), x), run, style.marker, ms=3, mfc=PAPER, mec=style.colour, mew=0.7, alpha=0.8
                )
    for i in range(len(points)):
        rows += [_row(family.name, "run", points.x[i], value) for value in points.runs[i]]
        mean = _row(family.name, "mean", points.x[i], points.mean[i])
        rows.append({**mean, "seed_sd": _known(points.spread[i]), "label": points.labels[i] if points.labels else ""})
    spread = np.nan_to_num(points.spread)
    axes.errorbar(
        points.x,
        points.mean,
        yerr=spread,
        fmt=style.marker,
        ms=5 if compact else 6.5,
        color=style.colour,
        mec=PAPER,
        mew=0.6,
        elinewidth=1.3,
        capsize=2.5,
        zorder=4,
    )


def _draw_curve(
    axes: Axes, family: FamilyResult, style: FamilyStyle, high: float, rows: list[dict[str, object]]
) -> None:
    """The law with its band inside the data, dashed and paler beyond.

    Never further beyond than the warning's limit, nor than the family's own range is wide: a law seen over a tenth of
    a decade says nothing of the next one.
    """
    assert family.fit is not None
    own = float(family.points.x.min()), float(family.points.x.max())
    spans = [("curve", np.geomspace(*own, 80))]
    if high > own[1] * 1.01:
        beyond = np.geomspace(own[1], min(high, own[1] * min(MAX_EXTRAPOLATION, own[1] / own[0])), 30)
        spans.append(("extrapolation", beyond))
    for kind, x in spans:
        y = family.fit.at(x)
        inside = kind == "curve"
        line = style.line if inside else (0, (2, 2.5))
        axes.plot(x, y, color=style.colour, lw=2.0 if inside else 1.4, linestyle=line, zorder=3)
        low = top = np.full(len(x), np.nan)
        if family.boot is not None:
            low, top = family.boot.curve(x)
            axes.fill_between(x, low, top, color=style.colour, alpha=0.18 if inside else 0.08, lw=0)
        rows += [_row(family.name, kind, *values) for values in zip(x, y, low, top)]


def _draw_reference(axes: Axes, reference: Reference, rows: list[dict[str, object]], *, below: bool) -> None:
    """``below``: the label stands under the line, for another line is close above."""
    if reference.high > reference.low:
        axes.axhspan(reference.low, reference.high, color=GRID, alpha=0.8, lw=0, zorder=0.5)
    axes.axhline(reference.value, color=INK, lw=1.2, linestyle=(0, (1, 1.2)), zorder=1)
    axes.annotate(
        f"{reference.name} {number(reference.value, 4)}",
        (0.01, reference.value),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4 if below else 3),
        textcoords="offset points",
        va="top" if below else "baseline",
        fontsize=9,
    )
    rows.append(_row(reference.name, "reference", None, reference.value, reference.low, reference.high))


def _draw_along_history(axes: Axes, references: Sequence[Reference], rows: list[dict[str, object]]) -> None:
    """Values known for each history length, as marks at their lengths."""
    known = sorted(((r.history, r) for r in references if r.history is not None), key=lambda pair: pair[0])
    if not known:
        return
    label = f"{known[0][1].name.partition(',')[0]} at each history"
    x, y = [length for length, _ in known], [r.value for _, r in known]
    axes.plot(x, y, color=INK, marker="x", ms=6, lw=1.2, linestyle=(0, (1, 1.2)), label=label)
    rows += [_row(r.name, "reference", length, r.value, r.low, r.high) for length, r in known]


def _draw_residuals(axes: Axes, family: FamilyResult, style: FamilyStyle, rows: list[dict[str, object]]) -> None:
    assert family.fit is not None
    points = family.points
    fitted = family.fit.at(points.x)
    x = np.concatenate([np.full(len(run), at) for at, run in zip(points.x, points.runs)])
    residual = np.concatenate([np.log(run / f) * 100 for run, f in zip(points.runs, fitted)])
    labels = [label for label, run in zip(points.labels, points.runs) for _ in run]
    axes.plot(x, residual, style.marker, ms=5, color=style.colour, mec=PAPER, mew=0.5, label=family.name)
    centre = float(np.median(residual))
    width = 1.4826 * float(np.median(np.abs(residual - centre)))
    for at, value, label in zip(x, residual, labels):
        rows.append({**_row(family.name, "residual", at, value), "label": label})
        if width > 0 and abs(value - centre) > 3 * width:
            axes.annotate(label, (at, value), xytext=(4, 4), textcoords="offset points", fontsize=8.5)


def _row(
    series: str,
    kind: str,
    x: float | None,
    y: float,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, object]:
    return {"series": series, "kind": kind, "x": _known(x), "y": _known(y), "low": _known(low), "high": _known(high)}


def _known(value: float | FloatArray | None) -> float | None:
    """A float for the downloaded table, or None where there is nothing to write."""
    return None if value is None or np.isnan(value) else float(value)


def _law_alt(panel: Panel, title: str) -> str:
    parts = [f"{title}."]
    for f in panel.families:
        best = f"best {number(float(f.points.mean[f.best]))} at {tick(float(f'{f.points.x[f.best]:.3g}'))}"
        law = ""
        if f.fit is not None:
            law = equation(f.fit.form, f.fit.params, metric_name(panel.metric), x_symbol(panel)) + ", "
        parts.append(f"{f.name}: {law}{best}.")
    return " ".join(parts)


def _key(panel: Panel, kind: str) -> str:
    words = [panel.study, panel.dataset, panel.metric, panel.axis or panel.x, kind]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(w for w in words if w).lower()).strip("-")
