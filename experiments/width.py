"""Width: what do wider layers give at a fixed depth?

    python -m experiments.width --data DATA --budget small --workers 2

Two HSTU blocks against DLRM with two layers in its top MLP; DLRM's MLP is four times as wide, which makes the
families' parameters comparable. The learning rate follows each family's recipe (falls with the square root of the
width).

Small: widths 16 to 128, 8 trials, about two minutes with two workers on two cores. Medium: 32 to 512, two seeds.
Large: 128 to 1024.

Expect HSTU to gain with diminishing returns, and DLRM little.
"""

import sys

from experiments.ladders import Ladder, heads
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, model, param, zipped


def _sweep(ladder: Ladder, widths: list[int], seeds: list[int]) -> Sweep:
    def axis(family: str, scale: int) -> Sweep:
        swept = param("model.width", [scale * width for width in widths], axis=True)
        rules = [ladder.training(family, scale * width) for width in widths]
        return zipped(swept, *(param(key, [rule[key] for rule in rules]) for key in rules[0]))

    number = param("model.heads", [heads(width) for width in widths])
    blocks = model("hstu", **{"model.depth": 2}) * zipped(axis("hstu", 1), number)
    layers = model("dlrm", **{"model.depth": 2, "model.embedding": 24}) * axis("dlrm", 4)
    return (blocks + layers) * param("seed", seeds)


def _study(ladder: Ladder) -> Study:
    return Study(
        name="width",
        title="Width",
        doc=(__doc__ or "").strip(),
        points={
            "small": _sweep(ladder, [16, 32, 64, 128], [0]),
            "medium": _sweep(ladder, [32, 64, 128, 256, 512], [0, 1]),
            "large": _sweep(ladder, [128, 256, 512, 1024], [0, 1]),
        },
        metric="ne",
        axis="width",
        base=ladder.base,
        recipe=ladder.mark,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
