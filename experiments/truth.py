"""What a study's folder says of its data beside the results: the floors of a synthetic world, and a dataset's notes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.folder import read_record
from experiments.study import PlannedTrial
from genrec_jax.config import DataConfig
from genrec_jax.data.pipeline import evaluation_events
from genrec_jax.data.sequences import load
from genrec_jax.train.places import Place
from genrec_jax.train.record import write_json
from scaling.plots import Reference


def write_references(planned: Sequence[PlannedTrial], out: Place) -> None:
    """Writes ``OUT/references.json``: Bayes NE for each history length of the study, and oracle NE.

    The values are the log-loss of the exact posterior on the very labels that models are evaluated on, so that a
    model's NE compares without label noise. Nothing is written for a dataset whose truth is not known.
    """
    data = {one.trial.data.path for one in planned}
    folder = Path(next(iter(data)))
    if not (folder / "truth.json").is_file() or any(one.trial.model.goal != "ranking" for one in planned):
        return
    by_history = {one.trial.data.history: one.trial.data for one in planned}
    references: list[Reference] = []
    for config in [by_history[history] for history in sorted(by_history)]:
        references += _floors(config, config.history, f"Bayes NE, {config.history} events")
    references += _floors(planned[0].trial.data, None, "Bayes NE, all events")
    write_json(out / "references.json", {"references": [dataclasses.asdict(r) for r in references]})


def _floors(config: DataConfig, history: int | None, name: str) -> list[Reference]:
    from genrec_jax.data.synthetic import truth

    sequences = load(config.path)
    impressions, begins = evaluation_events(sequences, config, "ranking", "test")
    found = truth(sequences, impressions, begins, history)
    values = {"ne": found.mean["bayes_realised"]}
    values |= {f"ne/{task}": value for task, value in zip(found.tasks, found.bayes_realised, strict=True)}
    references = [Reference(name, v, v, v, metric, sequences.name, history) for metric, v in values.items()]
    if history is None:
        oracle = {"ne": found.mean["oracle_realised"]}
        oracle |= {f"ne/{task}": value for task, value in zip(found.tasks, found.oracle_realised, strict=True)}
        references += [Reference("oracle NE", v, v, v, metric, sequences.name) for metric, v in oracle.items()]
    return references


def read_references(folders: Sequence[Path]) -> list[Reference]:
    """The references of the given study folders, each once."""
    found: dict[tuple[str, str, str, float], Reference] = {}
    for folder in folders:
        file = folder / "references.json"
        if file.is_file():
            for record in json.loads(file.read_text(encoding="utf-8"))["references"]:
                reference = Reference(**record)
                found[reference.name, reference.metric, reference.dataset, reference.value] = reference
    return list(found.values())


def write_notes(data: Path, out: Place) -> None:
    """Writes ``OUT/notes.json``: {dataset's name: what a reader must know of it}, from the dataset's own record.

    The notes are the list of sentences ``source.notes`` of ``DATA/dataset.json``; without any, nothing is written.
    """
    record = read_record(data / "dataset.json") or {}
    notes = record.get("source", {}).get("notes")
    if notes:
        write_json(out / "notes.json", {record["name"]: list(notes)})


def read_notes(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The notes of the given study folders by dataset, each once."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        for name, notes in (read_record(folder / "notes.json") or {}).items():
            found[name] = list(dict.fromkeys([*found.get(name, []), *notes]))
    return found
