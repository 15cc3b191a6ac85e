"""Quickstart: a small comparison of HSTU, DirL and DLRM that ends in a report.

    make quickstart

The first rungs of the comparison study on a synthetic world of 500 thousand events, where the best possible NE is
known: 18 trials, about three minutes with two workers on two cores. The page draws the Bayes NE beside the curves.

Expect DLRM ahead throughout, and nobody near the Bayes NE: that takes more data and compute.
"""

import sys

from experiments.ladders import LADDER
from experiments.study import Study
from experiments.sweep import param

_FAMILIES = LADDER.rungs("hstu", 0, 5) + LADDER.rungs("dirl", 0, 5) + LADDER.rungs("dlrm", 0, 5)

STUDY = Study(
    name="quickstart",
    title="Quickstart: generative recommenders against DLRM on a synthetic world",
    doc=(__doc__ or "").strip(),
    points={"small": _FAMILIES * param("seed", [0])},
    metric="ne",
    axis="train_flops",
    base=LADDER.base,
    recipe=LADDER.mark,
)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
