"""``genrec fit``: the laws of a table in a few lines of text; numbers in full go to JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import scaling


def fit_and_print(tables: Sequence[Path], y: str | None, x: str, group: str, out: Path | None) -> None:
    """Fits every panel and family and prints the chosen law with its 95 % intervals."""
    result: Mapping[str, Any] = scaling.fit_command(list(tables), y=y, x=x, group=group, out=out)
    console = Console(highlight=False, soft_wrap=True)
    for panel in result["panels"]:
        place = " ".join(part for part in (panel["study"], panel["dataset"]) if part)
        console.print(f"{panel['metric']} against {panel['axis'] or panel['x']} {place}".strip())
        if panel["plain"]:
            console.print(f"  {panel['plain']}")
        for warning in panel["warnings"]:
            console.print(f"  {'':>12}  {warning['code']}: {warning['text']}")
        for family in panel["families"]:
            console.print(f"  {family['name']:>12}  {_law(family, result['equations'])}")
            for warning in family["warnings"]:
                console.print(f"  {'':>12}  {warning['code']}: {warning['text']}")


def _law(family: Mapping[str, Any], equations: Mapping[str, str]) -> str:
    best = family["best"]
    told = f"{family['configurations']} configurations, best {best['value']:.5g} at {best['x']:.3g}"
    form = family["form"]
    if form is None:
        return told
    fit = family["fits"][form]
    intervals = fit["intervals"] or {}
    params = ", ".join(
        f"{name} {value:.5g}"
        + (f" ({intervals[name][0]:.5g} to {intervals[name][1]:.5g})" if name in intervals else "")
        for name, value in fit["params"].items()
    )
    return f"{equations[form]}: {params}; {told}"
