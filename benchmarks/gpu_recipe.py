"""Trains a published recipe from end to end, evaluation after every epoch included."""

import pathlib
import tempfile
from typing import Any

from benchmarks.gpu_cases import Job


def train_recipe(job: Job) -> dict[str, Any]:
    """Seconds of the whole training by the original protocol, from reading the data to the last evaluation.

    ``job.case``: the recipe. ``job.data``: a dataset folder, as `genrec data import` writes it. ``seconds`` is without
    the compilation of the training step, that of the evaluation is in it.
    """
    from experiments.recipes import read
    from genrec_jax.data.sequences import load
    from genrec_jax.train.loop import train

    recipe, sequences = read(job.case), load(job.data)
    epoch = -(-sequences.users // recipe.values["train.batch_rows"])
    # One checkpoint, after the last step: it is training that is timed.
    place = {"train.log_every": epoch, "train.checkpoint_every": 1000 * epoch}
    place |= {"data.path": str(sequences.path), "data.digest": sequences.digest}
    trial = recipe.trial("original", 0, 2 if job.quick else None, **place)
    with tempfile.TemporaryDirectory() as folder:
        result = train(trial, pathlib.Path(folder))
    seconds = result["wall_seconds"] - result["compile_seconds"]
    quality = {name: value for name, value in result.items() if name.startswith(("hr@", "ndcg@", "mrr"))}
    kept = ("status", "steps", "train_seconds", "compile_seconds", "wall_seconds", "dataset")
    return {
        **{f"trial_{name}": result[name] for name in kept},
        **quality,
        "users": sequences.users,
        "items": sequences.schema.items - 1,
        "epochs": trial.train.epochs,
        "seconds": seconds,
        "passed": result["status"] == "done",
        "note": f"{trial.train.epochs:g} epochs in {seconds:.1f} s ({result['train_seconds']:.1f} s of steps), "
        f"HR@10 {quality['hr@10']:.4f}, NDCG@10 {quality['ndcg@10']:.4f}",
    }
