"""Trials trained together: the records, the results and the checkpoints of each are those it would have alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from genrec_jax.config import Trial, override
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.train import loop
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer, make_row_rule, scalars
from genrec_jax.train.pack import check_pack, pack_key
from genrec_jax.train.record import read_users
from genrec_jax.train.step import init_state, trial_step
from genrec_jax.train.together import AtOnce, InTurn
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of, untimed


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


RETRIEVAL = {
    "data.candidates": 1,
    "data.segments": 3,
    "data.packing": "batch",
    "model.heads": 1,
    "model.negatives": 4,
    "train.pieces": 2,
    "train.validations": 3,
    "train.select": "best",
}
ROWS = {"train.embedding_optimizer": "rowwise_adamw", "train.embedding_precision": "bfloat16"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dlrm": ("dlrm", {"train.validations": 2, "train.embedding_optimizer": "rowwise_adagrad"}),
    "hstu": ("hstu", {"model.heads": 2, "model.dropout": 0.2, **ROWS}),
    "retrieval": ("hstu_retrieval", RETRIEVAL),
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"seed": 1, "train.embedding_learning_rate": 2e-2, "train.embedding_weight_decay": 0.1, "train.beta2": 0.9},
    {"seed": 2, "train.learning_rate": 3e-2, "train.weight_decay": 0.3, "train.beta1": 0.5},
)


def folders(root: Path, trials: Sequence[Trial]) -> list[Path]:
    return [root / trial.hash for trial in trials]


def files(run: Path) -> set[str]:
    """What a trial's folder holds: the files, and the steps of its checkpoints."""
    checkpoints = {str(path.relative_to(run)) for path in (run / "checkpoints").iterdir()}
    return {path.name for path in run.iterdir()} | checkpoints


def assert_equal(found: Any, expected: Any) -> None:
    """Same keys in the same order, same texts, numbers equal but for the order of float32 sums."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


def assert_same_records(trial: Trial, found: Path, expected: Path) -> None:
    assert files(found) == files(expected)
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    results = [json.loads((run / "result.json").read_text()) for run in (found, expected)]
    assert list(results[0]) == list(results[1])
    assert_equal(*map(untimed, results))
    assert_equal(lines(found), lines(expected))
    sums = [read_users(run / "users.npz") for run in (found, expected)]
    if sums[0] is not None:
        assert_equal(*({key: value.tolist() for key, value in vars(own).items() if key != "tasks"} for own in sums))
    if results[1]["status"] == "done":
        own, alone = (jax.tree.leaves(loop.restored(trial, run)[2]) for run in (found, expected))
        for a, b in zip(own, alone, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module", params=list(MODELS))
def alone(
    request: pytest.FixtureRequest, sequences: Sequences, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Trial], Path]:
    """Two trials that differ in all that a pack's may, each trained alone."""
    model, settings = MODELS[request.param]
    trials = [trial_of(sequences, model, **settings, **variant) for variant in VARIANTS]
    root = tmp_path_factory.mktemp("alone")
    for trial, run in zip(trials, folders(root, trials), strict=True):
        loop.train(trial, run)
    return trials, root


def test_a_pack_writes_what_each_trial_writes_alone(alone: tuple[list[Trial], Path], tmp_path: Path) -> None:
    trials, expected = alone
    seen: list[tuple[str, int]] = []
    results = loop.train_pack(
        trials, folders(tmp_path, trials), on_progress=lambda trial, line: seen.append((trial.hash, line["step"]))
    )
    assert seen == [(trial.hash, step) for step in range(2, 13, 2) for trial in trials]
    for trial, result in zip(trials, results, strict=True):
        assert json.loads((tmp_path / trial.hash / "result.json").read_text()) == result
        assert_same_records(trial, tmp_path / trial.hash, expected / trial.hash)
    assert lines(tmp_path / trials[0].hash)[0]["loss"] != pytest.approx(lines(tmp_path / trials[1].hash)[0]["loss"])


