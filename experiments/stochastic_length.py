"""Stochastic Length: what does training on thinned histories cost in quality, and what does it buy?

    python -m experiments.stochastic_length --data DATA --budget small --workers 2

HSTU ranking on windows of N events, whole (alpha 2) and thinned at several alpha, each for half a pass over the data to
four passes. A pass over thinned windows costs less, because more of them fit in a row, and supervises fewer events. So
the same trials answer two questions: what is lost at equal passes (points of the same label), and at equal compute
(the curves). At alpha 1.6 the four ways to choose a subsequence are compared. Evaluation sees whole histories.

Small: N = 256 (alpha 1.6 leaves 84 events), 28 trials, about 40 minutes with two workers on two cores. Medium: N =
1024, two seeds. Large: N = 4096.

The paper finds NE at most 0.002 worse at equal passes on industrial histories. Expect more here: histories are shorter,
and an event that is thinned away is a target lost.
"""

import sys
from typing import Any

from experiments.ladders import LADDER, heads
from experiments.study import Study
from experiments.sweep import Sweep, model, param

RULES: dict[str, dict[str, Any]] = {
    "whole": {},
    **{f"alpha {alpha}": {"data.stochastic_length": alpha} for alpha in (1.9, 1.8, 1.6)},
    **{
        f"alpha 1.6 {how}": {"data.stochastic_length": 1.6, "data.subsequence": how}
        for how in ("place", "uniform", "recent")
    },
}


def _sweep(history: int, size: tuple[int, int], segments: int, seeds: list[int]) -> Sweep:
    width, depth = size
    values = {
        "data.history": history,
        "data.segments": segments,
        "model.width": width,
        "model.depth": depth,
        "model.heads": heads(width),
        **LADDER.training("hstu", width),
        "train.batch_rows": 4,  # as many targets in a step as the recipe was chosen with, at the small budget
    }
    rules = Sweep(tuple(p for name, rule in RULES.items() for p in model("hstu", family=name, **values, **rule)))
    return rules * param("train.epochs", [0.5, 1.0, 2.0, 4.0]) * param("seed", seeds)


STUDY = Study(
    name="stochastic_length",
    title="Stochastic Length",
    doc=(__doc__ or "").strip(),
    points={
        "small": _sweep(256, (48, 2), 4, [0]),
        "medium": _sweep(1024, (128, 4), 8, [0, 1]),
        "large": _sweep(4096, (512, 10), 8, [0]),
    },
    metric="ne",
    axis="train_flops",
    base={"data.candidates": 8},
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
