import csv
import dataclasses
from pathlib import Path

import pytest
from fake_trainer import TRAINER, plan

from experiments.executors.local import LocalExecutor
from experiments.folder import trial_folder
from experiments.launch import run_study
from experiments.study import PlannedTrial
from experiments.table import FIRST, rebuild_table


def launch(planned: list[PlannedTrial], out: Path) -> Path:
    return run_study(planned, out, executor=LocalExecutor(1), quiet=True, trainer=TRAINER).table


def test_table_is_rebuilt_from_the_folders(tmp_path: Path) -> None:
    planned = plan(3)
    path = launch(planned, tmp_path)
    before = path.read_bytes()
    path.unlink()
    rows = rebuild_table(tmp_path)
    assert path.read_bytes() == before
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0])[: len(FIRST)] == list(FIRST)
    assert {"ne/like", "train_seconds", "versions/jax", "history", "learning_rate", "model.width"} <= set(read[0])
    assert float(read[0]["learning_rate"]) == planned[0].trial.train.learning_rate
    assert [row["label"] for row in read] == ["width=8", "width=10", "width=9"]  # families, then the axis by size
    assert [row["axis_value"] for row in rows] == [8, 10, 9]  # read from the configuration: the plan gave none
    first = read[0]
    assert (first["trial"], first["study"], first["family"]) == (planned[0].trial.hash, "study", "even")
    assert (first["seed"], first["status"], first["axis"], first["dataset"]) == ("0", "done", "model.width", "world")
    assert float(first["ne/like"]) == 0.125


def test_a_trial_that_is_no_longer_planned_leaves_the_table(tmp_path: Path) -> None:
    planned = plan(3)
    launch(planned, tmp_path)
    launch(planned[:2], tmp_path)
    assert {row["trial"] for row in rebuild_table(tmp_path)} == {one.trial.hash for one in planned[:2]}
    launch(planned, tmp_path)
    assert len(rebuild_table(tmp_path)) == 3


def test_unfinished_trials_have_a_row_and_the_dataset_name_of_their_siblings(tmp_path: Path) -> None:
    planned = plan(2)
    launch(planned, tmp_path)
    (trial_folder(tmp_path, planned[1].trial.hash) / "result.json").unlink()
    done, unfinished = rebuild_table(tmp_path)
    assert (done["status"], unfinished["status"]) == ("done", "unfinished")
    assert unfinished["dataset"] == done["dataset"] == "world"
    assert unfinished["ne/like"] is None


def test_a_later_study_keeps_the_places_of_an_earlier_one(tmp_path: Path) -> None:
    (one,) = plan(1)
    launch([one], tmp_path)
    launch([dataclasses.replace(one, study="other", axis="", axis_value=-1.5)], tmp_path)
    launch([dataclasses.replace(one, label="renamed")], tmp_path)
    rows = rebuild_table(tmp_path)
    assert [(row["study"], row["label"], row["axis_value"]) for row in rows] == [
        ("other", "width=8", -1.5),
        ("study", "renamed", 8),
    ]


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trials" / "notes").mkdir(parents=True)
    assert rebuild_table(tmp_path) == []


@pytest.mark.parametrize("axis_value", [0.25, 3])
def test_axis_value_of_the_plan_wins(tmp_path: Path, axis_value: float | str) -> None:
    (one,) = plan(1)
    launch([dataclasses.replace(one, axis_value=axis_value)], tmp_path)
    assert rebuild_table(tmp_path)[0]["axis_value"] == axis_value
