"""Trained parameters leave by the public code's names."""

from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from genrec_jax.data.sequences import Sequences
from genrec_jax.interop import read_tensors, to_reference
from genrec_jax.train import loop
from genrec_jax.train.step import bind
from tests.data.helpers import random_dataset
from tests.train.helpers import trial_of

SMALL = {"data.candidates": 1, "model.heads": 1, "model.negatives": 4}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def test_the_trained_parameters_are_written(sequences: Sequences, tmp_path: Path) -> None:
    trial, run, file = trial_of(sequences, "sasrec", **SMALL), tmp_path / "run", tmp_path / "deep" / "w.safetensors"
    loop.train(trial, run)
    main(["weights", str(run), "--out", str(file)])
    _, model, params = loop.restored(trial, run)
    wanted, found = to_reference(bind(model, params)), read_tensors(file)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_is_one_sentence(
    sequences: Sequences, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(folder: Path, file: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["weights", str(folder), "--out", str(tmp_path / file)])
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not (tmp_path / file).exists()
        return said

    assert "nowhere holds no trial" in fails(tmp_path / "nowhere", "w.npz")
    loop.train(trial_of(sequences), tmp_path / "dlrm")
    assert "the public code has no parameters for DLRM" in fails(tmp_path / "dlrm", "w.npz")
    loop.train(trial_of(sequences, "sasrec", **SMALL), tmp_path / "sasrec")
    assert "is of no kind that can be written; there is: .npz, .safetensors" in fails(tmp_path / "sasrec", "w.pt")
