"""How figures look: colours, markers, number formatting, and the SVG that carries them.

Colours are measured to stay apart under the three colour-vision deficiencies and keep 3:1 against white (blue and
vermillion lead, for generative against classical). Marker and line style change with the family too, so colour is
never the only cue. Text stays text and output is the same to the byte for the same numbers.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from scaling.table import FloatArray, rows_to_csv

INK, SOFT, GRID, PAPER = "#1f2430", "#5a6270", "#dfe3e9", "#ffffff"
# Okabe-Ito without yellow, light sky blue late; who takes which is `family_styles`.
COLOURS = ("#0072B2", "#D55E00", "#007A5E", "#AA4499", "#8A6200", "#56B4E9", "#1f2430")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", (0, (6, 2)), (0, (4, 2, 1, 2)), (0, (1, 1.4)), (0, (8, 2, 2, 2)), (0, (3, 1)), (0, (10, 3)))
_RC: Any = {  # matplotlib types its settings as one long literal
    "text.parse_math": False,  # a dollar sign in a family name is a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "scaling",
    "pdf.fonttype": 42,  # TrueType: many venues refuse type 3 fonts
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.titlesize": 11.0,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.titlelocation": "left",
}
# The place in the palette that a family has on every page.
_PLACES = {"hstu": 0, "dlrm": 1, "dirl": 2, "transformer": 3, "dcn": 4, "din": 5}
# Other families take what is free on the page in this order, HSTU's blue and DLRM's vermillion last.
_OTHERS = (2, 3, 4, 6, 5, 0, 1)
_VARIANT = re.compile(r"([-_ ]?v\d+|_retrieval)$")
_UP = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class FamilyStyle:
    """One family's colour, marker and line style."""

    colour: str
    marker: str
    line: object


@dataclass(frozen=True)
class Plot:
    """A drawn figure with what it says.

    `svg` is its text (text kept as text, no date); `rows` are the plotted numbers (one dictionary per mark);
    `alt` describes the figure in words with its fitted numbers; `key` is a file-name-safe name; `figure` is
    what was drawn.
    """

    key: str
    title: str
    svg: str
    rows: list[dict[str, object]]
    alt: str
    figure: Figure = field(repr=False, compare=False)

    def csv(self) -> str:
        """The plotted numbers as CSV text."""
        return rows_to_csv(list(dict.fromkeys(key for row in self.rows for key in row)), self.rows)

    def pdf(self) -> bytes:
        """The figure as a PDF for a paper, its text kept as text; the same bytes for the same numbers."""
        out = io.BytesIO()
        with matplotlib.rc_context(_RC):
            FigureCanvasPdf(self.figure).print_pdf(out, metadata={"CreationDate": None, "Title": self.title})
        return out.getvalue()


def styled[**P, R](draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under this module's settings and leave matplotlib's own as they were."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    return inside


def render(figure: Figure, title: str) -> str:
    """The figure as SVG text, the same bytes for the same numbers; call it once, inside `styled`."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Title": title})
    # A hundredth of a point is finer than any screen; six decimals would double the page.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), out.getvalue())


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure in inches with one styled axes."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    return figure, axes


def family_styles(names: Sequence[str]) -> dict[str, FamilyStyle]:
    """A style for each family: a known one (`_PLACES`) looks the same on every page, whoever else is on it.

    A version or a task after a known name changes nothing ("dcn_v2", "hstu_retrieval"), unless two names would then
    look alike. The other families take the places that no family of the page has, and start over when there are no
    more.
    """
    places: dict[str, int] = {}
    for name in names:
        place = _PLACES.get(name.lower(), _PLACES.get(_VARIANT.sub("", name.lower())))
        if place is not None and place not in places.values():
            places[name] = place
    free = [i for i in _OTHERS if i not in places.values()] or list(_OTHERS)
    others = [name for name in names if name not in places]
    places |= {name: free[k % len(free)] for k, name in enumerate(others)}
    return {name: FamilyStyle(COLOURS[i], MARKERS[i], LINES[i]) for name, i in places.items()}


def log_x(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with plain-text ticks: powers of ten, or 1-2-5 or powers of two for a short range."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def log_y(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis with plain-text ticks."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def linear_y(axes: Axes) -> None:
    """A linear y axis without offset notation."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    tens = [10.0**e for e in range(first, last + 1) if low <= 10.0**e <= high]
    if len(tens) >= 3:
        step = -(-len(tens) // 8)
        return tens[::step]
    return [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]


def value_ticks(axes: Axes, values: FloatArray) -> None:
    """Ticks at the swept values themselves (depths, lengths), thinned to nine; none of them where some are crowded."""
    kept = np.unique(values)
    gaps = np.diff(np.log(kept))
    if len(gaps) and gaps.min() < gaps.sum() / 14:
        return
    axes.xaxis.set_major_locator(FixedLocator(list(kept[:: -(-len(kept) // 9)])))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A tick's text: 10¹⁸ for large powers, plain digits for small numbers."""
    if value <= 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    if -3 <= exponent < 5:
        return f"{value:.6g}"
    mantissa = value / 10.0**exponent
    lead = "" if abs(mantissa - 1) < 1e-6 else f"{mantissa:g}×"
    return f"{lead}10{str(exponent).translate(_UP)}"


def number(value: float, digits: int = 5) -> str:
    """A number to read: `digits` significant digits, powers of ten as 1.2345×10⁶, a true minus sign."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "–"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if value != 0 and not -3 <= int(exponent) < min(digits, 6):
        return f"{mantissa}×10{str(int(exponent)).translate(_UP)}".replace("-", "−")
    # "#" keeps trailing zeros: five significant digits are shown even where the last one is a zero.
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def interval_text(pair: tuple[float, float] | None, digits: int = 5) -> str:
    """An interval to read, `[low, high]`; empty where there is none."""
    return f"[{number(pair[0], digits)}, {number(pair[1], digits)}]" if pair else ""


def with_interval(value: float, pair: tuple[float, float] | None, digits: int = 5) -> str:
    """A value and, where there is one, its interval."""
    return f"{number(value, digits)} {interval_text(pair, digits)}".rstrip()


def equation(form: str, params: dict[str, float], y: str, x: str) -> str:
    """A fitted law in words: `NE = 0.69331 + 14.330·C^−0.15339`, five significant digits."""
    b = params["b"]
    a = number(params["a"])
    if form == "loglin":
        return f"{y} = {a} {'−' if b < 0 else '+'} {number(abs(b))}·ln {x}"
    if form == "broken":
        bend = f"(1 + ({x}/{number(params['d'])})^{number(1 / params['f'])})^{number(-params['c'] * params['f'])}"
        return f"{y} = {a}·{x}^{number(-b)}·{bend}"
    power = f"{number(abs(params['a'])) if form == 'power_const' else a}·{x}^{number(-b)}"
    if form == "power":
        return f"{y} = {power}"
    return f"{y} = {number(params['c'])} {'−' if params['a'] < 0 else '+'} {power}"
