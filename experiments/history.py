"""History: what does looking further back give?

    python -m experiments.history --data DATA --budget small --workers 2

HSTU and DLRM (and, from the medium budget on, DIN) of one size each, with the last N events of a user in view. All
are evaluated on the same impressions, whatever N. On a synthetic world the page draws the Bayes NE of every N.

Small: N from 8 to 128, 10 trials, about two minutes with two workers on two cores. Medium: 16 to 512, two seeds.
Large: 64 to 4096.

Expect both to gain up to 128 events on MovieLens-1M; on a synthetic world up to where its Bayes NE stops to fall.
"""

import sys

from experiments.ladders import Ladder, heads
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, model, param


def _sweep(
    ladder: Ladder,
    lengths: list[int],
    hstu: tuple[int, int],
    dlrm: tuple[int, int],
    pooling: list[str],
    seeds: list[int],
) -> Sweep:
    width, depth = hstu
    sizes = {"model.width": width, "model.depth": depth, "model.heads": heads(width)}
    blocks = model("hstu", **{**sizes, **ladder.training("hstu", width)})
    sizes = {"model.width": dlrm[0], "model.depth": dlrm[1], "model.embedding": 24}
    for name in pooling:
        blocks += model(name, **{**sizes, **ladder.training(name, dlrm[0])})
    return blocks * param("data.history", lengths, axis=True) * param("seed", seeds)


def _study(ladder: Ladder) -> Study:
    return Study(
        name="history",
        title="History length",
        doc=(__doc__ or "").strip(),
        points={
            "small": _sweep(ladder, [8, 16, 32, 64, 128], (48, 2), (128, 2), ["dlrm"], [0]),
            "medium": _sweep(ladder, [16, 32, 64, 128, 256, 512], (128, 4), (512, 3), ["dlrm", "din"], [0, 1]),
            "large": _sweep(ladder, [64, 256, 1024, 4096], (512, 10), (2048, 4), ["dlrm", "din"], [0, 1]),
        },
        metric="ne",
        axis="history",
        base={key: value for key, value in ladder.base.items() if key != "data.history"},
        recipe=ladder.mark,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
