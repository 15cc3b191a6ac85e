"""Tuning of the generative study: the learning rate of every cut of the log, on the validation part.

    python -m experiments.generative_tuning --data DATA --budget small --workers 2

The middle budget of experiments/generative.py with four learning rates for every cut; RATES there are read off the
validation NE, the test part is not evaluated.

Small: 16 trials, about ten minutes with two workers on two cores.

Expect lower rates for impressions, whose steps have a fiftieth of the targets.
"""

import sys
from dataclasses import replace

from experiments.generative import BASE, CUTS, SMALL, cut
from experiments.study import Study
from experiments.sweep import Sweep, param

LEARNING_RATES = [0.003, 0.009, 0.027, 0.081]


def _grid() -> Sweep:
    points = Sweep(())
    for name in CUTS:
        for rate in LEARNING_RATES:
            for point in cut(name, 64, SMALL, rate):
                points += Sweep((replace(point, label=f"rate={rate:g}", axis_value=rate),))
    return points * param("train.steps", [1000]) * param("seed", [0])


STUDY = Study(
    name="generative_tuning",
    title="Learning rates of generative and impression-level training",
    doc=(__doc__ or "").strip(),
    points={"small": _grid()},
    metric="validation/ne",
    axis="learning_rate",
    base={**BASE, "train.report_test": False},
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
