"""Generative training: what is one encoding of a user's history worth as training data?

    python -m experiments.generative --data DATA --budget small --workers 2

The same HSTU, by the same number of rows of the same shape and so at equal FLOPs, trained on four cuts of the log
(arXiv 2402.17152, section 2.3), with one candidate per request:

- windows: disjoint windows of N + 1 events; one encoding supervises all its actions, every event once per pass;
- prefixes 1/n: an impression with the history before it, all of whose actions are supervised; of a user's n such rows a
  pass takes one at random, which is the paper's sampling of users at rate 1/n;
- impressions: an impression with the history before it, of which only the impression is supervised: n rows per user;
- impressions 1/n: the same, one of a user's rows per pass.

With whole histories a pass over impressions costs n encodings of up to n tokens per user, O(n^3); the others cost one,
O(n^2). Every cut has its own learning rate, chosen on the validation part (experiments/generative_tuning.py).

Small: 64 events, five sizes of the budget, 20 trials, about half an hour with two workers on two cores. Medium: 256
events, two seeds. Large: 1024.

Expect windows far ahead of impressions at equal FLOPs, and prefixes between: they supervise old events more often than
new ones.
"""

import sys
from typing import Any

from experiments.ladders import heads
from experiments.study import Study
from experiments.sweep import Sweep, model, param

CUTS: dict[str, dict[str, Any]] = {
    "windows": {"model.rows": "windows"},
    "prefixes 1/n": {"model.rows": "prefixes", "data.rows_per_user": 1},
    "impressions": {"model.rows": "requests"},
    "impressions 1/n": {"model.rows": "requests", "data.rows_per_user": 1},
}
# At width 32 and below; it falls with the power 1.5 of the width, as in experiments/ladders.
RATES = {"windows": 0.027, "prefixes 1/n": 0.027, "impressions": 0.009, "impressions 1/n": 0.027}
SMALL = (48, 2)
BASE = {"data.candidates": 1, "data.eval_impressions": 16384, "train.batch_rows": 16, "model.dropout": 0.0}


def cut(name: str, history: int, size: tuple[int, int], rate: float) -> Sweep:
    """HSTU of a (width, depth) on one cut of the log; ``rate``: as in RATES."""
    width, depth = size
    scaled = float(f"{rate * (32 / max(width, 32)) ** 1.5:.3g}")
    values = {
        "data.history": history,
        "model.width": width,
        "model.depth": depth,
        "model.heads": heads(width),
        "train.learning_rate": scaled,
        "train.embedding_learning_rate": 2 * scaled,
        **CUTS[name],
    }
    return model("hstu", family=name, **values)


def _sweep(history: int, size: tuple[int, int], steps: list[int], seeds: list[int]) -> Sweep:
    cuts = Sweep(tuple(point for name, rate in RATES.items() for point in cut(name, history, size, rate)))
    return cuts * param("train.steps", steps) * param("seed", seeds)


STUDY = Study(
    name="generative",
    title="Generative against impression-level training",
    doc=(__doc__ or "").strip(),
    points={
        "small": _sweep(64, SMALL, [250, 500, 1000, 2000, 4000], [0]),
        "medium": _sweep(256, (128, 4), [1000, 2000, 4000, 8000, 16000], [0, 1]),
        "large": _sweep(1024, (512, 10), [2000, 4000, 8000, 16000, 32000], [0]),
    },
    metric="ne",
    axis="train_flops",
    base=BASE,
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
