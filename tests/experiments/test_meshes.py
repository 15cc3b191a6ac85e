"""A study whose trials each train on several devices; the suite's processes have two."""

import csv
import json
from pathlib import Path

import pytest

from experiments.executors import Training
from experiments.executors.local import LocalExecutor
from experiments.launch import run_study
from experiments.study import PlannedTrial
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from tests.data.helpers import random_dataset
from tests.train.helpers import TIMING, trial_of


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def planned(sequences: Sequences, **settings: object) -> list[PlannedTrial]:
    return [PlannedTrial(trial_of(sequences, **settings), "study", "dlrm", "tiny", "train_flops")]


def table(trials: list[PlannedTrial], out: Path, how: Training) -> list[dict[str, str]]:
    summary = run_study(trials, out, executor=LocalExecutor(1), quiet=True, how=how)
    with summary.table.open(encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(file)]


def test_a_mesh_changes_a_table_by_the_order_of_sums_alone(sequences: Sequences, tmp_path: Path) -> None:
    trials = planned(sequences)
    (alone,) = table(trials, tmp_path / "alone", Training())
    (shared,) = table(trials, tmp_path / "mesh", Training(mesh="fsdp=2", remat=True))
    assert (alone.pop("devices"), shared.pop("devices")) == ("1", "2")
    assert alone.keys() == shared.keys()
    for column, value in alone.items():
        try:
            assert float(shared[column]) == pytest.approx(float(value), rel=1e-5), column
        except ValueError:
            assert shared[column] == value, column


@pytest.mark.parametrize(
    ("mesh", "settings", "said"),
    [
        ("data=64", {}, "the mesh needs 64 devices, 2 are here"),
        ("data=2", {"train.batch_rows": 7, "train.pieces": 1}, r"train.batch_rows \(7\) must be a multiple of 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_once(
    sequences: Sequences, tmp_path: Path, mesh: str, settings: dict[str, object], said: str
) -> None:
    trials = planned(sequences, **settings)
    with pytest.raises(UserError, match=rf"^{trials[0].name}: {said}"):
        table(trials, tmp_path, Training(mesh=mesh))
    (attempts,) = json.loads((tmp_path / "launch.json").read_text(encoding="utf-8"))["attempts"].values()
    assert attempts == 1
