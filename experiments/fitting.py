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
        f"{name} {_text(value, 5)}" + (f" ({_between(intervals[name])})" if name in intervals else "")
        for name, value in fit["params"].items()
    )
    return f"{equations[form]}: {params}; {told}"


def fit_law_and_print(
    table: scaling.Table,
    law: str,
    columns: scaling.Columns,
    *,
    estimator: str,
    resampling: scaling.Resampling,
    out: Path | None,
) -> None:
    """Fits one law, prints it with its 95 % intervals, and writes all there is to say as JSON."""
    result = scaling.fit_law(table, law, columns, estimator=estimator, resampling=resampling)
    if out is not None:
        scaling.write_json(out, result)
    console = Console(highlight=False, soft_wrap=True)
    named = result.get("groups")
    groups: Mapping[str, Any] = named if isinstance(named, dict) else {"": result}
    for name, found in groups.items():
        console.print(f"{name}: {found['equation']}".removeprefix(": "))
        for param, value in found["params"].items():
            pair = (found["intervals"] or {}).get(param)
            console.print(f"  {param:>6} {_text(value, 6):<10}" + (f"   {_between(pair)}" if pair else ""))
        if "objective" in found:
            console.print(f"  objective {found['objective']:.12g}, {found['n']} runs")
        for form, fit in found.get("forms", {}).items():
            told = f"AICc {fit['aicc']:.2f}" if fit["aicc"] is not None else "no AICc"
            held = fit["held_out_mape_percent"]
            console.print(f"  {form:>11}: {told}" + ("" if held is None else f", held-out error {held:.3g} %"))
        if found["bootstrap"]:
            console.print(f"  intervals: {found['bootstrap']}", style="dim")
        for warning in found["warnings"]:
            console.print(f"  {warning['code']}: {warning['text']}")


def _text(value: float | None, digits: int) -> str:
    """None: beyond what a number holds, as the coefficient of a very steep law."""
    return "unbounded" if value is None else f"{value:.{digits}g}"


def _between(pair: Sequence[float | None]) -> str:
    return " to ".join(_text(limit, 5) for limit in pair)


def advise_and_print(
    tables: Sequence[Path], budget: float, y: str | None, names: Mapping[str, str], out: Path | None
) -> None:
    """What each family would do with a budget, best first; ``names`` as of `scaling.recommend`."""
    (advice,) = scaling.recommend(list(tables), [budget], y, names=names)
    if out is not None:
        scaling.write_json(out, {"budget": budget, "advice": [one.to_json() for one in advice]})
    console = Console(highlight=False, soft_wrap=True)
    for one in advice:
        console.print(" ".join(part for part in (one.study, one.dataset, f"[bold]{one.family}[/]") if part))
        low, high = one.interval or (None, None)
        between = "" if low is None or high is None else f" ({low:.5g} to {high:.5g} for one run)"
        console.print(f"  expected  {one.metric:.5g}{between}")
        for column, (value, pair) in one.sizes.items():
            console.print(f"  {column}  {value:.3g}" + ("" if pair is None else f" ({pair[0]:.3g} to {pair[1]:.3g})"))
        shape = ", ".join(f"{name.removeprefix('model.')} {value:.3g}" for name, value in one.shape.items())
        console.print(f"  shape  {shape}" if shape else "  the trials say nothing of the shape")
        console.print(f"  nearest trained  {one.nearest}")
        console.print(f"  by  {one.law}", style="dim")
        for warning in one.warnings:
            console.print(f"  {warning.code}: {warning.text}")
