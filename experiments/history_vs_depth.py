"""History against depth: should the next FLOPs look further back, or think more about what is seen?

    python -m experiments.history_vs_depth --data DATA --budget small --workers 2

HSTU of one width, its depth, its history and its data varied apart: every depth with every number N of events in view,
each on all users and on shares of them, at equal targets a step. So the law

    NE = E + A P^-alpha + B D^-beta + G N^-gamma

can tell its terms apart (P dense parameters, D targets, N events), and says how a budget is spent best. All trials are
evaluated on the same impressions, whatever N.

Small: depths 1 to 8, 16 to 256 events, 1/4 to all of the users, 60 trials; medium and large go on from there.

Expect history to pay more than depth as long as it is shorter than most users' logs, because a longer one costs only
its attention; and data more than both.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import scaling
from experiments.ladders import Ladder, heads
from experiments.study import Study, on_ladder
from experiments.sweep import Point, Sweep, model, param, zipped
from genrec_jax.train.mirror import brought
from genrec_jax.train.places import Place

_SHARES = [0.25, 0.5, 1.0]


def views(ladder: Ladder, width: int, lengths: list[int]) -> Sweep:
    """HSTU of a width with each number of events in view. A step has about as many targets whatever the history, as
    many as the recipe's at 64 events."""
    recipe = ladder.training("hstu", width)
    candidates = ladder.base["data.candidates"]
    targets = recipe.pop("train.batch_rows") * (ladder.base["data.history"] + candidates)
    rows = [max(1, round(targets / (length + candidates))) for length in lengths]
    held = Sweep(tuple(Point(values={"train.batch_rows": n}) for n in rows))
    hstu = model("hstu", **{"model.width": width, "model.heads": heads(width), **recipe})
    return hstu * zipped(param("data.history", lengths), held)


def _sweep(ladder: Ladder, width: int, depths: list[int], lengths: list[int], seeds: list[int]) -> Sweep:
    grid = param("model.depth", depths) * views(ladder, width, lengths)
    return grid * param("data.fraction", _SHARES) * param("seed", seeds)


def spent_best(out: Place, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the law in parameters, targets and events spends the least, the middle and ten times the most FLOPs of the
    trials; nothing where it is not told."""
    flops = sorted(row["train_flops"] for row in rows if row["status"] == "done")
    if not flops:
        return []
    budgets = flops[0], (flops[0] * flops[-1]) ** 0.5, 10 * flops[-1]
    with brought(out) as here:
        found = scaling.recommend([here], budgets)
    return [
        f"{advice.family} with {budget:.2g} FLOPs: {_advised(advice)}."
        for budget, advised in zip(budgets, found, strict=True)
        for advice in advised
        if {"dense_params", "targets", "history"} <= advice.sizes.keys()
    ]


def _advised(advice: scaling.Advice) -> str:
    names = {"dense_params": "dense parameters", "targets": "targets", "history": "events in view"}
    parts = []
    for column, name in names.items():
        value, limits = advice.sizes[column]
        known = f" ({limits[0]:.2g} to {limits[1]:.2g})" if limits else ""
        parts.append(f"{value:.2g} {name}{known}")
    limits = advice.interval
    expected = f"{advice.metric:.4f}" + (f" ({limits[0]:.4f} to {limits[1]:.4f} for one run)" if limits else "")
    why = "".join(f" ({warning.text})" for warning in advice.warnings if warning.code == "no_optimum")
    return f"{', '.join(parts)}; expected NE {expected}; by {advice.law}{why}"


def _study(ladder: Ladder) -> Study:
    return Study(
        name="history_vs_depth",
        title="History against depth",
        doc=(__doc__ or "").strip(),
        points={
            "small": _sweep(ladder, 48, [1, 2, 4, 8], [16, 32, 64, 128, 256], [0]),
            "medium": _sweep(ladder, 96, [2, 4, 8, 16], [32, 64, 128, 256, 512], [0, 1]),
            "large": _sweep(ladder, 512, [4, 8, 16, 32], [128, 512, 2048, 4096], [0, 1]),
        },
        metric="ne",
        axis="train_flops",
        base={key: value for key, value in ladder.base.items() if key != "data.history"},
        recipe=ladder.mark,
        conclude=spent_best,
    )


STUDY = on_ladder(_study)

if __name__ == "__main__":
    from experiments.cli import main

    main(["sweep", STUDY.name, *sys.argv[1:]])
