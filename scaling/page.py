"""The report page around its body, and small HTML helpers; style sheet and script (package files) are inline."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from scaling.style import COLOURS, GRID, INK, PAPER, SOFT, Plot

_FAMILIES = {f"c{i}": colour.lower() for i, colour in enumerate(COLOURS) if colour != INK}
_THEMED = {"ink": INK, "soft": SOFT, "grid": GRID, "paper": PAPER, **_FAMILIES}


def esc(value: object) -> str:
    """Text made safe for HTML content and quoted attributes."""
    return html.escape(str(value), quote=True)


def theme_colour(colour: str) -> str:
    """The page's variable for a figure colour, so that it follows the light or dark theme."""
    return next((f"var(--{name})" for name, value in _THEMED.items() if value == colour.lower()), colour)


def paragraphs(text: str) -> str:
    """Plain text as HTML: blank lines separate paragraphs, an indented line is a command."""
    parts = [part for part in text.split("\n\n") if part.strip()]
    return "".join(
        f"<p><code>{esc(part.strip())}</code></p>" if part.startswith("    ") else f"<p>{esc(part)}</p>"
        for part in parts
    )


def document(title: str, body: str) -> str:
    """A whole self-contained page; the icon is an empty data URI so that no browser asks the network for one."""
    package = files("scaling")
    css, script = (package.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{esc(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{css}</style>\n</head>\n<body>\n'
        f"<main>\n{body}\n</main>\n{data_html('theme-colours', _THEMED)}\n<script>\n{script}</script>\n"
        "</body>\n</html>\n"
    )


def data_html(identifier: str, data: object) -> str:
    """Data for the page's script; no text in it can end its element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{esc(identifier)}">{text}</script>'


def figure_html(plot: Plot, prefix: str, note: str = "") -> str:
    """One figure with its caption, inline SVG in the page's colours, how to read it, and download links."""
    read = f'<p class="note">{esc(note)}</p>\n' if note else ""
    return (
        f'<figure id="{esc(prefix)}">\n<figcaption>{esc(plot.title)}</figcaption>\n{inline_svg(plot, prefix)}\n{read}'
        f'<p class="downloads">{_download(plot.key + ".csv", "text/csv", plot.csv(), "Download CSV")}'
        f'<a data-svg download="{esc(plot.key)}.svg" href="#{esc(prefix)}">Download SVG</a></p>\n</figure>'
    )


def inline_svg(plot: Plot, prefix: str) -> str:
    """The SVG element for embedding: unique ids, no fixed size, colours that follow the page's theme."""
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<title>.*?</title>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for name, colour in _THEMED.items():
        svg = svg.replace(f"fill: {colour}", f"fill: var(--{name})")
        svg = svg.replace(f"stroke: {colour}", f"stroke: var(--{name})")
    opening = svg[: svg.index(">") + 1]
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    described = f'<svg {box.group()} role="img" aria-label="{esc(plot.alt)}" xmlns="http://www.w3.org/2000/svg" '
    return described + 'xmlns:xlink="http://www.w3.org/1999/xlink">' + svg[len(opening) :].rstrip()


def _download(name: str, kind: str, text: str, label: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{esc(name)}" href="data:{kind};base64,{data}">{label}</a>'


def table_html(
    headers: Sequence[tuple[str, bool]],
    rows: Iterable[tuple[str, Sequence[tuple[str, object]]]],
    *,
    label: str,
    sortable: bool = False,
) -> str:
    """A table in its own scrolling container.

    Args:
        headers: (text, numeric?) of each column.
        rows: (row class, cells); a cell is (shown text, sort value).
        label: what the table holds, for assistive technology.
        sortable: headers become buttons that sort.
    """
    head = "".join(
        f'<th scope="col"{_class(numeric)}>'
        + (f'<button type="button">{esc(text)}</button>' if sortable else esc(text))
        + "</th>"
        for text, numeric in headers
    )
    body = []
    for css, cells in rows:
        inner = "".join(
            f"<td{_class(numeric)}" + (f' data-v="{esc(value)}"' if sortable and numeric else "") + f">{esc(text)}</td>"
            for (text, value), (_, numeric) in zip(cells, headers)
        )
        body.append(f'<tr class="{css}">{inner}</tr>' if css else f"<tr>{inner}</tr>")
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}"><table{kind}>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""
