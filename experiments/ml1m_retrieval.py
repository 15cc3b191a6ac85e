"""Retrieval: next-item prediction with HSTU over the full corpus, by model size.

    python -m experiments.ml1m_retrieval --data DATA --budget small --workers 2

Leave-last-out: each user's last event is the test target, the one before it the validation target; in training, each of
the last 200 events before these predicts the next. Sampled softmax with 128 uniform negatives, temperature 0.05,
L2-normalised items and states. The target is ranked among all items that are not in the visible history: HR@k, NDCG@k,
MRR.

Small: three sizes, 5 passes with up to four users packed in a row of 200 events; about ten minutes with two workers on
two cores, far from converged. Medium: the published sizes (2 blocks with 1 head, 8 blocks with 2 heads, width 50), 101
passes. Large: wider.

Expect HR@10 near 0.2 after the small budget; the published values after 101 passes are 0.31 and 0.33.
"""

import sys

from experiments.study import Study
from experiments.sweep import Sweep, ladder, model, param


def _sweep(sizes: dict[str, tuple[int, int, int]], epochs: float, seeds: list[int]) -> Sweep:
    keys = ("model.width", "model.depth", "model.heads")
    rungs = {name: dict(zip(keys, size, strict=True)) for name, size in sizes.items()}
    return model("hstu_retrieval", **{"train.epochs": epochs}) * ladder(rungs) * param("seed", seeds)


_PUBLISHED = {"base": (50, 2, 1), "large": (50, 8, 2)}

STUDY = Study(
    name="ml1m_retrieval",
    title="Next-item retrieval with HSTU",
    doc=(__doc__ or "").strip(),
    points={
        "small": _sweep({"tiny": (24, 1, 1), "small": (50, 1, 1), "base": _PUBLISHED["base"]}, 5.0, [0]),
        "medium": _sweep(_PUBLISHED, 101.0, [0, 1]),
        "large": _sweep({**_PUBLISHED, "wide": (256, 8, 4)}, 101.0, [0, 1]),
    },
    metric="hr@10",
    axis="train_flops",
    base={
        "data.history": 200,
        "data.candidates": 1,
        "data.segments": 4,
        "train.batch_rows": 64,
        "train.weight_decay": 0.0,
        "train.warmup": 0.02,
    },
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
