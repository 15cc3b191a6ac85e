"""What a page says of a panel in words: how two families compare, where their curves cross, what to be wary of."""

from __future__ import annotations

import math

import numpy as np

from scaling.frontier import Comparison, Exponents, common_x, lead, ranked
from scaling.laws import FORM_NAMES
from scaling.metrics import higher_is_better, metric_name
from scaling.page import esc
from scaling.panel import Panel
from scaling.plots import x_symbol
from scaling.style import interval_text, number, tick, with_interval

# A 95 % interval of a compute ratio wider than this factor says nothing that a reader could use.
_UNDETERMINED = 1e6
RESIDUALS_NOTE = (
    "Scatter around zero without a pattern is what a right form leaves. One sign in the middle and the other at both "
    "ends means a bend that the form lacks; a trend at the largest sizes, a law that does not go on as drawn; a fan, "
    "noise that changes with size, which intervals take to be even; a point far off, a run to look at."
)
HELD_OUT_NOTE = (
    "Each form was fitted below a cut and scored on everything from the cut up: the error it would have made as a "
    "forecast. To the left less was known and more forecast; the lower line of a family is the better form."
)


def answer_html(panel: Panel) -> str:
    """Who is best at the least and at the largest x that all families were seen at, by the laws; empty without two."""
    fitted, rising = panel.fitted, higher_is_better(panel.metric)
    ends = common_x(*fitted) if len(fitted) > 1 and panel.comparable else None
    if ends is None:
        return ""
    name, x = metric_name(panel.metric), x_symbol(panel)
    said = []
    for end, which in zip(ends, ("smallest", "largest")):
        first, second = ranked(fitted, end, rising=rising)[:2]
        ahead, limits = lead(first, second, end, rising=rising)
        where = f"at {x} = {tick(float(f'{end:.3g}'))}, the {which} that all were seen at"
        value = number(float(first.fit.at([end])[0]), 4)
        said.append(f"{first.name} {where} ({value}, ahead of {second.name} by {with_interval(ahead, limits, 2)})")
    text = f"by the fitted laws, {name} is {'highest' if rising else 'lowest'} for {'; '.join(said)}"
    return f"<p><strong>In short:</strong> {esc(text)}.</p>"


def comparison_html(c: Comparison, panel: Panel) -> str:
    """One paragraph: the compute for equal quality, the slopes and the crossing of two families."""
    ratio, x = c.ratio, x_symbol(panel)
    said = [_ratio_text(c, panel) if len(ratio.quality) else ratio.reason]
    if c.slope_difference is not None:
        said.append(
            f"its change per tenfold {x} differs by {number(c.slope_difference, 3)} "
            f"{interval_text(c.slope_interval, 3)} over the range both cover"
        )
    if c.exponents is not None:
        said.append(_exponents_text(c.exponents))
    said.append(_crossing_text(c, x))
    return f"<p><strong>{esc(ratio.new)} against {esc(ratio.base)}:</strong> {esc('; '.join(said))}.</p>"


def _exponents_text(e: Exponents) -> str:
    """Whether the two laws differ in more than their offsets."""
    name = "slopes per ln x" if e.form == "loglin" else "exponents"
    both = f"{number(e.base, 3)} and {number(e.new, 3)}"
    apart = f"{number(e.difference, 2)} {interval_text(e.interval, 2)}"
    judged = "differ" if e.differ else "are not told apart"
    return f"their {name} ({FORM_NAMES[e.form]}: {both}) {judged}: difference {apart}"


def warnings_html(panel: Panel) -> str:
    """Cautions of a panel, one line per distinct sentence with the families it is about."""
    about: dict[tuple[str, str], list[str]] = {(w.code, w.text): ["all families"] for w in panel.warnings}
    for family in panel.families:
        for warn in family.warnings:
            about.setdefault((warn.code, warn.text), []).append(family.name)
    if not about:
        return ""
    items = "".join(
        f"<li><code>{esc(code)}</code> {esc(', '.join(names))}: {esc(text)}</li>"
        for (code, text), names in about.items()
    )
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>'


def _ratio_text(c: Comparison, panel: Panel) -> str:
    """The compute ratio at both ends of the quality that both families were seen at, the easier end first."""
    quality = c.ratio.quality
    ends = [0, len(quality) - 1] if higher_is_better(panel.metric) else [len(quality) - 1, 0]
    if np.all(c.ratio.high[ends] > _UNDETERMINED * c.ratio.low[ends]):
        return "the compute for equal quality is not determined by these trials: one of the curves is nearly flat"
    said = []
    for i in ends:
        words = times_less(float(c.ratio.ratio[i]), float(c.ratio.low[i]), float(c.ratio.high[i]))
        said.append(f"at {metric_name(panel.metric)} {number(quality[i], 4)} it needs {words} {x_symbol(panel)}")
    if c.ratio.mean is not None and c.ratio.mean_interval is not None:
        said.append(f"over all of that quality {times_less(c.ratio.mean, *c.ratio.mean_interval)} (geometric mean)")
    return ", ".join(said)


def times_less(ratio: float, low: float, high: float) -> str:
    """A compute ratio with its limits (NaN if unknown) in words: "2.00 [1.50, 3.00] times less", or "... more"."""
    less = ratio >= 1
    values = (ratio, low, high) if less else (_over(ratio), _over(high), _over(low))
    limits = "" if math.isnan(low) else f" {interval_text(values[1:], 3)}"
    return f"{number(values[0], 3)}{limits} times {'less' if less else 'more'}"


def _over(value: float) -> float:
    return 1 / value if value else math.inf


def _crossing_text(c: Comparison, x: str) -> str:
    if c.slope_range is None:
        return f"no {x} was observed for both, so no crossing was looked for"
    if c.crossing is None:
        return f"the curves do not cross over the {x} observed for both"
    share = f", in {c.crossing_share:.0%} of draws" if c.crossing_share is not None else ""
    where = f"at {x} = {number(c.crossing, 3)}{_crossing_limits(c.crossing_interval)}{share}"
    return f"the curves cross {where}" if c.crossings == 1 else f"the curves cross {c.crossings} times, first {where}"


def _crossing_limits(pair: tuple[float, float] | None) -> str:
    """The crossing's interval in words: a limit outside the range both families cover is not known."""
    if pair is None:
        return ""
    low, high = pair
    if low > 0 and math.isfinite(high):
        return f" {interval_text(pair, 3)}"
    ends = [f"from {number(low, 3)}"] if low > 0 else []
    ends += [f"up to {number(high, 3)}"] if math.isfinite(high) else []
    unknown = "lower" if ends and low == 0 else "upper"
    if not ends:
        return " (95 %: no limit inside the range both cover)"
    return f" (95 %: {ends[0]}, no {unknown} limit inside the range both cover)"
