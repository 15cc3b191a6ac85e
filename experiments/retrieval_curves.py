"""Curves of recipe runs: the watched metric by epoch, a panel per recipe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.recipe import STUDY
from experiments.recipes import in_order, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.retrieval_runs import Run

_PANEL = (3.4, 3.2)  # inches
_LOOKS = {"original": ("#D55E00", "--", "test, original"), "honest": ("#0072B2", "-", "validation, honest")}


def curve_figures(runs: Sequence["Run"], metric: str = "hr@10") -> dict[str, tuple[str, str]]:
    """(alternative text, SVG) by name: a figure per dataset and number of epochs, every seed a line.

    The published value is drawn where the data is the published one.
    """
    from scaling.style import render, styled

    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        if run.study == STUDY and run.curve:
            groups.setdefault(run.section, []).append(run)
    found = {}
    for (_, epochs), group in groups.items():
        titles = ", ".join(read(name).title for name in in_order(run.family for run in group))
        alt = f"{metric.upper()} by epoch: {titles}"
        svg = styled(lambda own=group, title=alt: render(draw(own, metric), title))()
        found[f"{group[0].digest}-{epochs:g}"] = (alt, svg)
    return found


def draw(runs: Sequence["Run"], metric: str) -> "Figure":
    """The figure of one dataset; call it inside `scaling.style.styled`."""
    from matplotlib.figure import Figure

    names = in_order(run.family for run in runs)
    figure = Figure(figsize=(max(_PANEL[0] * len(names), 6), _PANEL[1]), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _panel(axes, [run for run in runs if run.family == name], metric)
    panels[0].set_ylabel(metric.upper())
    panels[0].set_ylim(bottom=0)  # last: the panels share it, and it fixes the top
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


def _panel(axes: "Axes", runs: Sequence["Run"], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    from scaling.style import SOFT

    recipe = read(runs[0].family)
    for run in runs:
        colour, line, label = _LOOKS[run.label]
        x, y = zip(*((epoch, metrics[metric]) for epoch, metrics in run.curve), strict=True)
        first = label not in axes.get_legend_handles_labels()[1]
        axes.plot(x, y, linestyle=line, color=colour, linewidth=1.2, label=label if first else None)
        if run.tested and run.label == "honest":
            tested = "test, honest" if first else None
            axes.plot(run.tested_epoch, run.tested[metric], "o", color=colour, label=tested)
    if recipe.is_of(runs[0].data):
        axes.axhline(recipe.published[metric], color=SOFT, linewidth=0.9, linestyle=":", label="published")
    axes.set_title(recipe.title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
