"""Choices: what each careless choice of the published retrieval recipe costs or gains.

    python -m experiments.retrieval_choices --data DATA --budget small

HSTU by the recipe ml-1m-hstu, honest protocol, one choice changed at a time: negatives drawn once for a batch in place
of each position on its own (as many, and eight times as many); negatives drawn by popularity, without and with the logQ
correction; the full softmax; attention divided by the user's own number of events; attention that does not know when
the next event happens. That ties in time keep the order of the log is a property of the data, not of a trial: compare
`genrec recipe ml-1m-hstu` on the dataset that `python -m experiments.shuffled_ties` writes.

Small: 20 epochs, 3 seeds. Medium: the recipe's 101 epochs, 3 seeds.

Expect the full softmax and the true length to gain (a public port that has both reports HR@10 .342), popularity without
its correction to lose, and the time of the next event to be worth a good deal.
"""

import sys
from typing import Any

from experiments.recipes import read
from experiments.study import Study
from experiments.sweep import Sweep, ladder, model, param

REFERENCE = "as published"
_CHOICES: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "shared negatives": {"model.shared_negatives": True},
    "shared negatives, 1,024": {"model.shared_negatives": True, "model.negatives": 1024},
    "popular negatives": {"model.sampling": "popularity"},
    "popular negatives, logQ": {"model.sampling": "popularity", "model.logq": True},
    "full softmax": {"model.negatives": 0},
    "true length": {"model.true_length": True},
    "no next time": {"model.next_time": False},
}


def _sweep(epochs: int, seeds: list[int]) -> Sweep:
    recipe = read("ml-1m-hstu")
    shared = dict(recipe.trial_values("honest", epochs))
    rungs = {name: shared | changes for name, changes in _CHOICES.items()}
    return model(recipe.model) * ladder(rungs) * param("seed", seeds)


STUDY = Study(
    name="retrieval_choices",
    title="Choices of the published retrieval recipe",
    doc=(__doc__ or "").strip(),
    points={"small": _sweep(20, [0, 1, 2]), "medium": _sweep(101, [0, 1, 2])},
    metric="hr@10",
    axis="train_flops",
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
