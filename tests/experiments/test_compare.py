"""Paired comparison of trained trials: the differences are those of their results, the errors those of the pairing."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.compare import compare, compare_command
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.sequences import Sequences, digest_of
from genrec_jax.errors import UserError
from genrec_jax.train.loop import train
from tests.data.helpers import random_dataset

SETTINGS = {"data.history": 6, "data.candidates": 2, "train.batch_rows": 8, "train.steps": 20, "model.width": 8}


def trial_of(sequences: Sequences, model: str, **settings: object) -> Trial:
    path = str(sequences.path)
    return override(default_trial(model, path=path, digest=digest_of(path)), {**SETTINGS, **settings})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``a`` (DLRM), ``b`` (DCN) and ``other`` (DLRM on rows of other candidates), trained."""
    root = tmp_path_factory.mktemp("runs")
    sequences = random_dataset(root / "log", users=60)
    train(trial_of(sequences, "dlrm"), root / "a")
    train(trial_of(sequences, "dcn"), root / "b")
    train(trial_of(sequences, "dlrm", **{"data.candidates": 3}), root / "other")
    return root


def result(folder: Path) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_differences_are_those_of_the_results(runs: Path) -> None:
    first, second, again = compare([runs / "a", runs / "b", runs / "a"])
    a, b = result(runs / "a"), result(runs / "b")
    assert (first.ne, second.ne) == pytest.approx((a["ne"], b["ne"]), abs=1e-9)
    assert second.apart.value == pytest.approx(b["ne"] - a["ne"], abs=1e-9)
    assert (first.apart.value, first.apart.error) == (again.apart.value, again.apart.error) == (0, 0)
    # Correlated errors of two models: the pairing is worth something, and is not zero.
    assert 0 < second.apart.error < second.apart.unpaired == pytest.approx(np.hypot(a["ne_error"], b["ne_error"]))
    assert second.train_flops == b["train_flops"]


def test_the_table_shows_the_interval(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_command([runs / "a", runs / "b"])
    _, second = compare([runs / "a", runs / "b"])
    shown = capsys.readouterr().out
    assert f"{second.apart.low:+.4f} to {second.apart.high:+.4f}" in shown


def test_without_a_record_a_trial_is_evaluated_again(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "b", tmp_path / "b", ignore=shutil.ignore_patterns("users.npz"))
    _, kept = compare([runs / "a", runs / "b"])
    _, again = compare([runs / "a", tmp_path / "b"])
    assert dataclasses.asdict(again.apart) == pytest.approx(dataclasses.asdict(kept.apart), rel=1e-9)


def test_what_cannot_be_compared_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two"):
        compare([runs / "a"])
    with pytest.raises(UserError, match="other impressions"):
        compare([runs / "a", runs / "other"])
    with pytest.raises(UserError, match="no finished trial"):
        compare([runs / "a", tmp_path])
    shutil.copytree(runs / "b", tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints", "users.npz"))
    with pytest.raises(UserError, match="no checkpoint"):
        compare([runs / "a", tmp_path / "bare"])
    config = json.loads((runs / "b/config.json").read_text(encoding="utf-8"))
    config["data"]["digest"] = "0" * 12
    shutil.copytree(runs / "b", tmp_path / "moved", ignore=shutil.ignore_patterns("users.npz"))
    (tmp_path / "moved/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="other data"):
        compare([runs / "a", tmp_path / "moved"])


def test_a_trial_without_known_data_is_taken_at_its_word(runs: Path, tmp_path: Path) -> None:
    """A configuration written by hand has no digest."""
    config = json.loads((runs / "b/config.json").read_text(encoding="utf-8"))
    config["data"]["digest"] = ""
    shutil.copytree(runs / "b", tmp_path / "b", ignore=shutil.ignore_patterns("users.npz"))
    (tmp_path / "b/config.json").write_text(json.dumps(config), encoding="utf-8")
    one, other = compare([runs / "b", tmp_path / "b"])
    assert other.ne == one.ne
    assert other.apart.error == 0
