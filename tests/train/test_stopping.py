"""SIGTERM: a checkpoint of the very step, exit code 143, and a resumed run that is bitwise the undisturbed one."""

import signal
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.cli import main
from genrec_jax.data.sequences import Sequences
from genrec_jax.train import loop
from genrec_jax.train.stopping import Stopped, asked_to_stop
from tests.data.helpers import random_dataset
from tests.train.helpers import lines, trial_of


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def killed_at(step: int) -> Any:
    def kill(record: dict) -> None:
        if record["step"] == step:
            signal.raise_signal(signal.SIGTERM)  # to this thread: the handler has run when it returns

    return kill


@pytest.mark.parametrize("steps", [(3,), (1, 2, 7)])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    sequences: Sequences, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    settings = {"train.steps": 9, "train.log_every": 1, "train.checkpoint_every": 100, "model.dropout": 0.1}
    trial = trial_of(sequences, "hstu", **settings)
    loop.train(trial, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    for step in steps:
        with pytest.raises(Stopped) as stopped:
            loop.train(trial, tmp_path / "cut", on_progress=killed_at(step))
        assert (stopped.value.code, stopped.value.step, stopped.value.steps) == (143, step, 9)
        assert signal.getsignal(signal.SIGTERM) is before
        assert max(int(path.name) for path in (tmp_path / "cut/checkpoints").glob("[0-9]*")) == step
        assert not (tmp_path / "cut/result.json").exists()
    loop.train(trial, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    whole, cut = (jax.tree.leaves(loop.restored(trial, tmp_path / name)[2]) for name in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_command_says_how_to_go_on(
    sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "--data", str(sequences.path), "--model", "dlrm", "--out", str(tmp_path / "run"), "--quiet"]
    given += [f"--set={x}" for x in ("train.steps=4", "train.log_every=1", "data.history=8")]
    real = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, on_progress, **k: real(*a, on_progress=killed_at(2), **k))
    with pytest.raises(SystemExit, match="143"):
        main(given)
    assert "stopped after step 2 of 4; run the same command again to go on" in capsys.readouterr().out
    monkeypatch.setattr(loop, "train", real)
    main(given)
    assert (tmp_path / "run/result.json").exists()


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with asked_to_stop() as asked:
            found.extend([signal.getsignal(signal.SIGTERM), asked.is_set()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, False]
