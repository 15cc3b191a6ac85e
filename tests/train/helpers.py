"""Small trials and their records."""

import json
from pathlib import Path
from typing import Any

from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.sequences import Sequences

SETTINGS = {
    "data.history": 8,
    "data.candidates": 2,
    "train.batch_rows": 8,
    "train.steps": 12,
    "train.log_every": 2,
    "train.checkpoint_every": 5,
    "train.checkpoint_seconds": 0.0,
}


def trial_of(sequences: Sequences, model: str = "dlrm", **settings: object) -> Trial:
    small = {"model.width": 8, "model.depth": 1}
    return override(default_trial(model, path=str(sequences.path)), {**SETTINGS, **small, **settings})


class Stopped(Exception):
    """Stands in for a kill."""


TIMING = {"train_seconds", "compile_seconds", "wall_seconds", "examples_per_second", "achieved_flops", "mfu"}


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMING}


def lines(run: Path) -> list[dict[str, Any]]:
    return [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
