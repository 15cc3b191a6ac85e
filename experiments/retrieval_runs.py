"""What recipe runs came to: read from their folders, kept in one file of records that outlives them.

A record file (JSON lines, a finished trial a line) holds all that tables and curves are made of, so that results can be
added to long after the folders of earlier runs are gone.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.folder import read_record, read_result
from experiments.recipe import STUDY
from experiments.retrieval_choices import STUDY as CHOICES
from experiments.shuffled_ties import SHUFFLED
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.train.member import SELECTED_BY
from genrec_jax.train.places import Place, write_text
from genrec_jax.train.record import read_lines, write_json

METRICS = ("hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")
CHOSEN_BY = SELECTED_BY["retrieval"][0]
Curve = tuple[tuple[float, dict[str, float]], ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """One trial.

    label: the protocol, or the choice of the study. trial: its hash. digest: of its data, whose name, users and items
    ``data`` holds. curve: the watched part's metrics by epoch, as far as it has come. tested: the test metrics of the
    finished trial, else empty; tested_epoch: whose they are. made: on which device, with which versions, on which day.
    """

    study: str
    family: str
    label: str
    seed: int
    trial: str
    digest: str
    data: dict[str, Any]
    epochs: float
    curve: Curve
    tested: dict[str, float]
    tested_epoch: float
    train_seconds: float
    made: dict[str, str]

    @property
    def section(self) -> tuple[str, float]:
        """What it is shown with: runs on one dataset, copies of one with other orders of ties as well, and as long."""
        name: str = self.data["name"]
        return name if name.endswith(SHUFFLED) else self.digest, self.epochs

    @property
    def best_watched(self) -> tuple[float, dict[str, float]]:
        """The epoch with the best NDCG@10 on the watched part, and its metrics."""
        return max(self.curve, key=lambda point: point[1][CHOSEN_BY])


def write_datasets(out: Place, sequences: Sequences) -> None:
    """Adds a dataset to ``OUT/datasets.json``, which says what the trials' digests stand for."""
    known = read_record(out / "datasets.json") or {}
    entry = {"name": sequences.name, "users": sequences.users, "items": sequences.schema.items - 1}
    write_json(out / "datasets.json", known | {sequences.digest: entry})


def read_runs(sources: Sequence[Place]) -> list[Run]:
    """Every trial of a recipe or of the study of choices in the given folders and record files.

    Of one recipe (or choice), protocol, seed, dataset and number of epochs there is one: a finished one before others,
    then that of the later source, whose code may have changed in what does not change the recipe.
    Raises UserError for a folder without trials and for a file that holds no records.
    """
    found: dict[tuple[Any, ...], Run] = {}
    for source in sources:
        for run in _recorded(source) if source.is_file() else _in_folder(source):
            key = (run.study, run.family, run.label, run.seed, run.digest, run.epochs)
            if run.tested or key not in found:
                found[key] = run
    return sorted(found.values(), key=lambda run: (run.study, run.family, run.label, run.seed))


def write_runs(runs: Iterable[Run], file: Path) -> None:
    """The record file of the finished ones among ``runs``."""
    write_text(file, "".join(f"{json.dumps(_columns(run))}\n" for run in runs if run.tested))


def _columns(run: Run) -> dict[str, Any]:
    """The record of a run: the curve as a list per metric, six decimals each."""
    epochs, points = zip(*run.curve, strict=True)
    curve = {name: [round(point[name], 6) for point in points] for name in METRICS}
    return {**dataclasses.asdict(run), "curve": {"epoch": [round(epoch, 6) for epoch in epochs], **curve}}


def _recorded(file: Place) -> Iterator[Run]:
    try:
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            curve = record.pop("curve")
            points = zip(*(curve[name] for name in METRICS), strict=True)
            metrics = [dict(zip(METRICS, point, strict=True)) for point in points]
            yield Run(**record, curve=tuple(zip(curve["epoch"], metrics, strict=True)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} does not hold records of runs, as `genrec results` writes them") from None


def _in_folder(folder: Place) -> Iterator[Run]:
    datasets = read_record(folder / "datasets.json") or {}
    trials = sorted(file.parent.name for file in (folder / "trials").glob("*/config.json"))
    if not trials:
        raise UserError(f"{folder} holds no trials")
    for name in trials:
        yield from _runs(folder / "trials" / name, datasets)


def _runs(folder: Place, datasets: dict[str, Any]) -> Iterator[Run]:
    config, plan, result = read_record(folder / "config.json"), read_record(folder / "plan.json"), read_result(folder)
    if config is None or plan is None:
        return
    epochs, digest = float(config["train"]["epochs"]), config["data"]["digest"]
    part = "test/" if config["data"]["protocol"] == "original" else "validation/"
    curve = tuple(
        (epochs * line["step"] / line["steps"], metrics)
        for line in read_lines(folder / "metrics.jsonl")
        if CHOSEN_BY in (metrics := {k.removeprefix(part): v for k, v in line.items() if k.startswith(part)})
    )
    done = result if result is not None and result["status"] == "done" and curve else {}
    unnamed = {"name": done.get("dataset", digest), "users": 0, "items": 0}
    for place in plan["placements"]:
        if place["study"] in (STUDY, CHOICES.name):
            yield Run(
                study=place["study"],
                family=place["family"],
                label=place["label"],
                seed=config["seed"],
                trial=folder.name,
                digest=digest,
                data=datasets.get(digest, unnamed),
                epochs=epochs,
                curve=curve,
                tested={name: float(done[name]) for name in METRICS} if done else {},
                tested_epoch=epochs * done["tested_step"] / done["steps"] if done else 0.0,
                train_seconds=float(done["train_seconds"]) if done else 0.0,
                made={name: value for name, value in done.items() if name in _MADE or name.startswith("version/")},
            )


_MADE = ("device", "finished")
