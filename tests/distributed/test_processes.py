"""Several processes: each reads its share of the batches, all have one process' numbers, and none outlives another."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.cli import main
from genrec_jax.config import default_trial, override
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.sequences import Sequences
from genrec_jax.distributed.mesh import make_mesh, parse_mesh
from genrec_jax.distributed.processes import mesh_of_all, share_of_rows
from genrec_jax.errors import UserError
from genrec_jax.train import loop
from tests.data.helpers import random_dataset
from tests.distributed.launching import start
from tests.train.helpers import lines

SETTINGS = {
    "data.history": 8,
    "data.candidates": 2,
    "train.batch_rows": 8,
    "train.steps": 60,
    "train.learning_rate": 0.003,
    "train.embedding_learning_rate": 0.003,
    "train.log_every": 5,
    "train.validations": 2,
    "train.checkpoint_every": 5,
    "train.checkpoint_seconds": 0.0,
}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


@pytest.mark.parametrize(
    "settings",
    [{}, {"data.segments": 3, "data.packing": "batch"}, {"data.segments": 3, "data.stochastic_length": 1.2}],
)
def test_shares_put_together_are_the_batches(sequences: Sequences, settings: dict[str, Any]) -> None:
    """Rows of three processes side by side, over passes that end inside a batch."""
    config = override(default_trial("hstu"), {"data.history": 8, "data.candidates": 2, **settings}).data
    streams = [
        TrainStream(sequences, config, "windows", 9, seed=3, share=share)
        for share in (None, slice(0, 2), slice(2, 6), slice(6, 9))
    ]
    for _ in range(40):
        whole, *shares = (next(stream) for stream in streams)
        joined = jax.tree.map(lambda *x: np.concatenate(x), *shares)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(joined), strict=True):
            np.testing.assert_array_equal(a, b)
    for stream in streams:
        stream.close()


def test_one_process_has_all_rows_of_its_devices() -> None:
    assert share_of_rows(None, 6) == slice(0, 6)
    assert share_of_rows(make_mesh(parse_mesh("data=2")), 6) == slice(0, 6)
    with pytest.raises(UserError, match=rf"the mesh has 3 devices, the processes together have {jax.device_count()}"):
        mesh_of_all({"data": 3})


def pair(data: Path, out: Path) -> list[subprocess.Popen]:
    """Two processes with a device each that train together."""
    return start(data, out, "dlrm", SETTINGS, mesh="data=2", processes=2, devices=1)


def test_two_processes_follow_one_and_none_outlives_the_other(sequences: Sequences, tmp_path: Path) -> None:
    """The first of two is killed; the second ends by itself. Both are started again and finish with the numbers of a
    single process that was left alone."""
    trial = override(default_trial("dlrm", path=str(sequences.path)), SETTINGS)
    whole = loop.train(trial, tmp_path / "one", mesh=make_mesh(parse_mesh("data=2")))
    first, second = pair(sequences.path, tmp_path / "two")
    assert first.stdout is not None
    while not first.stdout.readline().startswith("step 20/"):
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    _, said = second.communicate(timeout=120)
    first.communicate()
    assert second.returncode != 0
    assert "another process of this job is gone" in said or "another task died" in said
    assert not (tmp_path / "two/result.json").exists()
    again = pair(sequences.path, tmp_path / "two")
    said = [process.communicate(timeout=300)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    result = json.loads((tmp_path / "two/result.json").read_text(encoding="utf-8"))
    assert result["devices"] == 2
    for one, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(one, rel=1e-5, abs=1e-7)
    assert result["ne"] == pytest.approx(whole["ne"], rel=1e-5)
    assert result["eval_set"] == whole["eval_set"]
    whole_params, params = (jax.tree.leaves(loop.restored(trial, tmp_path / name)[2]) for name in ("one", "two"))
    for a, b in zip(whole_params, params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["", "host,0/2", "host:1,2/2", "host:1,0", "host:1,-1/2", "host:1,a/2"])
def test_what_names_no_process_is_one_sentence(
    sequences: Sequences, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    given = ["train", "--data", str(sequences.path), "--model", "dlrm", "--out", str(tmp_path / "run"), "--quiet"]
    with pytest.raises(SystemExit, match="2"):
        main([*given, f"--distributed={text}"])
    assert "is neither auto nor of the form HOST:PORT,PROCESS/PROCESSES" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
