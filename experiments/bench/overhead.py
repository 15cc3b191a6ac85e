"""What a sweep costs beside its training loops: start-up, initialisation, evaluation, checkpoints, table."""

import json
import tempfile
from pathlib import Path

from experiments.executors.local import LocalExecutor
from experiments.launch import run_study
from experiments.study import Study
from experiments.sweep import model, param
from genrec_jax.data.synthetic import generate, preset

_TRIALS = 12


def _study(seeds: list[int]) -> Study:
    """Trials that differ by seed alone, so that one of them warms the compilation cache for all."""
    sizes = {"model.width": 192, "model.depth": 3, "model.embedding": 24, "train.epochs": 6.0}
    return Study(
        name="overhead",
        title="Sweep overhead",
        doc="",
        points={"small": model("dlrm", **sizes) * param("seed", seeds)},
        metric="ne",
        axis="train_flops",
        base={"data.eval_impressions": 8192},
    )


def run() -> dict[str, float]:
    """Wall-clock of a 12-trial sweep with one worker, its training seconds, and the overhead as a share of them."""
    with tempfile.TemporaryDirectory() as scratch:
        sequences = generate(preset("quick"), Path(scratch) / "world", floor_requests=0)
        for name, seeds in (("warming", [_TRIALS]), ("measured", list(range(_TRIALS)))):
            out = Path(scratch) / name
            run_study(_study(seeds).trials(str(sequences.path), "small"), out, executor=LocalExecutor(1), quiet=True)
        record = json.loads((out / "launch.json").read_text(encoding="utf-8"))
    wall, training = record["wall_seconds"], record["train_seconds"]
    return {"wall_seconds": wall, "train_seconds": training, "overhead": (wall - training) / training}
