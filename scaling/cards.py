"""The card of one family on the page: its best value, its law with intervals, its slope, its joint law."""

from __future__ import annotations

from scaling.family import FamilyResult
from scaling.joint.section import Joint
from scaling.metrics import metric_name
from scaling.page import esc, theme_colour
from scaling.panel import Panel
from scaling.plots import x_symbol
from scaling.style import equation, interval_text, number, tick


def card_html(family: FamilyResult, panel: Panel, colour: str) -> str:
    """The card, edged in the colour of the family's curve (a hexadecimal one)."""
    points, best = family.points, family.best
    seeds = len(points.runs[best])
    spread = f" ± {number(points.spread[best], 2)}" if seeds > 1 else ""
    label = points.labels[best] if points.labels else ""
    lines = [
        f'<p class="big">{esc(number(points.mean[best]))}</p>',
        f"<p>best {esc(metric_name(panel.metric))}{esc(spread)} ({seeds} seed{'s' * (seeds > 1)}), "
        f"{esc(label)} at {esc(x_symbol(panel))} = {esc(tick(float(f'{points.x[best]:.3g}')))}</p>",
    ]
    if family.fit is not None:
        law = equation(family.fit.form, family.fit.params, metric_name(panel.metric), x_symbol(panel))
        lines.append(f"<p><code>{esc(law)}</code></p>")
    if family.boot is not None:
        pairs = "; ".join(f"{k} {interval_text(v)}" for k, v in family.boot.params().items())
        lines.append(f"<p>95 %: {esc(pairs)}</p>")
    if family.slope is not None:
        value, limits = family.slope
        lines.append(
            f"<p>{esc(number(value, 3))} {esc(interval_text(limits, 3))} for each tenfold "
            f"{esc(x_symbol(panel))} over the observed range</p>"
        )
    if family.joint is not None:
        lines.append(_joint_html(family.joint, metric_name(panel.metric)))
    lines.append(f"<p>{len(points)} configurations, {points.n_runs} runs</p>")
    return f'<div class="card" style="--c:{theme_colour(colour)}"><h3>{esc(family.name)}</h3>{"".join(lines)}</div>'


def _joint_html(joint: Joint, metric: str) -> str:
    """The law in several variables in one line, with what is wrong with it."""
    fit, intervals = joint.fit, joint.draws.intervals()
    values = "; ".join(f"{name} = {number(v, 3)} {interval_text(intervals[name], 3)}" for name, v in fit.params.items())
    cautions = "".join(f" ({warn.text})" for warn in fit.warnings)
    law = f"{metric} = E + " + " + ".join(
        f"{t.coefficient}·{t.variable.upper()}^−{t.exponent}" for t in fit.law.terms[:-1]
    )
    variables = {"n": "parameters N", "d": "targets D", "h": "history length H"}
    *most, last = (variables[name] for name in fit.law.variables)
    named = f"{', '.join(most)} and {last}"
    return f"<p>In {named}: <code>{esc(law)}</code>, 95 %: {esc(values + cautions)}</p>"
