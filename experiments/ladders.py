"""The frozen ladders of the comparison studies: eleven rungs per family.

A rung is named s0, s1, ... On MovieLens-1M s0 costs about 2e10 training FLOPs; up to s4 each rung is about 2.1 times
the last, from there 4.5 times: 2e10 to 8e12 for s0 to s6, the small budget (seven sizes, because a law with three
parameters cannot be told from one with two by fewer), and 3e15 for s10. Each family trains by its own recipe
(RECIPES), chosen by the same grid on the validation part alone (experiments/tuning.py). The lower
rungs of the families that pay for the whole history at every request (DirL, Transformer) see part of an epoch: at their
compute, more targets would have to be paid for with less model. All train on rows of N = 64 events, K = 8 candidates.
"""

from dataclasses import dataclass
from typing import Any

from experiments.sweep import Sweep, ladder, model

BASE: dict[str, Any] = {"data.history": 64, "data.candidates": 8}


@dataclass(frozen=True)
class Recipe:
    """How a family trains at every size.

    learning_rate: at width 32 and below; above, it falls with the width to the given power. Tables: twice that.
    batch_rows: per step. A window row carries up to 72 targets, a request row up to 8.
    """

    learning_rate: float
    power: float
    dropout: float
    batch_rows: int


RECIPES = {
    "hstu": Recipe(0.027, 1.5, 0.0, 16),
    "dirl": Recipe(0.009, 1.5, 0.0, 32),
    "transformer": Recipe(0.009, 1.5, 0.0, 32),
    "dlrm": Recipe(0.027, 0.5, 0.0, 32),
    "dcn": Recipe(0.027, 0.5, 0.0, 32),
    "din": Recipe(0.027, 0.5, 0.0, 32),  # not tuned: as its neighbours
}


def training(recipe: Recipe, width: int) -> dict[str, Any]:
    """The keys a recipe sets at a width; the learning rate is rounded so that configurations read well."""
    dense = float(f"{recipe.learning_rate * (32 / max(width, 32)) ** recipe.power:.3g}")
    return {
        "train.learning_rate": dense,
        "train.embedding_learning_rate": 2 * dense,
        "train.batch_rows": recipe.batch_rows,
        "model.dropout": recipe.dropout,
    }


def heads(width: int) -> int:
    """Heads about 64 wide, never narrower than 32: pointwise attention learns poorly with narrow ones."""
    return next(n for n in range(max(1, round(width / 64)), 0, -1) if width % n == 0)


def _sequence(width: int, depth: int, epochs: float) -> dict[str, Any]:
    return {"model.width": width, "model.depth": depth, "model.heads": heads(width), "train.epochs": epochs}


def _pointwise(width: int, depth: int, embedding: int, **more: Any) -> dict[str, Any]:
    sizes = {"model.width": width, "model.depth": depth, "model.embedding": embedding}
    return {**sizes, **{f"model.{key}": value for key, value in more.items()}, "train.epochs": 1.0}


RUNGS: dict[str, list[dict[str, Any]]] = {
    "hstu": [
        _sequence(16, 1, 0.5),
        _sequence(16, 1, 1.0),
        _sequence(32, 1, 1.0),
        _sequence(32, 2, 1.0),
        _sequence(48, 2, 1.0),
        _sequence(96, 3, 1.0),
        _sequence(160, 5, 1.0),
        _sequence(256, 9, 1.0),
        _sequence(512, 10, 1.0),
        _sequence(768, 20, 1.0),
        _sequence(1280, 32, 1.0),
    ],
    "dirl": [
        _sequence(16, 1, 0.15),
        _sequence(16, 1, 0.33),
        _sequence(24, 1, 0.4),
        _sequence(32, 1, 0.55),
        _sequence(32, 2, 0.6),
        _sequence(64, 2, 0.75),
        _sequence(96, 3, 1.0),
        _sequence(192, 4, 1.0),
        _sequence(320, 6, 1.0),
        _sequence(512, 10, 1.0),
        _sequence(1024, 12, 1.0),
    ],
    "transformer": [
        _sequence(16, 1, 0.1),
        _sequence(16, 1, 0.2),
        _sequence(16, 1, 0.45),
        _sequence(32, 1, 0.3),
        _sequence(32, 1, 0.6),
        _sequence(48, 2, 0.65),
        _sequence(64, 3, 1.0),
        _sequence(128, 3, 1.0),
        _sequence(192, 6, 1.0),
        _sequence(384, 8, 1.0),
        _sequence(768, 10, 1.0),
    ],
    "dlrm": [
        _pointwise(48, 1, 8),
        _pointwise(80, 1, 12),
        _pointwise(112, 2, 12),
        _pointwise(160, 2, 20),
        _pointwise(192, 3, 24),
        _pointwise(384, 3, 48),
        _pointwise(768, 4, 64),
        _pointwise(1536, 5, 96),
        _pointwise(3072, 6, 128),
        _pointwise(6144, 6, 160),
        _pointwise(12288, 6, 192),
    ],
    "dcn": [
        _pointwise(32, 1, 4, cross=1),
        _pointwise(64, 1, 6, cross=1),
        _pointwise(64, 2, 8, cross=2),
        _pointwise(96, 2, 12, cross=2),
        _pointwise(160, 2, 16, cross=2),
        _pointwise(320, 3, 24, cross=3),
        _pointwise(640, 4, 48, cross=3),
        _pointwise(1536, 4, 96, cross=3),
        _pointwise(3072, 5, 160, cross=4),
        _pointwise(6144, 6, 256, cross=4),
        _pointwise(12288, 6, 512, cross=4),
    ],
}


def rungs(family: str, first: int, last: int, recipe: Recipe | None = None) -> Sweep:
    """Rungs s``first`` to s``last`` of a family, both included, trained by its recipe or by another."""
    found = recipe or RECIPES[family]
    sizes = {f"s{k}": RUNGS[family][k] for k in range(first, last + 1)}
    chosen = {name: {**values, **training(found, values["model.width"])} for name, values in sizes.items()}
    return model(family) * ladder(chosen)