@pytest.mark.parametrize("alone", ["retrieval"], indirect=True)
def test_a_killed_pack_goes_on_in_another(alone: tuple[list[Trial], Path], tmp_path: Path) -> None:
    """Killed past the checkpoints of step 5; one trial goes on alone until past its checkpoint of step 10; then both
    are trained together again, in another order, the one ahead waiting for the other."""
    trials, expected = alone

    def kill_at(step: int) -> Any:
        def kill(*given: Any) -> None:
            if given[-1]["step"] == step:
                raise Stopped

        return kill

    with pytest.raises(Stopped):
        loop.train_pack(trials, folders(tmp_path, trials), on_progress=kill_at(8))
    with pytest.raises(Stopped):
        loop.train(trials[0], tmp_path / trials[0].hash, on_progress=kill_at(12))
    assert not list(tmp_path.glob("*/result.json"))
    steps = [max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*")) for run in folders(tmp_path, trials)]
    assert steps == [10, 5]
    seen: list[tuple[str, int]] = []
    others = trials[::-1]
    loop.train_pack(
        others, folders(tmp_path, others), on_progress=lambda trial, line: seen.append((trial.hash, line["step"]))
    )
    for trial, first in zip(trials, steps, strict=True):
        assert [step for own, step in seen if own == trial.hash] == [s for s in range(2, 13, 2) if s > first]
        assert_same_records(trial, tmp_path / trial.hash, expected / trial.hash)


def test_a_trial_that_diverges_leaves_the_others_alone(sequences: Sequences, tmp_path: Path) -> None:
    """Its result is on disk while the others go on, and its last line is that of the step at which it diverged."""
    calm = trial_of(sequences, **{"train.steps": 60, "train.checkpoint_every": 1000})
    wild = trial_of(
        sequences,
        **{"train.steps": 60, "train.checkpoint_every": 1000, "seed": 3},
        **{"train.learning_rate": 1e4, "train.embedding_learning_rate": 1e4},
    )
    trials, early = [wild, calm], []

    def progress(trial: Trial, line: dict[str, Any]) -> None:
        if trial == calm and (tmp_path / wild.hash / "result.json").exists():
            early.append(line["step"])

    diverged, done = loop.train_pack(trials, folders(tmp_path, trials), on_progress=progress)
    assert (diverged["status"], done["status"]) == ("diverged", "done")
    last = lines(tmp_path / wild.hash)[-1]
    assert last["step"] == diverged["steps"] < 60
    assert last["loss"] is None or last["loss"] > 1.0
    assert early[:1] <= [last["step"] + 2]
    assert early[-1] == 60
    loop.train(calm, tmp_path / "alone")
    assert_same_records(calm, tmp_path / calm.hash, tmp_path / "alone")


@pytest.mark.parametrize("kind", [InTurn, AtOnce])
def test_a_step_of_a_pack_is_each_trials_own(sequences: Sequences, kind: type[InTurn] | type[AtOnce]) -> None:
    """One after another, as on a CPU, and all at once, as on an accelerator; who is not at work keeps every bit."""
    trials = [trial_of(sequences, "dlrm", **MODELS["dlrm"][1], **variant) for variant in (*VARIANTS, {"seed": 3})]
    optimizer, rule = make_optimizer(trials[0].train, 12), make_row_rule(trials[0].train, 12)
    states = [init_state(init_params(own, sequences.schema), optimizer, own.seed, rule) for own in trials]
    streams = [loop.TrainStream(sequences, own.data, own.model.rows, 8, seed=own.seed) for own in trials]
    batches = {place: next(stream) for place, stream in enumerate(streams)}
    for stream in streams:
        stream.close()
    values = [scalars(own.train) for own in trials]
    step = trial_step(abstract_model(trials[0], sequences.schema), trials[0].train, 12)
    alone = jax.jit(step)
    expected = [alone(*own) for own in zip(states, batches.values(), values, strict=True)]
    kept = jax.tree.map(np.array, states[2])
    pack = kind(step, states, values)
    at_work = {place: batches[place] for place in (0, 1)}
    pack.compile(at_work)
    pack.advance(at_work)
    pack.wait()
    for place in at_work:
        own, found = expected[place]
        for a, b in zip(jax.tree.leaves(pack.state(place)), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert pack.metrics()[place] == pytest.approx({name: float(x) for name, x in found.items()}, rel=1e-5)
    for a, b in zip(jax.tree.leaves(pack.state(2)), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("alone", ["dlrm"], indirect=True)
def test_all_at_once_is_what_each_trial_writes_alone(
    alone: tuple[list[Trial], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, through a whole run."""
    monkeypatch.setattr(loop, "target", lambda: "gpu")
    trials, expected = alone
    loop.train_pack(trials, folders(tmp_path, trials))
    for trial in trials:
        assert_same_records(trial, tmp_path / trial.hash, expected / trial.hash)


def test_what_may_be_trained_together(sequences: Sequences) -> None:
    trial = trial_of(sequences, "hstu", **{"model.heads": 2})
    alike = {f"train.{name}": 0.03 for name in ("learning_rate", "embedding_learning_rate", "weight_decay")}
    alike |= {"train.embedding_weight_decay": 0.2, "train.beta1": 0.5, "train.beta2": 0.6, "seed": 9}
    for key, value in alike.items():
        assert pack_key(override(trial, {key: value})) == pack_key(trial), key
    others = {
        "model.width": 16,
        "model.dropout": 0.3,
        "data.history": 9,
        "data.fraction": 0.5,
        "train.steps": 11,
        "train.clip": 0.5,
        "train.warmup": 0.2,
        "train.decay": "constant",
        "train.batch_rows": 16,
        "train.embedding_optimizer": "rowwise_adamw",
        "train.precision": "bfloat16",
        "train.validations": 2,
        "train.log_every": 3,
    }
    for key, value in others.items():
        other = override(trial, {key: value})
        assert pack_key(other) != pack_key(trial), key
        with pytest.raises(UserError, match=rf"trials {trial.hash} and {other.hash} differ in {key}: train them apart"):
            check_pack([trial, other])
    assert pack_key(trial_of(sequences)) != pack_key(trial)


def test_passes_that_are_drawn_anew_keep_seeds_apart(sequences: Sequences) -> None:
    """Their number of packed rows depends on the seed, and so do the steps of an epoch; not if steps are given."""
    for drawn in ({"data.stochastic_length": 1.2}, {"data.rows_per_user": 1}):
        trial = trial_of(sequences, "hstu", **{"model.heads": 2, "train.steps": 0, "data.segments": 3, **drawn})
        with pytest.raises(UserError, match="differ in seed: train them apart"):
            check_pack([trial, override(trial, {"seed": 1})])
        check_pack([trial, override(trial, {"train.learning_rate": 0.5})])
        check_pack([override(trial, {"train.steps": 5}), override(trial, {"train.steps": 5, "seed": 1})])


def test_nothing_is_written_for_a_pack_that_is_refused(sequences: Sequences, tmp_path: Path) -> None:
    trials = [trial_of(sequences), trial_of(sequences, "dcn")]
    with pytest.raises(UserError, match=r"differ in .*model\.name.*: train them apart"):
        loop.train_pack(trials, folders(tmp_path, trials))
    with pytest.raises(UserError, match="no trials"):
        loop.train_pack([], [])
    assert not list(tmp_path.iterdir())
