"""Quickstart: a small comparison of HSTU, DirL and DLRM that ends in a report.

    make quickstart

The first rungs of the comparison study on a synthetic world of 500 thousand events, where the best possible NE is
known: 18 trials, about three minutes with two workers on two cores. The page draws the Bayes NE beside the curves.

Expect DLRM ahead throughout, and nobody near the Bayes NE: that takes more data and compute.
"""

import sys

from experiments.ladders import Ladder
from experiments.study import Study, on_ladder
from experiments.sweep import param


def _study(ladder: Ladder) -> Study:
    families = ladder.rungs("hstu", 0, 5) + ladder.rungs("dirl", 0, 5) + ladder.rungs("dlrm", 0, 5)
    return Study(
        name="quickstart",
        title="Quickstart: generative recommenders against DLRM on a synthetic world",
        doc=(__doc__ or "").strip(),
        points={"small": families * param("seed", [0])},
        metric="ne",
        axis="train_flops",
        base=ladder.base,
        recipe=ladder.mark,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
