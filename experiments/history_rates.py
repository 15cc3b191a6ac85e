"""Rates of histories: does a longer history lose only because its learning rate is another's?

    python -m experiments.history_rates --data DATA --budget small --workers 2 --pack 5

`history_vs_depth` trains all histories with the recipe's rate, which was found at one of them. If a longer view wants
another rate, the law takes the wrong rate for the effect of history. So some of its histories are trained with 1/4,
1/2, 1, 2 and 4 times the rate (the tables' with it) and held against each other on the validation part; the test part
is not evaluated.

Small: 4 blocks, 32 to 256 events, 20 trials. Medium and large go on from there.

Expect the best rate to stay within one step, because a step has as many targets whatever the history.
"""

import sys

from experiments.history_vs_depth import views
from experiments.ladders import Ladder
from experiments.rate_check import at_factors, verdict
from experiments.study import Study, on_ladder
from experiments.sweep import Sweep, param


def _sweep(ladder: Ladder, width: int, depth: int, lengths: list[int]) -> Sweep:
    return at_factors(views(ladder, width, lengths) * param("model.depth", [depth]))


def _study(ladder: Ladder) -> Study:
    return Study(
        name="history_rates",
        title="Learning rates of histories",
        doc=(__doc__ or "").strip(),
        points={
            "small": _sweep(ladder, 48, 4, [32, 64, 128, 256]),
            "medium": _sweep(ladder, 96, 8, [32, 128, 512]),
            "large": _sweep(ladder, 512, 16, [128, 1024, 4096]),
        },
        metric="validation/ne",
        axis="learning_rate_factor",
        base={
            **{key: value for key, value in ladder.base.items() if key != "data.history"},
            "train.report_test": False,
        },
        conclude=verdict,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
