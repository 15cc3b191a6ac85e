"""The floors of a synthetic world reach the report, on the impressions that models are evaluated on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.study import PlannedTrial
from experiments.truth import read_notes, read_references, write_notes, write_references
from genrec_jax.config import default_trial, override
from genrec_jax.data.pipeline import evaluation_batches, evaluation_events
from genrec_jax.data.sequences import load
from genrec_jax.data.synthetic import World, generate
from scaling import Reference, held_against_truth


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> list[PlannedTrial]:
    folder = tmp_path_factory.mktemp("world") / "data"
    generate(World(users=64, requests=12, items=60, concentration=20.0), folder, floor_requests=0)
    trials = [
        override(default_trial("dlrm", path=str(folder)), {"data.history": n, "data.candidates": 4}) for n in (4, 16)
    ]
    return [PlannedTrial(trial, "study", "dlrm", f"N={trial.data.history}", "history") for trial in trials]


def test_evaluated_events_are_the_candidates_of_the_batches(planned: list[PlannedTrial]) -> None:
    config = planned[0].trial.data
    sequences = load(config.path)
    impressions, begins = evaluation_events(sequences, config, "ranking", "test")
    shown = []
    for batch in evaluation_batches(sequences, config, "ranking", "test", 7):
        shown.append(np.asarray(batch.candidates.item)[np.asarray(batch.candidates.segment) > 0])
    np.testing.assert_array_equal(np.sort(sequences.item[impressions]), np.sort(np.concatenate(shown)))
    assert (begins <= impressions).all()


def test_every_history_length_has_its_floor(planned: list[PlannedTrial], tmp_path: Path) -> None:
    write_references(planned, tmp_path)
    references = {(r.name, r.metric): r.value for r in read_references([tmp_path])}
    for name in ("Bayes NE, 4 events", "Bayes NE, 16 events", "Bayes NE, all events", "oracle NE"):
        assert 0.3 < references[name, "ne"] < 1.1
        per_task = [references[name, f"ne/{task}"] for task in ("click", "like", "share")]
        assert references[name, "ne"] == pytest.approx(np.mean(per_task))
    assert references["oracle NE", "ne"] < references["Bayes NE, 4 events", "ne"]
    histories = {r.name: r.history for r in read_references([tmp_path])}
    assert (histories["Bayes NE, 4 events"], histories["Bayes NE, all events"]) == (4, None)


def test_nothing_is_written_without_a_known_truth(planned: list[PlannedTrial], tmp_path: Path) -> None:
    elsewhere = override(planned[0].trial, {"data.path": str(tmp_path)})
    write_references([dataclasses.replace(planned[0], trial=elsewhere)], tmp_path)
    assert read_references([tmp_path]) == []


def test_notes_travel_from_the_dataset_to_the_study(tmp_path: Path) -> None:
    data, out, other = (tmp_path / name for name in ("data", "out", "other"))
    for folder in (data, out, other):
        folder.mkdir()
    record: dict[str, object] = {"name": "mine", "source": {"files": ["a.csv"]}}
    (data / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
    write_notes(data, out)
    assert list(out.iterdir()) == []
    record["source"] = {"notes": ["One.", "Two."]}
    (data / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
    write_notes(data, out)
    write_notes(data, other)
    assert read_notes([out, other, tmp_path]) == {"mine": ["One.", "Two."]}


@pytest.mark.parametrize(("value", "said"), [(0.75, "inside"), (0.95, "above"), (0.5, "below")])
def test_fitted_constant_is_held_against_the_floor(value: float, said: str) -> None:
    fit = {"params": {"c": 0.8}, "intervals": {"c": [0.7, 0.9]}}
    family = {"name": "hstu", "fits": {"loglin": {"params": {}, "intervals": None}, "power_const": fit}}
    analysis = {"metric": "ne", "panels": [{"axis": "", "x": "train_flops", "families": [family]}]}
    floors = [Reference("Bayes NE", value, value, value), Reference("Bayes NE", 0.1, 0.1, 0.1, "auc")]
    (line,) = held_against_truth(analysis, floors)
    assert line.endswith(f"{value:.4f} is {said}")
    assert "0.8000 (95 % 0.7000 to 0.9000)" in line
