"""GR against DLRM: what does ten times the compute buy, and with which architecture?

    python -m experiments.gr_vs_dlrm --data DATA --budget small --workers 2

Five families climb the same ladder of training compute: HSTU (generative, interleaved item and action tokens), DirL
(one sequence of context, history and candidates, MMoE head), a softmax Transformer on DirL's layout (the control),
DLRM and DCN-v2. Every family sees the same users, features and N = 64 past events, and is evaluated on the same
held-out impressions: after a global time split, or of held-out users where the ladder says so.

Small: seven sizes per family over 2.6 decades (2e10 to 8e12 FLOPs on MovieLens-1M), two seeds, 70 trials; 20 to 60
minutes with two workers on two cores. Medium: one size more, 3.3 decades, one seed of it, an hour more; what the small
budget's laws make of it can be recorded before it runs (--forecast). Large: the upper rungs, for accelerators.

`--ladder growing` has eight rungs with all families at the same FLOPs, for logs of about 8 million events; `world` is
the same with the rates of a synthetic world, `globo` for clicks on news.

Expect the classical rankers ahead at small compute, where their numeric features do the work that a sequence model has
yet to learn, and almost flat from there on; the sequence models go on gaining and catch up at the top.
"""

import sys

from experiments.ladders import Ladder
from experiments.study import Budget, Study, on_ladder
from experiments.sweep import Sweep, param

# (first rung, last rung, seeds) of each budget.
_BUDGETS: dict[Budget, list[tuple[int, int, list[int]]]] = {
    "small": [(0, 6, [0, 1])],
    "medium": [(0, 6, [0, 1]), (7, 7, [0])],
    "large": [(0, 8, [0, 1]), (9, 10, [0])],
}


def _study(ladder: Ladder) -> Study:
    """Of a ladder that ends below a budget's last rung, without that budget."""
    top = min(len(rungs) for rungs in ladder.sizes.values()) - 1
    points: dict[Budget, Sweep] = {}
    for budget, parts in _BUDGETS.items():
        if max(last for _, last, _ in parts) <= top:
            every = [
                ladder.rungs(family, first, last) * param("seed", seeds)
                for first, last, seeds in parts
                for family in ladder.sizes
            ]
            points[budget] = sum(every, Sweep(()))
    return Study(
        name="gr_vs_dlrm",
        title="Generative recommenders against DLRM",
        doc=(__doc__ or "").strip(),
        points=points,
        metric="ne",
        axis="train_flops",
        base=ladder.base,
        recipe=ladder.mark,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
