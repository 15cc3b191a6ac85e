"""Training: the optimiser's rules, resume = uninterrupted, early stop, records, evaluation."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from genrec_jax import metrics
from genrec_jax.config import TrainConfig, Trial, default_trial, override
from genrec_jax.data.pipeline import evaluation_batches
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences, save
from genrec_jax.errors import UserError
from genrec_jax.train import loop
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model, estimate, init_params
from genrec_jax.train.evaluate import evaluate, make_scorer
from genrec_jax.train.optimizer import make_optimizer, schedule
from genrec_jax.train.step import bind, init_state, make_step
from tests.data.helpers import random_dataset

SETTINGS = {
    "data.history": 8,
    "data.candidates": 2,
    "train.batch_rows": 8,
    "train.steps": 12,
    "train.log_every": 2,
    "train.checkpoint_every": 5,
    "train.checkpoint_seconds": 0.0,
}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def trial_of(sequences: Sequences, model: str = "dlrm", **settings: object) -> Trial:
    small = {"model.width": 8, "model.depth": 1}
    return override(default_trial(model, path=str(sequences.path)), {**SETTINGS, **small, **settings})


def test_schedule_warms_up_and_ends_at_zero() -> None:
    rate = schedule(2e-3, 100, 0.1)
    assert float(rate(0)) == 0.0
    assert float(rate(10)) == pytest.approx(2e-3)
    assert float(rate(55)) == pytest.approx(1e-3, rel=1e-5)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-9)


def test_tables_follow_their_own_rule() -> None:
    """With the tables' rate a tenth of the dense one, the first Adam step (size = rate) shows it; decay likewise."""
    config = TrainConfig(learning_rate=1e-2, embedding_learning_rate=1e-3, weight_decay=0.1, clip=1e9)
    params = {"items": {"rows_table": jnp.ones((3, 2))}, "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    optimizer = make_optimizer(config, steps=100)
    state = optimizer.init(params)
    grads = {"items": {"rows_table": jnp.ones((3, 2))}, "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    for _ in range(2):  # the schedule starts at zero
        updates, state = optimizer.update(grads, state, params)
    rate = float(schedule(1.0, 100, config.warmup)(1))
    np.testing.assert_allclose(updates["items"]["rows_table"], -1e-3 * rate, rtol=1e-4)
    np.testing.assert_allclose(updates["dense"]["bias"], -1e-2 * rate, rtol=1e-4)
    np.testing.assert_allclose(updates["dense"]["kernel"], -1e-2 * rate * 1.1, rtol=1e-4)


def test_gradients_are_clipped_before_the_moments() -> None:
    config = TrainConfig(clip=0.5)
    params = {"w": jnp.zeros((4, 4))}
    optimizer = make_optimizer(config, steps=10)
    _, state = optimizer.update({"w": jnp.full((4, 4), 100.0)}, optimizer.init(params), params)
    kept = [mu["w"] for _, mu in optax.tree_utils.tree_get_all_with_path(state, "mu") if hasattr(mu["w"], "shape")]
    assert [float(jnp.linalg.norm(mu)) / (1 - config.beta1) for mu in kept] == [pytest.approx(0.5, rel=1e-5)]


def test_step_learns(sequences: Sequences) -> None:
    trial = trial_of(sequences, **{"train.learning_rate": 1e-2, "train.embedding_learning_rate": 1e-2})
    model, params = abstract_model(trial, sequences.schema), init_params(trial, sequences.schema)
    optimizer = make_optimizer(trial.train, 50)
    state = init_state(params, optimizer, 0)
    step = make_step(model, optimizer)
    batch = next(iter(loop.TrainStream(sequences, trial.data, "requests", 8, seed=0)))
    losses = []
    for _ in range(50):
        state, found = step(state, batch)
        losses.append(float(found["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 50


def test_pieces_of_a_batch_add_up_to_the_whole(sequences: Sequences) -> None:
    """Rows of unequal numbers of targets: the mean is over the batch's targets, not over the pieces' means."""
    trial = trial_of(sequences, "hstu", **{"model.heads": 2, "model.dropout": 0.0})
    optimizer = make_optimizer(trial.train, 10)
    batch = next(iter(loop.TrainStream(sequences, trial.data, "windows", 8, seed=0)))
    found = []
    for pieces in (1, 4):
        state = init_state(init_params(trial, sequences.schema), optimizer, 0)
        step = make_step(abstract_model(trial, sequences.schema), optimizer, pieces)
        for _ in range(3):
            state, metrics_ = step(state, batch)
        found.append((state.params, {k: float(v) for k, v in metrics_.items()}))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for one, other in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


class Stopped(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("model", ["hstu", "dlrm"])
def test_resumed_equals_uninterrupted(sequences: Sequences, tmp_path: Path, model: str) -> None:
    """Killed after the checkpoint at step 5, the run ends with the very numbers of a run that was left alone."""
    trial = trial_of(sequences, model, **({"model.heads": 2} if model == "hstu" else {}))
    whole = loop.train(trial, tmp_path / "whole")

    def kill(record: dict) -> None:
        if record["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        loop.train(trial, tmp_path / "cut", on_progress=kill)
    assert not (tmp_path / "cut/result.json").exists()
    seen: list[int] = []
    cut = loop.train(trial, tmp_path / "cut", on_progress=lambda record: seen.append(record["step"]))
    assert seen == [6, 8, 10, 12]
    timing = {"train_seconds", "compile_seconds", "wall_seconds", "examples_per_second", "achieved_flops", "mfu"}
    assert {k: v for k, v in cut.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}

    def lines(name: str) -> list[tuple[int, float]]:
        text = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
        return [(r["step"], r["loss"]) for r in map(json.loads, text.splitlines())]

    assert lines("cut") == lines("whole")
    like = init_state(init_params(trial, sequences.schema), make_optimizer(trial.train, 12), 0)
    ends = []
    for name in ("cut", "whole"):
        kept = Checkpoints(tmp_path / name / "checkpoints")
        ends.append(kept.restore(like))
        kept.close()
    assert ends[0] is not None
    assert ends[1] is not None
    leaves = [[np.asarray(x) for x in jax.tree.leaves(end[1].params)] for end in ends if end]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_result_is_complete_and_consistent(sequences: Sequences, tmp_path: Path) -> None:
    trial = trial_of(sequences, "dirl", **{"model.heads": 2})
    result = loop.train(trial, tmp_path / "run")
    assert json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8")) == result
    assert result["status"] == "done"
    assert result["train_flops"] == estimate(trial).flops
    assert result["flops_per_target"] * result["targets"] == pytest.approx(result["train_flops"])
    assert result["steps"] * 8 == result["rows"]
    for key in ("ne/click", "auc/like", "gauc", "ne", "validation/ne", "eval_set", "base_rate/click"):
        assert key in result


def test_tensorboard_holds_scalars_and_hparams(sequences: Sequences, tmp_path: Path) -> None:
    result = loop.train(trial_of(sequences), tmp_path / "run")
    (file,) = (tmp_path / "run/tensorboard").glob("events*")
    found = list(EventFileLoader(str(file)).Load())
    scalars = {(v.tag, event.step): v for event in found for v in event.summary.value}
    losses = {step for tag, step in scalars if tag == "loss"}
    assert losses == {2, 4, 6, 8, 10, 12}
    assert {"mfu", "examples_per_second", "achieved_flops", "grad_norm"} <= {tag for tag, _ in scalars}
    assert tensor_util.make_ndarray(scalars["auc", 12].tensor).item() == pytest.approx(result["auc"], rel=1e-6)
    (start,) = [v for event in found for v in event.summary.value if v.tag == "_hparams_/session_start_info"]
    hparams = plugin_data_pb2.HParamsPluginData.FromString(
        start.metadata.plugin_data.content
    ).session_start_info.hparams
    assert hparams["train.learning_rate"].number_value == pytest.approx(1e-3)
    assert hparams["model.name"].string_value == "dlrm"


def test_a_diverging_trial_stops_early_and_says_so(sequences: Sequences, tmp_path: Path) -> None:
    trial = trial_of(
        sequences,
        **{"train.learning_rate": 1e4, "train.embedding_learning_rate": 1e4, "train.steps": 400, "train.warmup": 0.1},
    )
    result = loop.train(trial, tmp_path / "run")
    assert result["status"] == "diverged"
    assert "ne" not in result
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["step"] < 400
    assert last["loss"] is None or last["loss"] > 1.0
    assert result["steps"] == last["step"]
    assert result["train_flops"] == pytest.approx(estimate(trial).flops * last["step"] / 400)


def test_bfloat16_trains_with_float32_state(sequences: Sequences) -> None:
    trial = trial_of(sequences, "hstu", **{"train.precision": "bfloat16", "model.heads": 2})
    model = abstract_model(trial, sequences.schema)
    optimizer = make_optimizer(trial.train, 10)
    state = init_state(init_params(trial, sequences.schema), optimizer, 0)
    batch = next(iter(loop.TrainStream(sequences, trial.data, "windows", 8, seed=0)))
    state, found = make_step(model, optimizer)(state, batch)
    assert math.isfinite(float(found["loss"]))
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}


def test_evaluation_equals_metrics_of_all_logits_at_once(sequences: Sequences) -> None:
    trial = trial_of(sequences)
    model = abstract_model(trial, sequences.schema)
    state = init_state(init_params(trial, sequences.schema), make_optimizer(trial.train, 10), 0)
    tasks = sequences.schema.tasks

    def batches(rows: int) -> list:
        return list(evaluation_batches(sequences, trial.data, "ranking", "test", rows))

    found = evaluate(model, make_scorer(model), state.params, batches(8), tasks)
    assert found == pytest.approx(evaluate(model, make_scorer(model), state.params, batches(5), tasks), rel=1e-5)
    logits, labels = [], []
    for batch in batches(8):
        keep = np.asarray(batch.candidates.segment) > 0
        logits.append(np.asarray(bind(model, state.params)(batch))[keep])
        labels.append(np.asarray(batch.candidates.labels)[keep])
    auc = metrics.auc(np.concatenate(logits)[:, 0].astype(np.float64), np.concatenate(labels)[:, 0])
    assert found["auc/click"] == pytest.approx(auc)


def test_seeds_differ_and_repeat(sequences: Sequences) -> None:
    trees = [jax.tree.leaves(init_params(trial_of(sequences, seed=seed), sequences.schema)) for seed in (0, 0, 1)]
    kernels = [[np.asarray(x) for x in tree if x.ndim > 1] for tree in trees]
    assert all(np.array_equal(a, b) for a, b in zip(kernels[0], kernels[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(kernels[0], kernels[2], strict=True))


def test_retrieval_trial_reports_ranks(sequences: Sequences, tmp_path: Path) -> None:
    trial = trial_of(sequences, "hstu_retrieval", **{"data.candidates": 1, "model.heads": 1, "model.negatives": 4})
    result = loop.train(trial, tmp_path / "run")
    assert 0 <= result["hr@10"] <= result["hr@50"] <= 1
    assert result["targets"] > result["rows"]


def test_a_ranker_needs_labels(tmp_path: Path) -> None:
    unlabelled = save(
        tmp_path / "log",
        name="unlabelled",
        schema=Schema(items=5, tasks=()),
        origin=0,
        offsets=np.array([0, 40]),
        item=np.arange(40) % 4 + 1,
        time=np.arange(40),
        labels=np.zeros((40, 0)),
    )
    with pytest.raises(UserError, match=r"'dlrm' ranks by labels and the dataset has none"):
        loop.train(trial_of(unlabelled), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_dataset_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a dataset folder"):
        loop.train(default_trial("dlrm", path=str(tmp_path / "nowhere")), tmp_path / "run")
