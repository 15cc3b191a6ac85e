"""The command that streams trials: which it takes, what it writes, what it refuses."""

import csv
from pathlib import Path

import pytest

from experiments import streaming
from experiments.streaming import parse_period, stream_command
from genrec_jax.config import default_trial, override
from genrec_jax.errors import UserError
from genrec_jax.noise import difference
from genrec_jax.train import loop
from genrec_jax.train.record import write_json
from genrec_jax.train.stream import periods, read_period
from tests.data.helpers import random_dataset

SETTINGS = {"data.history": 6, "data.candidates": 2, "train.batch_rows": 8, "train.steps": 6, "model.width": 8}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder of two families of one size."""
    root = tmp_path_factory.mktemp("study")
    sequences = random_dataset(root / "log", users=60)
    settings = {**SETTINGS, "data.path": str(sequences.path)}
    trials = [override(default_trial("dlrm"), {**settings, "seed": seed}) for seed in (0, 1)]
    folders = [root / "out/trials" / trial.hash for trial in trials]
    loop.train_pack(trials, folders)
    for family, folder in zip(("first", "second"), folders, strict=True):
        place = {"study": "s", "family": family, "label": "", "axis": "train_flops", "axis_value": None}
        write_json(folder / "plan.json", {"placements": [place]})
    return root / "out"


def test_a_study_is_streamed_at_its_top(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream_command([study], tmp_path / "out", "20s", 0.2)
    with (tmp_path / "out/stream.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["part"]) for row in rows] == [
        (seed, part) for seed in ("0", "1") for part in ("validation", "test", "all")
    ]
    trial = loop.read_trial(study / "trials" / rows[3]["trial"])
    count = len(periods(loop.load(trial.data.path), trial.data, 20))
    first = read_period(tmp_path / "out" / trial.hash, 1)
    assert float(rows[3]["fixed_ne"]) != float(rows[4]["fixed_ne"])
    assert int(rows[5]["impressions"]) == int(rows[3]["impressions"]) + int(rows[4]["impressions"])
    shown = capsys.readouterr().out
    assert f"period {count} of {count}" in " ".join(shown.split())
    assert f"NE fixed {first.fixed.mean_ne():.4f}" in " ".join(shown.split())
    assert f"{float(rows[5]['difference']):+.4f}" in shown
    # Again: nothing is left to do, and the same is said.
    before = (tmp_path / "out/stream.csv").read_bytes()
    stream_command([study], tmp_path / "out", "20s", 0.2)
    assert "period" not in capsys.readouterr().out
    assert (tmp_path / "out/stream.csv").read_bytes() == before
    assert difference([first.fixed], [first.streamed]).value == 0


def test_a_folder_without_a_finished_ranker_is_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished trial"):
        stream_command([tmp_path], tmp_path / "out", "1d", 0.1)
    (tmp_path / "empty/trials").mkdir(parents=True)
    with pytest.raises(UserError, match="no finished ranking trials"):
        stream_command([tmp_path / "empty"], tmp_path / "out", "1d", 0.1)
    with pytest.raises(UserError, match="--rate must be positive"):
        stream_command([study], tmp_path / "out", "1d", 0.0)
    assert not (tmp_path / "out").exists()


def test_a_retrieval_trial_is_refused(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = override(default_trial("hstu_retrieval"), {"data.candidates": 1})
    monkeypatch.setattr(streaming, "read_trial", lambda _: trial)
    with pytest.raises(UserError, match="retrieval trial"):
        stream_command([next((study / "trials").iterdir())], tmp_path / "out", "1d", 0.1)


def test_a_trial_split_by_users_is_refused(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = override(default_trial("dlrm"), {"data.split": "users"})
    monkeypatch.setattr(streaming, "read_trial", lambda _: trial)
    with pytest.raises(UserError, match="split by users"):
        stream_command([next((study / "trials").iterdir())], tmp_path / "out", "1d", 0.1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1d", 86400), ("12h", 43200), ("2w", 1209600), ("90s", 90), ("5m", 300)]
)
def test_a_period_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert parse_period(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "d", "0d", "1.5d", "-1d", "1y"])
def test_other_periods_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--period"):
        parse_period(text)
