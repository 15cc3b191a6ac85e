"""Data: what do more users' logs give a fixed model?

    python -m experiments.data --data DATA --budget small --workers 2

The same HSTU and DLRM train on nested shares of the users (every user of a smaller share is in the larger one). All
are evaluated on the same impressions of all users. One pass over whatever data there is.

Small: shares of 1/16 to 1, 10 trials, about a minute with two workers on two cores. Medium and large: bigger
models, two seeds.

Expect a power law in the number of training targets, steeper for HSTU.
"""

import sys

from experiments.ladders import Ladder, heads
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, model, param

_SHARES = [0.0625, 0.125, 0.25, 0.5, 1.0]


def _sweep(ladder: Ladder, hstu: tuple[int, int], dlrm: tuple[int, int], seeds: list[int]) -> Sweep:
    width, depth = hstu
    sizes = {"model.width": width, "model.depth": depth, "model.heads": heads(width)}
    blocks = model("hstu", **{**sizes, **ladder.training("hstu", width)})
    sizes = {"model.width": dlrm[0], "model.depth": dlrm[1], "model.embedding": 24}
    layers = model("dlrm", **{**sizes, **ladder.training("dlrm", dlrm[0])})
    return (blocks + layers) * param("data.fraction", _SHARES, axis=True) * param("seed", seeds)


def _study(ladder: Ladder) -> Study:
    return Study(
        name="data",
        title="Data",
        doc=(__doc__ or "").strip(),
        points={
            "small": _sweep(ladder, (48, 2), (192, 2), [0]),
            "medium": _sweep(ladder, (128, 4), (512, 3), [0, 1]),
            "large": _sweep(ladder, (512, 10), (2048, 4), [0, 1]),
        },
        metric="ne",
        axis="data",
        base=ladder.base,
        recipe=ladder.mark,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
