"""``genrec compare``: trained trials held against the first of them on the same impressions, with paired intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from experiments.folder import read_record, read_result
from experiments.paired import families_apart
from experiments.table import read_trials
from genrec_jax.config import Trial, trial_from_json
from genrec_jax.data.sequences import digest_of
from genrec_jax.data.splits import Part
from genrec_jax.errors import UserError
from genrec_jax.metrics import RankingMetrics
from genrec_jax.noise import Difference, UserSums, difference
from genrec_jax.train.evaluate import Evaluator
from genrec_jax.train.loop import restored
from genrec_jax.train.record import read_users


@dataclass(frozen=True)
class Compared:
    """A trial's NE on the impressions it reports (the test part, where it is not left unread), held against the
    first trial's."""

    folder: Path
    trial: Trial
    train_flops: float
    ne: float
    apart: Difference


def compare(folders: Sequence[Path]) -> list[Compared]:
    """Compares finished ranking trials by their records, or, where these lack what is needed, by their checkpoints.

    Raises UserError naming the folder if it holds no finished ranking trial, if it is evaluated on other impressions
    than the first, or if it has to be evaluated again and its data are not those it was trained on.
    """
    if len(folders) < 2:
        raise UserError("name at least two folders of trials to compare, or one of a study")
    found: list[Compared] = []
    first: tuple[str, UserSums] | None = None
    for folder in folders:
        trial, result = _finished(folder)
        impressions, sums = _evaluated(folder, trial, result)
        first = first or (impressions, sums)
        if impressions != first[0]:
            raise UserError(f"{folder} is evaluated on other impressions than {folders[0]}")
        apart = difference([first[1]], [sums])
        found.append(Compared(folder, trial, float(result["train_flops"]), float(sums.mean_ne()), apart))
    return found


def compare_command(folders: Sequence[Path]) -> None:
    """Prints :func:`compare` as a table; of the folder of a study, its families."""
    if len(folders) == 1 and (folders[0] / "trials").is_dir():
        first, lines = ("family", "label"), _families(folders[0])
    else:
        first = ("trial", "model")
        lines = [
            _Line(one.folder.name, one.trial.model.name, one.train_flops, one.ne, one.apart if place else None)
            for place, one in enumerate(compare(folders))
        ]
    names = (*first, "FLOPs", "NE", "difference", "95 % interval")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None)
    for line in lines:
        table.add_row(*line.cells())
    console = Console(highlight=False)
    console.print(table)
    wider = [line.apart.unpaired / line.apart.error for line in lines if line.apart is not None and line.apart.error]
    if wider:
        console.print(
            "The intervals pair users; with users of its own for each trial they would be "
            f"{min(wider):.1f} to {max(wider):.1f} times as wide."
        )


@dataclass(frozen=True)
class _Line:
    """``apart``: from the first of its group, None for itself."""

    name: str
    kind: str
    flops: float
    ne: float
    apart: Difference | None

    def cells(self) -> list[str]:
        own = [self.name, self.kind, f"{self.flops:.2e}", f"{self.ne:.4f}"]
        if self.apart is None:
            return [*own, "", ""]
        return [*own, f"{self.apart.value:+.4f}", f"{self.apart.low:+.4f} to {self.apart.high:+.4f}"]


def _families(study: Path) -> list[_Line]:
    """The lines of a study's families, each group after the one that it is held against."""
    lines: list[_Line] = []
    shown = None
    for one in families_apart(study, read_trials(study)):
        if one.base != shown:
            shown = one.base
            lines.append(_Line(shown.family, shown.label, shown.train_flops, one.base_ne, None))
        lines.append(_Line(one.new.family, one.new.label, one.new.train_flops, one.new_ne, one.apart))
    if not lines:
        raise UserError(
            f"{study} has no two families along train_flops whose finished trials hold what their users added to NE"
        )
    return lines


def _finished(folder: Path) -> tuple[Trial, Mapping[str, Any]]:
    """The trial and its result."""
    config, result = read_record(folder / "config.json"), read_result(folder)
    if config is None or result is None or result["status"] != "done":
        raise UserError(f"{folder} holds no finished trial")
    trial = trial_from_json(config)
    if trial.model.goal != "ranking":
        raise UserError(f"{folder} holds a retrieval trial: it has no NE to compare")
    return trial, result


def _evaluated(folder: Path, trial: Trial, result: Mapping[str, Any]) -> tuple[str, UserSums]:
    """Which impressions a trial's result is of, and what their users add to its NE."""
    sums = read_users(folder / "users.npz")
    if sums is not None:
        return str(result["eval_set"]), sums
    if trial.data.digest and digest_of(trial.data.path) != trial.data.digest:
        raise UserError(f"{folder} was trained on other data than {trial.data.path} holds now")
    sequences, model, params = restored(trial, folder)
    evaluator = Evaluator(trial, sequences, model)
    part: Part = "test" if trial.train.report_test else "validation"
    (found,) = evaluator.each([params], part)
    assert isinstance(found, RankingMetrics)
    return evaluator.fingerprint(part), found.sums()
