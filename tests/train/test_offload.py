"""The optimiser's state in the host's memory: the same numbers, and any run goes on with it or without it."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from experiments.cli import main
from genrec_jax.config import Trial
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.sequences import Sequences
from genrec_jax.distributed import mesh as meshes
from genrec_jax.distributed import tables
from genrec_jax.distributed.mesh import make_mesh, parse_mesh
from genrec_jax.errors import UserError
from genrec_jax.nn import embedding
from genrec_jax.train import loop
from genrec_jax.train import optimizer as optimizers
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer, make_row_rule
from genrec_jax.train.step import State, init_state, make_step, placed_state
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of, untimed

STEPS = 12
HALF = {"train.embedding_optimizer": "rowwise_adamw", "train.embedding_precision": "bfloat16"}
ADAGRAD = {"train.embedding_optimizer": "rowwise_adagrad"}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and arrays of these sizes are worth moving."""
    monkeypatch.setattr(embedding, "LARGE", 16)
    monkeypatch.setattr(embedding, "SPREAD", 8)
    monkeypatch.setattr(meshes, "_SMALLEST", 16)
    monkeypatch.setattr(optimizers, "_PARTS", 2)


def begun(trial: Trial, sequences: Sequences, mesh: Any, *, offload: bool) -> State:
    optimizer, rule = make_optimizer(trial.train, STEPS), make_row_rule(trial.train, STEPS)
    make = functools.partial(init_state, init_params(trial, sequences.schema), optimizer, 0, rule)
    return placed_state(make, mesh, offload=offload)


def trained(trial: Trial, sequences: Sequences, mesh: Any, *, offload: bool) -> tuple[State, State, list[float]]:
    """The first state, copied, that after all steps, and the losses."""
    stream = TrainStream(sequences, trial.data, trial.model.rows, 8, seed=0)
    optimizer, rule = make_optimizer(trial.train, STEPS), make_row_rule(trial.train, STEPS)
    state = begun(trial, sequences, mesh, offload=offload)
    first, losses = jax.tree.map(np.array, state), []
    where = jax.tree.map(lambda x: x.sharding, state) if offload else None
    step = make_step(abstract_model(trial, sequences.schema), optimizer, 2, rule, mesh, where)
    for _ in range(STEPS):
        state, metrics = step(state, next(stream))
        losses.append(float(metrics["loss"]))
    stream.close()
    return first, state, losses


def on_host(state: State) -> set[str]:
    return {keystr(path) for path, x in tree_leaves_with_path(state) if x.sharding.memory_kind == "pinned_host"}


@pytest.mark.parametrize(
    ("settings", "mesh", "room"),
    [({}, "fsdp=2", 0), (HALF, "data=2", 2)],  # with room for two rows in a box, several rounds
)
def test_it_changes_no_number(
    sequences: Sequences, monkeypatch: pytest.MonkeyPatch, settings: dict, mesh: str | None, room: int
) -> None:
    """Steps with it are those without it to the bit, and all that is large stays with the host throughout."""
    if room:
        monkeypatch.setattr(tables, "room_for", lambda *_: room)
    trial, devices = trial_of(sequences, **{"train.steps": STEPS}, **settings), mesh and make_mesh(parse_mesh(mesh))
    *here, losses = trained(trial, sequences, devices, offload=False)
    *there, same = trained(trial, sequences, devices, offload=True)
    assert same == losses
    assert len(set(losses)) > STEPS / 2
    for one, other in zip(here, there, strict=True):
        for (path, x), y in zip(tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.array(x), np.array(y), err_msg=keystr(path))
    assert not on_host(here[1])
    kept = {keystr(path): x.size for path, x in tree_leaves_with_path(there[1]) if keystr(path).startswith(".opt")}
    large = {name for name, size in kept.items() if size >= 16 and ("['rows']" not in name or "items" in name)}
    assert on_host(there[1]) == large
    assert any("['rows']" in name for name in large) == bool(settings)


def test_a_run_goes_on_with_it_and_without_it(sequences: Sequences, tmp_path: Path) -> None:
    """With it up to a kill and without it after that: in the end the numbers of a run left alone."""
    trial = trial_of(sequences, **ADAGRAD)
    whole = loop.train(trial, tmp_path / "whole")

    def kill(record: dict) -> None:
        if record["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        loop.train(trial, tmp_path / "cut", offload=True, on_progress=kill)
    cut = loop.train(trial, tmp_path / "cut")
    assert untimed(cut) == untimed(whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("mesh", ["data=2"])
def test_a_checkpoint_keeps_where_arrays_lie(sequences: Sequences, tmp_path: Path, mesh: str | None) -> None:
    """What was saved from either place is read back to either, to the bit."""
    trial, devices = trial_of(sequences, **HALF), mesh and make_mesh(parse_mesh(mesh))
    state = begun(trial, sequences, devices, offload=True)
    drawn = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(drawn.normal(size=x.shape).astype(x.dtype), x.sharding) if x.ndim else x, state
    )
    kept = Checkpoints(tmp_path / "checkpoints")
    kept.save(3, state, {})
    for offload in (True, False):
        found = kept.restore(begun(trial, sequences, devices, offload=offload))
        assert found is not None
        assert on_host(found[1]) == (on_host(state) if offload else set())
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(found[1]), strict=True):
            np.testing.assert_array_equal(np.array(x), np.array(y))
    kept.close()


def test_several_trials_together_are_refused(sequences: Sequences, tmp_path: Path) -> None:
    trials = [trial_of(sequences, **{"train.learning_rate": rate}) for rate in (0.01, 0.02)]
    with pytest.raises(UserError, match="keep all of their states on the device"):
        loop.train_pack(trials, [tmp_path / "a", tmp_path / "b"], offload=True)
    assert not (tmp_path / "a").exists()


def test_the_command_takes_it(sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(loop, "train", lambda *_, **given: seen.append(given["offload"]) or {})
    given = ["train", "--data", str(sequences.path), "--model", "dlrm", "--out", str(tmp_path / "run"), "--quiet"]
    main([*given, "--offload", "optimizer"])
    main(given)
    assert seen == [True, False]
