"""What each evaluated user adds to NE is kept with the result: of the part that it reports, however it came about."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrec_jax.data.sequences import Sequences
from genrec_jax.noise import UserSums, clustered_error
from genrec_jax.train import loop
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.record import read_users
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def kept(run: Path) -> UserSums:
    found = read_users(run / "users.npz")
    assert found is not None
    return found


def assert_of(found: UserSums, result: dict[str, Any], prefix: str = "") -> None:
    assert found.mean_ne() == pytest.approx(result[f"{prefix}ne"], rel=1e-9)
    assert found.ne() == pytest.approx([result[f"{prefix}ne/{task}"] for task in found.tasks], rel=1e-9)
    assert clustered_error(found.mean_influence()) == pytest.approx(result[f"{prefix}ne_error"], rel=1e-9)
    assert found.rows.sum() == result[f"{prefix}impressions"]


def test_a_result_comes_with_what_its_users_add_to_ne(sequences: Sequences, tmp_path: Path) -> None:
    result = loop.train(trial_of(sequences), tmp_path / "run")
    found = kept(tmp_path / "run")
    assert_of(found, result)
    assert found.tasks == sequences.schema.tasks
    assert (np.diff(found.users) > 0).all()
    assert len(found.users) > 10
    assert not list((tmp_path / "run").glob(".users*"))
    other = loop.train(trial_of(sequences, seed=3), tmp_path / "other")
    assert other["eval_set"] == result["eval_set"]
    assert kept(tmp_path / "other").same_rows(found)


# With this seed the best of the validations is neither the first nor the last.
SELECTING = {
    "train.report_test": False,
    "train.select": "best",
    "train.validations": 6,
    "train.learning_rate": 0.3,
    "train.decay": "constant",
}


@pytest.mark.parametrize("settings", [{"train.report_test": False, "train.validations": 3}, SELECTING])
def test_with_the_test_part_unread_they_are_those_of_the_validation(
    sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Also if a kill comes after the last evaluation and before its checkpoint, or after all of it."""
    trial = trial_of(sequences, **settings)
    result = loop.train(trial, tmp_path / "run")
    assert_of(kept(tmp_path / "run"), result, "validation/")
    if trial.train.select == "best":
        steps = [line["step"] for line in lines(tmp_path / "run") if "loss" not in line]
        assert steps[0] < result["tested_step"] < steps[-1]
    saved = Checkpoints.save

    def stop(self: Checkpoints, step: int, *rest: Any) -> None:
        if step == 12:
            raise Stopped
        saved(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Stopped):
            loop.train(trial, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "versions", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(trial, tmp_path / "cut")
    again = loop.train(trial, tmp_path / "cut")
    assert again["validation/ne"] == result["validation/ne"]
    assert (tmp_path / "cut/users.npz").read_bytes() == (tmp_path / "run/users.npz").read_bytes()


def test_ranks_have_no_ne(sequences: Sequences, tmp_path: Path) -> None:
    settings = {"data.candidates": 1, "model.heads": 1, "model.negatives": 4}
    loop.train(trial_of(sequences, "hstu_retrieval", **settings), tmp_path / "run")
    assert not (tmp_path / "run/users.npz").exists()
    assert read_users(tmp_path / "run/users.npz") is None


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive"])
def test_a_damaged_record_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "users.npz").write_bytes(content)
    assert read_users(tmp_path / "users.npz") is None
