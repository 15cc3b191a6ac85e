"""Rematerialisation: the same numbers from less memory, with the draws of dropout that the forward pass had."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.sequences import Sequences
from genrec_jax.nn.stack import rematerialised
from genrec_jax.train import loop
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.step import bind
from tests.data.helpers import random_dataset
from tests.train.helpers import lines, trial_of


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=40)


@pytest.mark.parametrize("name", ["hstu", "hstu_retrieval", "transformer", "dirl"])
def test_the_same_gradients_from_half_the_memory(sequences: Sequences, name: str) -> None:
    sizes = {"model.dropout": 0.2, "model.depth": 3, "model.width": 32, "model.heads": 2, "data.candidates": 1}
    trial = trial_of(sequences, name, **sizes, **{"train.batch_rows": 8, "data.history": 64})
    stream = TrainStream(sequences, trial.data, trial.model.rows, 8, seed=0)
    batch, params = next(stream), init_params(trial, sequences.schema)
    stream.close()
    found: list[tuple[Any, int]] = []
    for remat in (False, True):
        model = abstract_model(trial, sequences.schema)
        model = rematerialised(model) if remat else model

        def loss(params: Any, model: Any = model) -> jax.Array:
            return bind(model, params).loss(batch, nnx.Rngs(0, batch=1))[0]

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        found.append((compiled(params), compiled.memory_analysis().temp_size_in_bytes))
    (kept, most), (again, least) = found
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(a).max())
    assert least < most / 2


@pytest.mark.parametrize("rule", ["adamw", "rowwise_adagrad"])
def test_it_changes_no_number_of_a_run(sequences: Sequences, tmp_path: Path, rule: str) -> None:
    sizes = {"model.depth": 2, "model.heads": 2, "model.dropout": 0.1}
    trial = trial_of(sequences, "hstu", **sizes, **{"train.embedding_optimizer": rule, "train.pieces": 2})
    loop.train(trial, tmp_path / "kept")
    loop.train(trial, tmp_path / "again", remat=True)
    for one, other in zip(lines(tmp_path / "kept"), lines(tmp_path / "again"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
