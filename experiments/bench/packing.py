"""Trials of the smallest rung of a ladder, differing in seed and weight decay: one after another, and as one pack.

Both are sweeps with one worker and a warm compilation cache; they take turns, so that a busy machine slows them alike.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.executors import Training
from experiments.executors.local import LocalExecutor
from experiments.ladders import LADDER
from experiments.launch import run_study
from experiments.study import Study
from experiments.sweep import param, zipped
from genrec_jax.data.sequences import Sequences as Dataset
from genrec_jax.data.synthetic import generate, preset

FAMILIES = ("dlrm", "hstu")
TRIALS = 16


def _study(family: str, first_seed: int) -> Study:
    """``TRIALS`` trials of rung s0; weight decay stands for what a search varies, for the recipe fixes the rates."""
    numbers = range(first_seed, first_seed + TRIALS)
    varied = zipped(param("seed", list(numbers)), param("train.weight_decay", [0.001 * (n + 1) for n in numbers]))
    base = {key: value for key, value in LADDER.base.items() if key != "train.weight_decay"}
    return Study("packing", "Packing", "", {"small": LADDER.rungs(family, 0, 0) * varied}, "ne", "train_flops", base)


def _sweep(study: Study, dataset: Dataset, out: Path, pack: int) -> dict[str, float]:
    """Seconds of a sweep, and those of its training loops."""
    run_study(study.trials(str(dataset.path), "small"), out, executor=LocalExecutor(1), quiet=True, how=Training(pack))
    record = json.loads((out / "launch.json").read_text(encoding="utf-8"))
    return {"wall": record["wall_seconds"], "training": record["train_seconds"]}


def run(families: Sequence[str] = FAMILIES, rounds: int = 3) -> dict[str, dict[str, float]]:
    """By family, medians of ``rounds``: seconds a trial takes alone and packed, those in its training loop, and how
    many times more trials an hour has when they are packed, by the wall-clock and by the training loops."""
    with tempfile.TemporaryDirectory() as scratch:
        dataset = generate(preset("quick"), Path(scratch) / "world", floor_requests=0)
        return {family: _measure(family, dataset, Path(scratch) / family, rounds) for family in families}


def _measure(family: str, dataset: Dataset, scratch: Path, rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        study = _study(family, turn * TRIALS)
        alone, packed = (_sweep(study, dataset, scratch / f"{turn}-{pack}", pack) for pack in (1, TRIALS))
        if turn:  # the first one compiles
            own = {"ratio": alone["wall"] / packed["wall"], "training_ratio": alone["training"] / packed["training"]}
            own |= {f"alone_{key}": value / TRIALS for key, value in alone.items()}
            own |= {f"packed_{key}": value / TRIALS for key, value in packed.items()}
            for key, value in own.items():
                found.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in found.items()}
