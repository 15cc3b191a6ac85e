"""Rate check: is a family's learning rate right at both ends of its ladder?

    python -m experiments.rate_check --data DATA --budget small --workers 2 --pack 5

A recipe sets one rate for a whole ladder, by a rule of the width (experiments/ladders). If the rule is off at one
end, the law takes it for the effect of compute. So the smallest and the largest rung of a budget are trained with 1/4,
1/2, 1, 2 and 4 times the recipe's rate (the tables' with it) and held against each other on the validation part; the
test part is not evaluated.

Small: rungs s0 and s4, 50 trials. Medium: s2 and s6.

Expect the recipe's rate within one step of the best, and less lost by that than a rung of the ladder gains.
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

FACTORS = [0.25, 0.5, 1.0, 2.0, 4.0]
_RATES = ("train.learning_rate", "train.embedding_learning_rate")


def at_factors(points: Sweep) -> Sweep:
    """Each point with each factor of its learning rates; the factor is the axis."""
    sweep = Sweep(())
    for point in points:
        for factor in FACTORS:
            values = {**point.values, **{key: factor * point.values[key] for key in _RATES}}
            label = f"{point.label} rate x{factor:g}"
            sweep += Sweep((replace(point, label=label, axis_value=factor, values=values),))
    return sweep * param("seed", [0])


def _ends(ladder: Ladder, *chosen: int) -> Sweep:
    """Every family at the chosen rungs, with each factor."""
    ends = Sweep(())
    for family in ladder.sizes:
        for rung in chosen:
            ends += ladder.rungs(family, rung, rung)
    return at_factors(ends)


def verdict(out: Place, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per family and size (a label's first word) the best factor, how many steps of the grid the recipe's rate is from
    it, and what that costs in validation NE; first, how many are within a step."""
    ends: dict[tuple[str, str], dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done" and row.get("validation/ne") is not None:
            ends.setdefault((row["family"], row["label"].split()[0]), {})[row["axis_value"]] = row
    said, near = [], 0
    for (family, rung), by_factor in sorted(ends.items()):
        best = min(by_factor, key=lambda factor: by_factor[factor]["validation/ne"])
        steps = round(abs(np.log2(best)))
        near += 1.0 in by_factor and steps <= 1
        said.append(f"{family} {rung}: {_judged(out, by_factor, best, steps)}.")
    return [f"The recipe's rate is within one step (a factor of 2) of the best at {near} of {len(ends)} ends.", *said]


def _judged(out: Place, by_factor: Mapping[float, Mapping[str, Any]], best: float, steps: int) -> str:
    ne = f"validation NE {by_factor[best]['validation/ne']:.4f}"
    edge = ", the end of the grid: the best may lie beyond" if best in (min(FACTORS), max(FACTORS)) else ""
    found = f"best at {best:g} times the recipe's rate ({ne}{edge})"
    if 1.0 not in by_factor:
        return f"{found}; at the recipe's own no trial finished"
    if best == 1.0:
        return f"the recipe's rate is the best of {len(by_factor)} ({ne})"
    sides = [users_of(out, [by_factor[factor]["trial"]]) for factor in (best, 1.0)]
    worse = by_factor[1.0]["validation/ne"] - by_factor[best]["validation/ne"]
    cost = plus_minus(difference(*sides)) if all(sides) else f"{worse:+.4f}"
    return f"{found}, {steps} step{'s' * (steps > 1)} away; the recipe's is {cost} from it"


def _study(ladder: Ladder) -> Study:
    return Study(
        name="rate_check",
        title="Learning rates at the ladder's ends",
        doc=(__doc__ or "").strip(),
        points={"small": _ends(ladder, 0, 4), "medium": _ends(ladder, 2, 6)},
        metric="validation/ne",
        axis="learning_rate_factor",
        base={**ladder.base, "train.report_test": False},
        conclude=verdict,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
