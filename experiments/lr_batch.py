"""Learning rates and batches: how does the best learning rate go with the rows of a batch?

    python -m experiments.lr_batch --data DATA --budget small --workers 2 --pack 7
    python -m experiments.lr_figure RUNS --out docs/mup --name lr_batch

HSTU, DirL and the Transformer of width 64, two blocks, under muP, with 8 to 64 rows in a batch and as many rows in all:
400 steps of 8 rows, 50 of 64. Otherwise as experiments/lr_transfer.py.

Small: 84 trials, about six minutes with two workers on two cores.

Expect the best rate to go with the square root of the batch (Malladi et al., 2022), a factor of 2.8 over the range,
until steps are too few.
"""

import sys

from experiments.lr_transfer import BASE, MODELS, RATES, by_rate
from experiments.study import Study
from experiments.sweep import Sweep, param

ROWS = 3200  # in all


def _grid(batches: list[int], seeds: list[int]) -> Sweep:
    points = Sweep(())
    for name in MODELS:
        for batch in batches:
            steps = {"train.batch_rows": batch, "train.steps": ROWS // batch}
            points += by_rate(name, f"{name} muP {batch}", RATES["muP"], **steps)
    return points * param("seed", seeds)


STUDY = Study(
    name="lr_batch",
    title="Learning rates across batches",
    doc=(__doc__ or "").strip(),
    points={"small": _grid([8, 16, 32, 64], [0])},
    metric="validation/ne",
    axis="learning_rate",
    base={
        **{key: value for key, value in BASE.items() if key not in ("train.steps", "train.batch_rows")},
        **{"model.width": 64, "model.heads": 1, "model.depth": 2, "model.base_width": 32},
    },
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
