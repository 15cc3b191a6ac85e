"""Epochs: when does repeated data stop helping?

    python -m experiments.epochs --data DATA --budget small --workers 2

The ladders see every training event once, at most. Here each family trains one rung of its ladder for half a pass,
one, two and four, each with a schedule that ends with its own last step; nothing else differs. The number of passes is
chosen on the validation part, and what the choice is worth is read off the test part.

Small: rung s3, 20 trials. Medium: s6, two seeds.

Expect the second pass to help little where the first has filled the tables of items, and the fourth to hurt: rankers
of clicks are known to overfit from the second pass on (Zhang et al., CIKM 2022).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.ladders import Ladder
from experiments.paired import plus_minus, users_of
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, param
from genrec_jax.noise import difference
from genrec_jax.train.places import Place

EPOCHS = [0.5, 1.0, 2.0, 4.0]


def _passes(ladder: Ladder, rung: int, seeds: list[int]) -> Sweep:
    """Every family at one rung, for each number of passes."""
    sweep = Sweep(())
    for family in ladder.sizes:
        (point,) = ladder.rungs(family, rung, rung)
        for epochs in EPOCHS:
            values = {**point.values, "train.epochs": epochs}
            label = f"{point.label} epochs={epochs:g}"
            sweep += Sweep((replace(point, label=label, axis_value=epochs, values=values),))
    return sweep * param("seed", seeds)


def verdict(out: Place, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per family, both NEs by the number of passes, the number that validation would choose, and what it is worth on
    the test part against one pass."""
    families: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["status"] == "done" and None not in (row.get("validation/ne"), row.get("ne")):
            families.setdefault(row["family"], {}).setdefault(row["axis_value"], []).append(row)
    return [f"{family}: {_said(out, dict(sorted(found.items())))}." for family, found in sorted(families.items())]


def _said(out: Place, by_epochs: Mapping[float, Sequence[Mapping[str, Any]]]) -> str:
    def mean(epochs: float, column: str) -> float:
        return float(np.mean([row[column] for row in by_epochs[epochs]]))

    shown = [f"{e:g}: {mean(e, 'validation/ne'):.4f} / {mean(e, 'ne'):.4f}" for e in by_epochs]
    best = min(by_epochs, key=lambda epochs: mean(epochs, "validation/ne"))
    said = f"validation / test NE by passes {', '.join(shown)}; validation chooses {best:g}"
    if best == max(EPOCHS):
        said += ", the most that were tried"
    if best == 1.0 or 1.0 not in by_epochs:
        return said
    sides = [users_of(out, [row["trial"] for row in by_epochs[epochs]]) for epochs in (1.0, best)]
    apart = plus_minus(difference(*sides)) if all(sides) else f"{mean(best, 'ne') - mean(1.0, 'ne'):+.4f}"
    return f"{said}, whose test NE is {apart} from that of one pass"


def _study(ladder: Ladder) -> Study:
    return Study(
        name="epochs",
        title="One pass over the data against several",
        doc=(__doc__ or "").strip(),
        points={"small": _passes(ladder, 3, [0]), "medium": _passes(ladder, 6, [0, 1])},
        metric="ne",
        axis="epochs",
        base=ladder.base,
        conclude=verdict,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
