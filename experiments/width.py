"""Width: what do wider layers give at a fixed depth?

    python -m experiments.width --data DATA --budget small --workers 2

Two HSTU blocks against DLRM with two layers in its top MLP; DLRM's MLP is four times as wide, which makes the
families' parameters comparable. The learning rate follows the frozen rule (falls with the square root of the width).

Small: widths 16 to 128, 8 trials, about five minutes with two workers on two cores. Medium: 32 to 512, two seeds.
Large: 128 to 1024.

Expect both to gain from width with diminishing returns on MovieLens-1M, HSTU further.
"""

import sys

from experiments.ladders import BASE, heads, rates
from experiments.study import Study
from experiments.sweep import Sweep, model, param, zipped


def _sweep(widths: list[int], seeds: list[int]) -> Sweep:
    def axis(scale: int) -> Sweep:
        swept = param("model.width", [scale * width for width in widths], axis=True)
        rules = [param(key, [rates(scale * width)[key] for width in widths]) for key in rates(widths[0])]
        return zipped(swept, *rules)

    number = param("model.heads", [heads(width) for width in widths])
    blocks = model("hstu", **{"model.depth": 2, "train.batch_rows": 16}) * zipped(axis(1), number)
    layers = model("dlrm", **{"model.depth": 2, "model.embedding": 24, "train.batch_rows": 32}) * axis(4)
    return (blocks + layers) * param("seed", seeds)


STUDY = Study(
    name="width",
    title="Width",
    doc=(__doc__ or "").strip(),
    points={
        "small": _sweep([16, 32, 64, 128], [0]),
        "medium": _sweep([32, 64, 128, 256, 512], [0, 1]),
        "large": _sweep([128, 256, 512, 1024], [0, 1]),
    },
    metric="ne",
    axis="width",
    base=BASE,
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
