"""The card of one family on the page: its best value, where it was reached, and by how many trials."""

from __future__ import annotations

from scaling.family import FamilyResult
from scaling.metrics import metric_name
from scaling.page import esc, theme_colour
from scaling.panel import Panel
from scaling.plots import x_symbol
from scaling.style import number, tick


def card_html(family: FamilyResult, panel: Panel, colour: str) -> str:
    """The card, edged in the colour of the family's curve (a hexadecimal one)."""
    points, best = family.points, family.best
    seeds = len(points.runs[best])
    spread = f" ± {number(points.spread[best], 2)}" if seeds > 1 else ""
    label = points.labels[best] if points.labels else ""
    where = f"{label} at" if label else "at"
    lines = [
        f'<p class="big">{esc(number(points.mean[best]))}</p>',
        f"<p>best {esc(metric_name(panel.metric))}{esc(spread)} ({seeds} seed{'s' * (seeds > 1)}), "
        f"{esc(where)} {esc(x_symbol(panel))} = {esc(tick(float(f'{points.x[best]:.3g}')))}</p>",
        f"<p>{len(points)} configurations, {points.n_runs} runs</p>",
    ]
    return f'<div class="card" style="--c:{theme_colour(colour)}"><h3>{esc(family.name)}</h3>{"".join(lines)}</div>'
