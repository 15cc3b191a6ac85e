"""Depth: what do more layers give at a fixed width?

    python -m experiments.depth --data DATA --budget small --workers 2

HSTU blocks (width 48) against layers of DLRM's top MLP (width 192), everything else fixed, one pass over the data.

Small: 1 to 8 layers, 8 trials, about three minutes with two workers on two cores. Medium: up to 16 layers at width 128,
two seeds. Large: up to 32 at width 512.

Expect HSTU to gain from the second block and little after it at this budget, and DLRM to gain nothing.
"""

import sys

from experiments.ladders import Ladder, heads
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, model, param


def _sweep(ladder: Ladder, depths: list[int], hstu: int, dlrm: int, seeds: list[int]) -> Sweep:
    sizes = {"model.width": hstu, "model.heads": heads(hstu)}
    blocks = model("hstu", **{**sizes, **ladder.training("hstu", hstu)})
    layers = model("dlrm", **{"model.width": dlrm, "model.embedding": 24, **ladder.training("dlrm", dlrm)})
    return (blocks + layers) * param("model.depth", depths, axis=True) * param("seed", seeds)


def _study(ladder: Ladder) -> Study:
    return Study(
        name="depth",
        title="Depth",
        doc=(__doc__ or "").strip(),
        points={
            "small": _sweep(ladder, [1, 2, 4, 8], 48, 192, [0]),
            "medium": _sweep(ladder, [1, 2, 4, 8, 16], 128, 512, [0, 1]),
            "large": _sweep(ladder, [2, 4, 8, 16, 32], 512, 2048, [0, 1]),
        },
        metric="ne",
        axis="depth",
        base=ladder.base,
        recipe=ladder.mark,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
