"""The static parts of the report page: style sheet, script, and small HTML helpers. Everything is inline."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence

from scaling.style import COLOURS, GRID, INK, PAPER, SOFT, Plot

CSS = """
:root{--ink:#1f2430;--soft:#5a6270;--grid:#dfe3e9;--paper:#ffffff;--page:#f5f6f8;--accent:#0b5c91;--warn:#8a4b00;
--warnbg:#fff4e0;--c0:#0072b2;--c1:#d55e00;--c2:#007a5e;--c3:#aa4499;--c4:#8a6200;--c5:#56b4e9;
color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#a3acb9;--grid:#323a46;--paper:#171b21;--page:#0f1216;
--accent:#74b9ee;--warn:#f0bd72;--warnbg:#2b2314;--c0:#4ba3e3;--c1:#f4813d;--c2:#35b48f;--c3:#d98acb;--c4:#cfa640;--c5:#a5d8f6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;overflow-wrap:break-word}
main{max-width:1120px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:.4rem 0 .6rem;text-wrap:balance}
h2{font-size:1.3rem;margin:2.6rem 0 .8rem}
h3{font-size:1.05rem;margin:1.8rem 0 .5rem}
p,ul{max-width:74ch}
a{color:var(--accent)}
.lead{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1rem 0;font-size:.95rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:14px;margin:1rem 0}
.card,figure,details,.scroll{background:var(--paper);border:1px solid var(--grid);border-radius:10px}
.card{padding:14px 16px;border-top:4px solid var(--c,var(--grid))}
.card h3{margin:0 0 .3rem;display:flex;justify-content:space-between;gap:1rem;align-items:baseline}
.card .big{font-size:1.7rem;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.2}
.card p{margin:.35rem 0;font-size:.93rem}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em;
overflow-wrap:anywhere}
figure{margin:1rem 0;padding:14px 14px 10px}
figcaption{font-weight:600;margin-bottom:.5rem}
figure svg{display:block;width:100%;height:auto;max-width:660px;margin:0 auto;color:var(--ink)}
.downloads{margin:.5rem 0 0;font-size:.88rem;display:flex;gap:1.2rem;flex-wrap:wrap}
.downloads a{padding:.25rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px;align-items:start}
.pair figure{margin:0}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top;white-space:pre}
tbody tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right}
th{font-weight:600}
th button{all:unset;cursor:pointer;display:inline-flex;gap:.35em}
th button:focus-visible,a:focus-visible,.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);
outline-offset:2px}
th button::after{content:"\\2195";color:var(--soft)}
th[aria-sort=ascending] button::after{content:"\\2191"}
th[aria-sort=descending] button::after{content:"\\2193"}
tr.bad td{color:var(--warn)}
tr.chosen td{font-weight:600}
.warnings{list-style:none;padding:0;margin:.8rem 0;max-width:none}
.warnings li{background:var(--warnbg);border-left:4px solid var(--warn);border-radius:6px;padding:.45rem .8rem;
margin:.4rem 0;font-size:.93rem}
.warnings code{color:var(--warn)}
dl{margin:.8rem 0}
dt{font-weight:600;margin-top:.8rem}
dd{margin:.1rem 0 0;max-width:90ch}
details{padding:.7rem 1rem;margin:.8rem 0}
summary{cursor:pointer;font-weight:600}
details .pair{margin-top:.8rem}
footer{margin-top:3rem;color:var(--soft);font-size:.88rem}
@media (max-width:560px){body{font-size:15px}main{padding:12px 12px 48px}figure{padding:10px 4px 8px}
figcaption,.downloads{padding:0 8px}}
@media print{body{background:#fff}.downloads,nav{display:none}figure,.card{break-inside:avoid}}
"""

# Sorting reads the full-precision value of a cell; empty cells always go last.
SCRIPT = r"""
document.querySelectorAll('table.sortable').forEach(function(table){
  table.querySelectorAll('thead th').forEach(function(th,column){
    th.querySelector('button').addEventListener('click',function(){
      var up=th.getAttribute('aria-sort')!=='ascending';
      table.querySelectorAll('th[aria-sort]').forEach(function(o){o.removeAttribute('aria-sort')});
      th.setAttribute('aria-sort',up?'ascending':'descending');
      var body=table.tBodies[0];
      var key=function(row){var c=row.cells[column];return c.dataset.v===undefined?c.textContent.trim():c.dataset.v};
      var number=th.classList.contains('n');
      Array.from(body.rows).map(function(r){return [key(r),r]}).sort(function(a,b){
        if(a[0]===''||b[0]==='')return (a[0]==='')-(b[0]==='');
        var d=number?a[0]-b[0]:a[0].localeCompare(b[0],undefined,{numeric:true});
        return up?d:-d;
      }).forEach(function(pair){body.appendChild(pair[1])});
    });
  });
});
// The shown figure follows the theme; the downloaded one gets the light colours it was drawn with.
document.querySelectorAll('a[data-svg]').forEach(function(link){
  link.addEventListener('click',function(){
    var svg=link.closest('figure').querySelector('svg').cloneNode(true),box=svg.viewBox.baseVal;
    svg.setAttribute('width',box.width+'pt');svg.setAttribute('height',box.height+'pt');
    var text=new XMLSerializer().serializeToString(svg)
      .replace(/var\(--(\w+)\)/g,function(_,name){return COLOURS[name]});
    link.href=URL.createObjectURL(new Blob([text],{type:'image/svg+xml'}));
  });
});
"""
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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{esc(title)}</title>\n<link rel="icon" href="data:,">\n<style>{CSS}</style>\n</head>\n<body>\n'
        f"<main>\n{body}\n</main>\n<script>var COLOURS={json.dumps(_THEMED)};{SCRIPT}</script>\n</body>\n</html>\n"
    )


def figure_html(plot: Plot, prefix: str) -> str:
    """One figure with its caption, inline SVG in the page's colours, and download links."""
    return (
        f'<figure id="{esc(prefix)}">\n<figcaption>{esc(plot.title)}</figcaption>\n{inline_svg(plot, prefix)}\n'
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
