"""Checkpoints: what is kept, and what comes of one that is damaged."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.train import loop
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of, untimed


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


@pytest.fixture(scope="module")
def runs(sequences: Sequences, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``: a run of 12 steps; ``cut``: killed after step 11, with checkpoints of steps 5 and 10."""
    folder, trial = tmp_path_factory.mktemp("runs"), trial_of(sequences, "hstu", **{"train.log_every": 1})
    loop.train(trial, folder / "whole")

    def kill(record: dict) -> None:
        if record["step"] == 11:
            raise Stopped

    with pytest.raises(Stopped):
        loop.train(trial, folder / "cut", on_progress=kill)
    assert steps(folder / "cut") == {5, 10}
    assert steps(folder / "whole") == {10, 12}
    return folder


def test_a_checkpoint_is_never_there_in_part(sequences: Sequences, tmp_path: Path) -> None:
    """Those that are dropped go by their name at once, to where a killed run may have left others; who copies the
    folder meanwhile finds no part of one."""
    folder, removed = tmp_path / "run/checkpoints", set()

    def hear(event: str, args: tuple) -> None:
        if event in ("os.remove", "os.rmdir", "shutil.rmtree") and str(args[0]).startswith(f"{folder}/"):
            removed.add(Path(args[0]).relative_to(folder).parts[0])

    left = folder / "dropped/5/state"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"1")
    sys.addaudithook(hear)
    loop.train(trial_of(sequences, "hstu"), tmp_path / "run")
    assert not [name for name in removed if name.isdigit()]
    assert "dropped" in removed
    assert {path.name for path in folder.iterdir()} == {"10", "12", "sizes.json"}


def steps(run: Path) -> set[int]:
    return {int(path.name) for path in (run / "checkpoints").glob("[0-9]*")}


def arrays(checkpoint: Path) -> list[Path]:
    """The files that hold numbers, the largest first."""
    found = [path for path in (checkpoint / "state").rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(found, key=lambda path: -path.stat().st_size)


def truncated(checkpoint: Path) -> None:
    for path in arrays(checkpoint):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_numbers(checkpoint: Path) -> None:
    for path in arrays(checkpoint):
        path.unlink()


def without_record(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "record")


@pytest.mark.parametrize("damage", [truncated, without_numbers, without_record])
def test_a_damaged_checkpoint_is_passed_over(
    sequences: Sequences, tmp_path: Path, runs: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on from the one before it, and ends as if nothing had been."""
    trial = trial_of(sequences, "hstu", **{"train.log_every": 1})
    shutil.copytree(runs / "cut", tmp_path / "run")
    damage(tmp_path / "run/checkpoints/10")
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        result = loop.train(trial, tmp_path / "run", on_progress=lambda record: seen.append(record["step"]))
    assert "checkpoint 10 cannot be read, the one before it is used" in caplog.text
    assert seen == list(range(6, 13))
    assert untimed(result) == untimed(loop.train(trial, runs / "whole"))
    assert lines(tmp_path / "run") == lines(runs / "whole")
    assert steps(tmp_path / "run") == {10, 12}
    whole, cut = (jax.tree.leaves(loop.restored(trial, run)[2]) for run in (runs / "whole", tmp_path / "run"))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_numbers_than_were_saved_are_no_checkpoint(
    sequences: Sequences, tmp_path: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files that can all be read, of another step, whose sizes a kill left unnoted: only the sums tell."""
    trial = trial_of(sequences, "hstu", **{"train.log_every": 1})
    shutil.copytree(runs / "cut", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/10/state")
    shutil.copytree(tmp_path / "run/checkpoints/5/state", tmp_path / "run/checkpoints/10/state")
    (tmp_path / "run/checkpoints/sizes.json").unlink()
    loop.restored(trial, tmp_path / "run")
    assert "checkpoint 10 cannot be read, the one before it is used: it holds other numbers than were" in caplog.text
    assert steps(tmp_path / "run") == {5, 10}  # who only reads removes nothing


def test_without_any_that_can_be_read_nothing_is_begun_anew(sequences: Sequences, tmp_path: Path, runs: Path) -> None:
    trial = trial_of(sequences, "hstu", **{"train.log_every": 1})
    shutil.copytree(runs / "cut", tmp_path / "run")
    for step in (5, 10):
        truncated(tmp_path / f"run/checkpoints/{step}")
    before = lines(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints: checkpoint 5 cannot be read: "):
        loop.train(trial, tmp_path / "run")
    assert lines(tmp_path / "run") == before
