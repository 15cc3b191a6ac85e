"""A trial whose folder is in a store: whenever it is killed, the run that goes on ends as if nothing had been."""

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from genrec_jax.config import Trial
from genrec_jax.data.sequences import Sequences
from genrec_jax.train import loop, mirror
from genrec_jax.train.mirror import at_hand, brought
from genrec_jax.train.places import Store
from tests import bucket
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of, untimed

TRIAL = Store("bucket://one/trial")
MARK = "trial/checkpoints/sizes.json"


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


@pytest.fixture(scope="module")
def trial(sequences: Sequences) -> Trial:
    return trial_of(sequences, **{"train.log_every": 1, "train.validations": 4, "train.select": "best"})


@pytest.fixture(scope="module")
def whole(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    loop.train(trial, run)
    return run


@pytest.fixture(scope="module")
def moments(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bucket at moments of a run that puts its folder there after steps 6 and 11, and is then killed."""
    folder = tmp_path_factory.mktemp("moments")
    kept: dict[str, Path] = {}
    changed: list[str] = []

    def keep(moment: str) -> None:
        kept[moment] = folder / moment
        shutil.copytree(folder / "buckets" / "one", kept[moment], ignore=shutil.ignore_patterns(".*"))

    def changing(key: str) -> None:
        changed.append(key)
        marks = changed.count(MARK)
        if key == MARK and marks == 1:
            keep("not marked")
        if "a part" not in kept and sum(one.startswith("trial/checkpoints/10/") for one in changed) == 2:
            keep("a part")
        if changed[-2:-1] == [MARK] and marks == 2:
            keep("just marked")

    with pytest.MonkeyPatch.context() as patch:
        bucket.use(folder, patch)
        patch.setattr(bucket, "changing", changing)
        patch.setattr(mirror, "EVERY", 1e6)
        running = mirror._Mirror(TRIAL)
        running.__enter__()

        def progress(record: dict[str, Any]) -> None:
            if record["step"] in (6, 11):
                while not (running.local / f"checkpoints/{record['step'] - 1}").exists():
                    time.sleep(0.01)
                running._put()
            if record["step"] == 11:
                raise Stopped

        with pytest.raises(Stopped):
            loop.train(trial, running.local, on_progress=progress)
        keep("end")
    return kept


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a bucket."""
    bucket.use(tmp_path, monkeypatch)
    return tmp_path / "buckets" / "one"


def steps_to_the_end(trial: Trial, whole: Path) -> list[int]:
    """Goes on, holds all records against those of a run left alone, and returns the steps that were taken."""
    seen: list[int] = []
    with at_hand(TRIAL) as folder:
        loop.train(trial, folder, on_progress=lambda record: seen.append(record["step"]))
    assert not folder.exists()
    with brought(TRIAL) as copy:
        assert lines(copy) == lines(whole)
        results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (copy, whole)]
        assert (copy / "users.npz").read_bytes() == (whole / "users.npz").read_bytes()
    assert untimed(results[0]) == untimed(results[1])
    marked = json.loads((TRIAL / "checkpoints" / "sizes.json").read_text())
    here = {path.name: mirror._files(path) for path in (whole / "checkpoints").glob("[0-9]*")}
    assert marked.keys() == here.keys() == {path.name for path in (TRIAL / "checkpoints").glob("*/")}
    return seen


@pytest.mark.parametrize(("moment", "first"), [("not marked", 1), ("a part", 6), ("just marked", 11)])
def test_a_kill(one: Path, trial: Trial, whole: Path, moments: dict[str, Path], moment: str, first: int) -> None:
    shutil.copytree(moments[moment], one, dirs_exist_ok=True)
    assert steps_to_the_end(trial, whole) == list(range(first, 13))


def test_a_damaged_checkpoint_is_passed_over(
    one: Path, trial: Trial, whole: Path, moments: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(moments["end"], one, dirs_exist_ok=True)
    damaged = [file for file in one.iterdir() if "checkpoints%2F10%2Fstate" in file.name]
    largest = max(damaged, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert steps_to_the_end(trial, whole) == list(range(10, 13))
    assert "checkpoint 10 cannot be read, the one before it is used" in caplog.text


def test_a_store_may_be_away_for_a_while(
    one: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried, back = threading.Event(), threading.Event()

    def away(_: str) -> None:
        tried.set()
        if not back.is_set():
            raise ConnectionError("no route to the bucket")

    monkeypatch.setattr(bucket, "changing", away)
    monkeypatch.setattr(mirror, "EVERY", 0.01)
    with caplog.at_level(logging.WARNING), at_hand(TRIAL) as folder:
        (folder / "result.json").write_text("{}", encoding="utf-8")
        assert tried.wait(10)
        time.sleep(0.1)
        back.set()
    assert "bucket://one/trial: not put there, to be tried again: no route to the bucket" in caplog.text
    assert (TRIAL / "result.json").read_text() == "{}"
    back.clear()
    with pytest.raises(OSError, match="no route"), at_hand(TRIAL) as folder:
        (folder / "result.json").write_text("{...}", encoding="utf-8")


def test_a_mark_that_was_not_written_is_written_later(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def away(key: str) -> None:
        if key == MARK and len(refused) < 2:
            refused.append(key)
            raise ConnectionError

    monkeypatch.setattr(bucket, "changing", away)
    monkeypatch.setattr(mirror, "EVERY", 0.01)
    with at_hand(TRIAL) as folder:
        (folder / "checkpoints" / "5").mkdir(parents=True)
        (folder / "checkpoints" / "5" / "state").write_text("numbers", encoding="utf-8")
        while len(refused) < 2:
            time.sleep(0.01)
    assert json.loads((TRIAL / "checkpoints" / "sizes.json").read_text()) == {"5": {"state": 7}}


def test_only_what_a_run_changes_is_put_there(one: Path) -> None:
    """Others have files there, too, which may be newer than the copy."""
    (TRIAL / "plan.json").write_bytes(b"old")
    with at_hand(TRIAL) as folder:
        (TRIAL / "plan.json").write_bytes(b"new")
        (folder / "log.txt").write_text("line", encoding="utf-8")
    assert TRIAL.files() == ["log.txt", "plan.json"]
    assert (TRIAL / "plan.json").read_text() == "new"
