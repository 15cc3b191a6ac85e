"""Learning-rate transfer: does the best learning rate of a narrow model hold for a wide one?

    python -m experiments.lr_transfer --data DATA --budget small --workers 2
    python -m experiments.lr_figure RUNS --out docs/mup

HSTU, DirL and the Transformer at widths over a 16-fold range, by the standard parametrisation and by muP, trained with
learning rates a factor of two apart. Chosen by the validation NE; the test part is not evaluated.

Small: widths 16 to 256, 240 trials of 100 steps, about 40 minutes with two workers on two cores. Medium: 32 to
512, two seeds.

Expect the best rate to fall with the width by the standard parametrisation, and to stay where it is under muP.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.study import Study
from experiments.sweep import Sweep, model, param

MODELS = ("hstu", "dirl", "transformer")
PARAMETRISATIONS = {"standard": 0, "muP": 32}  # model.base_width
# To 0.08; tables: twice that. By the standard parametrisation wide models need lower ones.
RATES = {"standard": [0.08 / 2**k for k in range(9)], "muP": [0.08 / 2**k for k in range(7)]}
BASE = {
    "model.dropout": 0.0,
    "data.history": 32,
    "data.candidates": 8,
    "data.eval_impressions": 8192,
    "train.steps": 100,
    "train.batch_rows": 16,
    "train.report_test": False,
}


def by_rate(name: str, family: str, rates: Sequence[float], **values: Any) -> Sweep:
    """A model with each of the rates, those of its tables twice as high; ``values``: dotted keys."""
    points = []
    for rate in rates:
        both = {"train.learning_rate": rate, "train.embedding_learning_rate": 2 * rate}
        (point,) = model(name, family=family, **values, **both)
        points.append(replace(point, label=f"rate={rate:g}", axis_value=rate))
    return Sweep(tuple(points))


def _grid(widths: list[int], seeds: list[int]) -> Sweep:
    points = Sweep(())
    for name in MODELS:
        for by, base in PARAMETRISATIONS.items():
            for width in widths:
                sizes = {"model.width": width, "model.heads": max(1, width // 64), "model.base_width": base}
                points += by_rate(name, f"{name} {by} {width}", RATES[by], **sizes)
    return points * param("seed", seeds)


STUDY = Study(
    name="lr_transfer",
    title="Learning rates across widths",
    doc=(__doc__ or "").strip(),
    points={"small": _grid([16, 32, 64, 128, 256], [0]), "medium": _grid([32, 64, 128, 256, 512], [0, 1])},
    metric="validation/ne",
    axis="learning_rate",
    base={**BASE, "model.depth": 2},
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
