"""Learning-rate transfer in depth: does the best learning rate of a shallow model hold for a deep one?

    python -m experiments.lr_depth --data DATA --budget small --workers 2
    python -m experiments.lr_figure RUNS --out docs/mup --name lr_depth

HSTU and the Transformer of width 64, 1 to 8 blocks, under muP with blocks that add all of what they compute and with
blocks that add 2 / depth of it (model.base_depth=2). Otherwise as experiments/lr_transfer.py.

(Models shallower than the base are left alone; the figure in docs/mup was made when one block was doubled.)

Small: 112 trials of 100 steps, about ten minutes with two workers on two cores.

Expect little of the best rate up to 8 blocks, and better deep models where blocks add their share.
"""

import sys

from experiments.lr_transfer import BASE, RATES, by_rate
from experiments.study import Study
from experiments.sweep import Sweep, param

WIDTH = 64
SHARES = {"whole": 0, "share": 2}  # model.base_depth


def _grid(depths: list[int], seeds: list[int]) -> Sweep:
    sizes = {"model.width": WIDTH, "model.heads": 1, "model.base_width": 32}
    points = Sweep(())
    for name in ("hstu", "transformer"):
        for by, base in SHARES.items():
            for depth in depths:
                values = {**sizes, "model.base_depth": base, "model.depth": depth}
                points += by_rate(name, f"{name} {by} {depth}", RATES["muP"], **values)
    return points * param("seed", seeds)


STUDY = Study(
    name="lr_depth",
    title="Learning rates across depths",
    doc=(__doc__ or "").strip(),
    points={"small": _grid([1, 2, 4, 8], [0])},
    metric="validation/ne",
    axis="learning_rate",
    base=BASE,
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
