"""The laws of a report as a LaTeX table for a paper."""

from __future__ import annotations

import math
import re

from scaling.family import FamilyResult
from scaling.metrics import metric_name
from scaling.panel import Panel
from scaling.plots import x_name, x_symbol
from scaling.study import Analysis
from scaling.style import number

_LAWS = {
    "loglin": r"a + b \ln {x}",
    "power": r"a\,{x}^{{-b}}",
    "power_const": r"c + a\,{x}^{{-b}}",
    "broken": r"a\,{x}^{{-b}} \left(1 + ({x}/d)^{{1/f}}\right)^{{-c f}}",
}
_SPECIAL = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_DOWN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻−", "0123456789--")
_DIGITS = 4


def laws_tex(analysis: Analysis) -> str:
    """A booktabs `tabular` of the laws drawn, one row per family, a heading per panel; empty where none was fitted.

    Each parameter's column has its value and its 95 % interval, four significant digits.
    """
    fitted = [(panel, [f for f in panel.families if f.fit is not None]) for panel in analysis.panels]
    fitted = [(panel, families) for panel, families in fitted if families]
    if not fitted:
        return ""
    used = {name for _, families in fitted for f in families if f.fit is not None for name in f.fit.params}
    names = [name for name in "abcdf" if name in used]
    columns = 4 + len(names)
    heads = ["family", "law", *(f"${name}$" for name in names), r"error (\%)", r"held-out (\%)"]
    lines = [
        "% Laws with 95 % intervals in brackets; the document needs \\usepackage{booktabs}.",
        f"\\begin{{tabular}}{{ll{'l' * len(names)}rr}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
    ]
    for panel, families in fitted:
        lines += [r"\midrule", f"\\multicolumn{{{columns}}}{{l}}{{{escape(_heading(panel))}}} \\\\"]
        lines += [" & ".join(_row(family, panel, names)) + r" \\" for family in families]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape(text: str) -> str:
    """Text as LaTeX prints it: its special characters are escaped, a line break is a space."""
    return re.sub(r"[&%$#_{}\\~^<>|]", lambda found: _SPECIAL[found.group()], " ".join(text.split()))


def tex_number(value: float) -> str:
    """A number in math mode, without the dollars: `1.234 \\times 10^{6}`."""
    if not math.isfinite(value):
        return r"\infty" if value > 0 else r"-\infty" if value < 0 else r"\mathrm{n/a}"
    mantissa, times, exponent = number(value, _DIGITS).translate(_DOWN).partition("×10")
    return rf"{mantissa} \times 10^{{{exponent}}}" if times else mantissa


def _heading(panel: Panel) -> str:
    place = ", ".join(word for word in (panel.study, panel.dataset) if word)
    what = f"{metric_name(panel.metric)} against {x_name(panel)}"
    return f"{place}: {what}" if place else what


def _row(family: FamilyResult, panel: Panel, names: list[str]) -> list[str]:
    assert family.fit is not None
    symbol = x_symbol(panel)
    x = symbol if len(symbol) == 1 else rf"\mathrm{{{escape(symbol)}}}"
    limits = family.boot.params() if family.boot else {}
    cells = [escape(family.name), f"${_LAWS[family.fit.form].format(x=x)}$"]
    for name in names:
        cell = f"${tex_number(family.fit.params[name])}$" if name in family.fit.params else "--"
        if name in limits:
            low, high = limits[name]
            cell += f" $[{tex_number(low)}, {tex_number(high)}]$"
        cells.append(cell)
    errors = (family.fit.mape, family.fit.held_out_mape)
    return [*cells, *(f"{error:.2g}" if math.isfinite(error) else "--" for error in errors)]
