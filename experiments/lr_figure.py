"""The figure of experiments/lr_transfer.py, lr_depth.py or lr_batch.py: NE by learning rate, a curve per size.

    python -m experiments.lr_figure RUNS --out docs/mup --name lr_transfer

Prints where each size has its best rate, on the grid and at the vertex of the parabola through its neighbours.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

import scaling
from genrec_jax.errors import UserError
from scaling.table import rows_to_csv

METRIC = "validation/ne"
SIDES = ("standard", "muP", "whole", "share")  # how trials are parametrised, from left to right

Name = Literal["lr_transfer", "lr_depth", "lr_batch"]
_SIZES: dict[Name, str] = {"lr_transfer": "width", "lr_depth": "depth", "lr_batch": "rows in a batch"}


class Best(NamedTuple):
    """The best of the rates a size was trained with, and the vertex of the parabola through it and its neighbours;
    ``edge``: the best is the last of the grid, and the true one may lie beyond."""

    rate: float
    vertex: float
    ne: float
    edge: bool


Curves = dict[tuple[str, str], dict[int, dict[float, float]]]  # (model, parametrisation) -> size -> rate -> NE


def curves(rows: Sequence[Mapping[str, object]]) -> Curves:
    """NE of finished trials, seeds averaged; a diverged one is infinite."""
    found: dict[tuple[str, str], dict[int, dict[float, list[float]]]] = {}
    for row in rows:
        model, by, width = str(row["family"]).split()
        value = float(str(row[METRIC])) if row["status"] == "done" else math.inf
        if row["status"] in ("done", "diverged"):
            rates = found.setdefault((model, by), {}).setdefault(int(width), {})
            rates.setdefault(float(str(row["axis_value"])), []).append(value)
    return {
        key: {
            width: {rate: float(np.mean(found[key][width][rate])) for rate in sorted(found[key][width])}
            for width in sorted(found[key])
        }
        for key in sorted(found)
    }


def best_of(curve: Mapping[float, float]) -> Best:
    """Of one width's NE by learning rate, the rates a constant factor apart."""
    rates, values = list(curve), list(curve.values())
    at = int(np.argmin(values))
    edge = at in (0, len(rates) - 1)
    if edge or not np.isfinite(values[at - 1 : at + 2]).all():
        return Best(rates[at], rates[at], values[at], edge)
    low, middle, high = values[at - 1 : at + 2]
    bend = low - 2 * middle + high
    shift = 0.5 * (low - high) / bend if bend > 0 else 0.0
    return Best(rates[at], rates[at] * (rates[at + 1] / rates[at]) ** shift, middle, edge)


def drift(by_width: Mapping[int, Mapping[float, float]]) -> tuple[float, float]:
    """How far apart the best rates of the widths are, in factors of two: of the grid, and of the parabolas."""
    found = [best_of(curve) for curve in by_width.values()]
    spans = ([np.log2(best.rate) for best in found], [np.log2(best.vertex) for best in found])
    return float(np.ptp(spans[0])), float(np.ptp(spans[1]))


def draw(found: Curves, size: str) -> str:
    """SVG: a row per model, the parametrisations side by side."""
    from matplotlib.figure import Figure

    from scaling.style import COLOURS, log_x, render, styled

    def drawn() -> str:
        models = list(dict.fromkeys(model for model, _ in found))
        sides = sorted({by for _, by in found}, key=SIDES.index)
        figure = Figure(figsize=(7.2, 2.7 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), len(sides), sharex=True, sharey="row", squeeze=False)
        rates = [rate for widths in found.values() for curve in widths.values() for rate in curve]
        for line, model in enumerate(models):
            for column, by in enumerate(sides):
                axes, widths = panels[line, column], found.get((model, by), {})
                for n, (width, curve) in enumerate(widths.items()):
                    shown = {rate: value for rate, value in curve.items() if math.isfinite(value)}
                    axes.plot(shown.keys(), shown.values(), "o-", color=COLOURS[n], markersize=3, label=f"{width}")
                    best = best_of(curve)
                    axes.plot(best.rate, best.ne, "o", color=COLOURS[n], markersize=8, fillstyle="none")
                log_x(axes, min(rates) / 1.3, max(rates) * 1.3)
                axes.set_title(f"{model}, {by}")
                axes.grid(True, linewidth=0.5, alpha=0.5)
            # What fails to learn is far above the rest; the least of each curve is what matters.
            values = [
                v for (own, _), widths in found.items() if own == model for c in widths.values() for v in c.values()
            ]
            least = min(values)
            panels[line, 0].set_ylim(least - 0.01, min(max(v for v in values if math.isfinite(v)), least + 0.2) + 0.01)
            panels[line, 0].set_ylabel("validation NE")
        for axes in panels[-1]:
            axes.set_xlabel("learning rate")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6, title=size
        )
        return render(figure, "Validation NE by learning rate, at several widths")

    return styled(drawn)()


def lines(found: Curves) -> list[str]:
    """A sentence per model and parametrisation, and a table row per width."""
    said = []
    for (model, by), widths in found.items():
        grid, parabola = drift(widths)
        said.append(f"{model}, {by}: the best rate moves by a factor of 2^{grid:g} (parabolas: 2^{parabola:.2f})")
        for width, curve in widths.items():
            best = best_of(curve)
            said.append(
                f"  {width:5} {best.rate:9.5f} {best.vertex:9.5f} {best.ne:.4f}{' (edge)' if best.edge else ''}"
            )
    return said


def main(runs: Annotated[Path, tyro.conf.Positional], *, out: Path, name: Name = "lr_transfer") -> int:
    """Write NAME.svg and NAME.csv to OUT and print where each size has its best rate; RUNS: the study's folder."""
    try:
        table = scaling.read_table(runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = curves(table.rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.svg").write_text(draw(found, _SIZES[name]), encoding="utf-8")
    rows = [
        {"model": model, "by": by, "size": size, "learning_rate": rate, METRIC: value}
        for (model, by), sizes in found.items()
        for size, curve in sizes.items()
        for rate, value in curve.items()
    ]
    (out / f"{name}.csv").write_text(rows_to_csv(list(rows[0]), rows), encoding="utf-8")
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
