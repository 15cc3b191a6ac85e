"""Parametrisations: does one learning rate for every size do as well as rates tuned by size?

    python -m experiments.parametrisations --data DATA --budget small --workers 2

The generative rankers on the rungs of the comparison, by the tuned ladder, whose rates fall with the width by a power
read off a grid, and by the muP ladder, whose rate was found at width 32 (docs/mup.md). Chosen by the validation NE; the
test part is not evaluated.

Small: rungs s2, s4 and s5, 18 trials. Medium: s4 to s7.

Expect no difference where the tuned rates were tuned, and muP ahead beyond.
"""

import sys
from dataclasses import replace

from experiments.ladders import read
from experiments.study import Study
from experiments.sweep import Sweep, param

FAMILIES = ("hstu", "dirl", "transformer")
LADDERS = ("tuned", "mup")


def _both(*chosen: int) -> Sweep:
    """Every family at the chosen rungs by each ladder."""
    sweep = Sweep(())
    for family in FAMILIES:
        for name in LADDERS:
            for rung in chosen:
                for point in read(name).rungs(family, rung, rung):
                    sweep += Sweep((replace(point, family=f"{family} {name}"),))
    return sweep * param("seed", [0])


STUDY = Study(
    name="parametrisations",
    title="One learning rate for all sizes against rates tuned by size",
    doc=(__doc__ or "").strip(),
    points={"small": _both(2, 4, 5), "medium": _both(4, 5, 6, 7)},
    metric="validation/ne",
    axis="train_flops",
    base={**read("tuned").base, "train.report_test": False},
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
