"""``genrec compare``: trained trials held against the first of them on the same impressions, with paired intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from experiments.folder import read_record, read_result
from genrec_jax.config import Trial, trial_from_json
from genrec_jax.data.sequences import digest_of
from genrec_jax.errors import UserError
from genrec_jax.metrics import clustered_error
from genrec_jax.train.evaluate import Evaluator
from genrec_jax.train.loop import restored


@dataclass(frozen=True)
class Compared:
    """A trial's NE on the test part, and how far it is from the first trial's: difference ± its standard error.

    The error is over the draw of the evaluation users, clustered by user and paired: what makes a user hard for both
    trials cancels. It knows nothing of training seeds.
    """

    folder: Path
    trial: Trial
    train_flops: float
    ne: float
    difference: float
    error: float


def compare(folders: Sequence[Path]) -> list[Compared]:
    """Evaluates finished ranking trials again from their checkpoints.

    Raises UserError naming the folder if it holds no finished ranking trial, or if it was trained on, or evaluates on,
    other data than the first.
    """
    if len(folders) < 2:
        raise UserError("name at least two folders of trials to compare")
    found: list[Compared] = []
    first: np.ndarray | None = None
    impressions = ""
    for folder in folders:
        trial, flops = _finished(folder)
        sequences, model, params = restored(trial, folder)
        evaluator = Evaluator(trial, sequences, model)
        if impressions and evaluator.fingerprint("test") != impressions:
            raise UserError(f"{folder} is evaluated on other impressions than {folders[0]}")
        impressions = evaluator.fingerprint("test")
        ne, influence = evaluator.ranking(params, "test").influence()
        first = influence if first is None else first
        base = found[0].ne if found else ne
        found.append(Compared(folder, trial, flops, ne, ne - base, clustered_error(influence - first)))
    return found


def compare_command(folders: Sequence[Path]) -> None:
    """Prints :func:`compare` as a table."""
    found = compare(folders)
    names = ("trial", "model", "FLOPs", "NE", "difference", "95 % interval")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None)
    for one in found:
        low, high = one.difference - 1.96 * one.error, one.difference + 1.96 * one.error
        interval = f"{low:+.4f} to {high:+.4f}" if one is not found[0] else ""
        difference = f"{one.difference:+.4f}" if one is not found[0] else ""
        table.add_row(
            one.folder.name, one.trial.model.name, f"{one.train_flops:.2e}", f"{one.ne:.4f}", difference, interval
        )
    Console(highlight=False).print(table)


def _finished(folder: Path) -> tuple[Trial, float]:
    """The trial and its training FLOPs."""
    config, result = read_record(folder / "config.json"), read_result(folder)
    if config is None or result is None or result["status"] != "done":
        raise UserError(f"{folder} holds no finished trial")
    trial = trial_from_json(config)
    if trial.model.goal != "ranking":
        raise UserError(f"{folder} holds a retrieval trial: it has no NE to compare")
    if trial.data.digest and digest_of(trial.data.path) != trial.data.digest:
        raise UserError(f"{folder} was trained on other data than {trial.data.path} holds now")
    return trial, float(result["train_flops"])
