"""The frozen ladders of the comparison studies: eleven rungs per family.

A rung is named s0, s1, ... On MovieLens-1M s0 costs about 2e10 training FLOPs; up to s4 each rung is about 2.1 times
the last, from there 4.5 times: 2e10 to 8e12 for s0 to s6, the small budget (seven sizes, because a law with three
parameters cannot be told from one with two by fewer), and 3e15 for s10. The rule of the learning rate is one for all
families: 3e-3 at width 32 and below, falling with the square root of the width above (tables: twice that). The lower
rungs of the families that pay for the whole history at every request (DirL, Transformer) see part of an epoch: at their
compute, more targets would have to be paid for with less model. All train on rows of N = 64 events, K = 8 candidates.
"""

import math
from typing import Any

from experiments.sweep import Sweep, ladder, model

BASE: dict[str, Any] = {"data.history": 64, "data.candidates": 8}


def rates(width: int) -> dict[str, float]:
    """The frozen rule of learning rates, rounded so that configurations read well."""
    dense = round(3e-3 * math.sqrt(32 / max(width, 32)), 6)
    return {"train.learning_rate": dense, "train.embedding_learning_rate": 2 * dense}


def heads(width: int) -> int:
    """Heads about 64 wide, never narrower than 32: pointwise attention learns poorly with narrow ones."""
    return next(n for n in range(max(1, round(width / 64)), 0, -1) if width % n == 0)


def _sequence(width: int, depth: int, epochs: float, batch_rows: int) -> dict[str, Any]:
    sizes = {"model.width": width, "model.depth": depth, "model.heads": heads(width)}
    return {**sizes, "train.epochs": epochs, "train.batch_rows": batch_rows, **rates(width)}


def _pointwise(width: int, depth: int, embedding: int, **more: Any) -> dict[str, Any]:
    sizes = {"model.width": width, "model.depth": depth, "model.embedding": embedding}
    sizes |= {f"model.{key}": value for key, value in more.items()}
    return {**sizes, "train.epochs": 1.0, "train.batch_rows": 32, **rates(width)}


RUNGS: dict[str, list[dict[str, Any]]] = {
    # A window row carries up to 72 targets, a request row up to 8: 16 windows are a step like 32 requests are.
    "hstu": [
        _sequence(16, 1, 0.5, 16),
        _sequence(16, 1, 1.0, 16),
        _sequence(32, 1, 1.0, 16),
        _sequence(32, 2, 1.0, 16),
        _sequence(48, 2, 1.0, 16),
        _sequence(96, 3, 1.0, 16),
        _sequence(160, 5, 1.0, 16),
        _sequence(256, 9, 1.0, 16),
        _sequence(512, 10, 1.0, 16),
        _sequence(768, 20, 1.0, 16),
        _sequence(1280, 32, 1.0, 16),
    ],
    "dirl": [
        _sequence(16, 1, 0.15, 32),
        _sequence(16, 1, 0.33, 32),
        _sequence(24, 1, 0.4, 32),
        _sequence(32, 1, 0.55, 32),
        _sequence(32, 2, 0.6, 32),
        _sequence(64, 2, 0.75, 32),
        _sequence(96, 3, 1.0, 32),
        _sequence(192, 4, 1.0, 32),
        _sequence(320, 6, 1.0, 32),
        _sequence(512, 10, 1.0, 32),
        _sequence(1024, 12, 1.0, 32),
    ],
    "transformer": [
        _sequence(16, 1, 0.1, 32),
        _sequence(16, 1, 0.2, 32),
        _sequence(16, 1, 0.45, 32),
        _sequence(32, 1, 0.3, 32),
        _sequence(32, 1, 0.6, 32),
        _sequence(48, 2, 0.65, 32),
        _sequence(64, 3, 1.0, 32),
        _sequence(128, 3, 1.0, 32),
        _sequence(192, 6, 1.0, 32),
        _sequence(384, 8, 1.0, 32),
        _sequence(768, 10, 1.0, 32),
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


def rungs(family: str, first: int, last: int) -> Sweep:
    """Rungs s``first`` to s``last`` of a family, both included."""
    chosen = {f"s{k}": RUNGS[family][k] for k in range(first, last + 1)}
    return model(family) * ladder(chosen)
