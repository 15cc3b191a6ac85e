"""Tuning: each family's learning rate and dropout, by the same grid, on the validation part.

    python -m experiments.tuning --data DATA --budget small --workers 2

Every family of the comparison trains rungs s2, s4, s5 and s6 of its ladder with several learning rates, on the lower
three also with two rates of dropout. The recipes in experiments/ladders are read off the validation NE; the test
part is not evaluated.

Small: 145 trials, about three quarters of an hour with two workers on two cores.

Expect the learning rate to matter more than dropout (one pass leaves little to overfit), and the best one to fall with
size.
"""

import sys
from dataclasses import replace

from experiments.ladders import Ladder
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, param

# At width 32 and below; here all fall with the square root of the width. The outer two show that the rest bracket.
LEARNING_RATES = [1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2]
_MIDDLE = LEARNING_RATES[1:-1]


def _grid(ladder: Ladder, chosen: list[int], rates: list[float], dropouts: list[float]) -> Sweep:
    sweep = Sweep(())
    for family in ladder.sizes:
        for rate in rates:
            for dropout in dropouts:
                recipe = replace(ladder.recipes[family], learning_rate=rate, power=0.5, dropout=dropout)
                for rung in chosen:
                    (point,) = ladder.rungs(family, rung, rung, recipe)
                    label = f"{point.label} rate={rate:g} dropout={dropout:g}"
                    sweep += Sweep((replace(point, label=label, axis_value=rate),))
    return sweep * param("seed", [0])


def _study(ladder: Ladder) -> Study:
    return Study(
        name="tuning",
        title="Learning rate and dropout by family",
        doc=(__doc__ or "").strip(),
        points={
            "small": _grid(ladder, [2, 4], LEARNING_RATES, [0.0, 0.1])
            + _grid(ladder, [5], _MIDDLE, [0.0, 0.1])
            + _grid(ladder, [6], _MIDDLE, [0.0])
        },
        metric="validation/ne",
        axis="learning_rate",
        base={**ladder.base, "train.report_test": False},
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
