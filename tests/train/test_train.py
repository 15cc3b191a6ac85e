"""Training: the optimiser's rules, resume = uninterrupted, early stop, validations, records, evaluation."""

import dataclasses
import json
import math
import os
import platform
import time
import types
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from genrec_jax import metrics
from genrec_jax.batch import Filled
from genrec_jax.config import TrainConfig, Trial, default_trial
from genrec_jax.data.pipeline import evaluation_batches
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences, save
from genrec_jax.errors import UserError
from genrec_jax.train import loop
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model, estimate, init_params, plan_account
from genrec_jax.train.evaluate import Evaluator, evaluate, make_scorer
from genrec_jax.train.hardware import device_name
from genrec_jax.train.optimizer import make_optimizer, make_row_rule, schedule
from genrec_jax.train.step import bind, init_state, make_step
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of, untimed


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def test_schedule_moves_at_every_step_and_would_end_at_zero() -> None:
    """19 steps, 2 of warm-up: the cosine spans the 18 steps from the peak at step 2 to the zero of a step 20."""
    rate = schedule(2e-3, 19, 0.1)
    by_hand = {1: 1e-3, 2: 2e-3, 5: (2 + 3**0.5) / 2 * 1e-3, 8: 1.5e-3, 11: 1e-3, 14: 0.5e-3, 20: 0.0, 21: 0.0}
    for step, expected in by_hand.items():
        assert float(rate(step - 1)) == pytest.approx(expected, rel=1e-12, abs=1e-18)
        assert float(jax.jit(rate)(step - 1)) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert float(rate(18)) == pytest.approx(1e-3 * (1 - math.cos(math.pi / 18)))  # the last one
    assert [float(schedule(1.0, 1, warmup)(0)) for warmup in (0.0, 0.9)] == [1.0, 1.0]
    assert [float(schedule(1.0, 2, 0.0)(k)) for k in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert [float(schedule(1.0, 4, 0.99)(k)) for k in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.0])


def test_a_constant_rate_follows_the_warm_up() -> None:
    rate = schedule(2e-3, 10, 0.2, "constant")
    assert [float(rate(k)) for k in range(10)] == pytest.approx([1e-3] + [2e-3] * 9)
    assert [float(schedule(2e-3, 10, 0.0, "constant")(k)) for k in (0, 9)] == [2e-3, 2e-3]


def test_tables_follow_their_own_rule() -> None:
    """With the tables' rate a tenth of the dense one, the first Adam step (size = rate) shows it; decay likewise."""
    config = TrainConfig(learning_rate=1e-2, embedding_learning_rate=1e-3, weight_decay=0.1, clip=1e9)
    params = {"items": {"rows_table": jnp.ones((3, 2))}, "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    optimizer = make_optimizer(config, steps=100)
    state = optimizer.init(params)
    grads = {"items": {"rows_table": jnp.ones((3, 2))}, "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    updates, state = optimizer.update(grads, state, params)
    rate = 1 / 5  # the first of five steps of warm-up
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


def test_the_published_optimiser_is_plain_adam_step_by_step() -> None:
    """Constant rate, no warm-up, no decay, no clipping: three steps against Adam's own formula in float64."""
    config = TrainConfig(decay="constant", warmup=0.0, clip=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 3)
    params = {"w": jnp.array([[1.0, -2.0]]), "items_table": jnp.array([[0.5, 3.0]])}
    state, m, v = optimizer.init(params), 0.0, 0.0
    gradient = np.array([[300.0, -0.02]])
    for step in range(1, 4):
        grads = {key: jnp.asarray(step * gradient, jnp.float32) for key in params}
        updates, state = optimizer.update(grads, state, params)
        m, v = 0.9 * m + 0.1 * step * gradient, 0.98 * v + 0.02 * (step * gradient) ** 2
        expected = -1e-3 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-8)
        for key in params:
            np.testing.assert_allclose(updates[key], expected, rtol=1e-5)


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


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by tag."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return untimed({tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]})


def end(run: Path, trial: Trial, sequences: Sequences) -> list[np.ndarray]:
    """The parameters of the last checkpoint."""
    rule = make_row_rule(trial.train, 12)
    like = init_state(init_params(trial, sequences.schema), make_optimizer(trial.train, 12), 0, rule)
    kept = Checkpoints(run / "checkpoints")
    restored = kept.restore(like)
    kept.close()
    assert restored is not None
    assert restored[0] == 12
    return [np.asarray(x) for x in jax.tree.leaves(restored[1].params)]


ROW_WISE = {"train.embedding_optimizer": "rowwise_adamw"}
THINNED = {"data.segments": 3, "data.stochastic_length": 1.2, "model.heads": 2}


@pytest.mark.parametrize(("model", "settings"), [("hstu", THINNED), ("dlrm", {}), ("dlrm", ROW_WISE)])
def test_resumed_equals_uninterrupted(sequences: Sequences, tmp_path: Path, model: str, settings: dict) -> None:
    """Killed after the checkpoint at step 5, the run ends with the very numbers of a run that was left alone."""
    trial = trial_of(sequences, model, **settings)
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
    assert untimed(cut) == untimed(whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    ends = [end(tmp_path / name, trial, sequences) for name in ("cut", "whole")]
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.fixture(scope="module")
def validated(sequences: Sequences, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with four validations, left alone."""
    run = tmp_path_factory.mktemp("validated") / "run"
    loop.train(trial_of(sequences, **{"train.validations": 4}), run)
    return run


def test_validations_are_recorded_and_do_not_alter_training(
    sequences: Sequences, tmp_path: Path, validated: Path
) -> None:
    one = loop.train(trial_of(sequences), tmp_path / "one")
    four = json.loads((validated / "result.json").read_text(encoding="utf-8"))
    assert untimed(one) == untimed(four)
    assert [r for r in lines(validated) if "loss" in r] == [r for r in lines(tmp_path / "one") if "loss" in r]
    trials = [(tmp_path / "one", trial_of(sequences)), (validated, trial_of(sequences, **{"train.validations": 4}))]
    ends = [end(run, trial, sequences) for run, trial in trials]
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))

    found = [r for r in lines(validated) if "loss" not in r]
    assert [r["step"] for r in found] == [3, 6, 9, 12]
    assert all(set(r) == {"step", "steps"} | {k for k in four if k.startswith("validation/")} for r in found)
    assert {k: v for k, v in four.items() if k.startswith("validation/")}.items() <= found[-1].items()
    assert len({r["validation/ne"] for r in found}) == 4
    shown = board(validated)
    for tag in ("validation/ne", "validation/auc/click", "validation/gauc", "validation/ne_error"):
        assert shown[tag] == [(r["step"], pytest.approx(r[tag], rel=1e-6)) for r in found]
    assert [step for step, _ in board(tmp_path / "one")["validation/ne"]] == [12]
    assert [r["step"] for r in lines(tmp_path / "one") if "loss" not in r] == [12]


def test_uneven_validations_are_as_even_as_steps_allow(sequences: Sequences, tmp_path: Path) -> None:
    loop.train(trial_of(sequences, **{"train.steps": 7, "train.validations": 3}), tmp_path / "three")
    assert [r["step"] for r in lines(tmp_path / "three") if "loss" not in r] == [3, 5, 7]
    loop.train(trial_of(sequences, **{"train.steps": 3, "train.validations": 50}), tmp_path / "all")
    assert [r["step"] for r in lines(tmp_path / "all") if "loss" not in r] == [1, 2, 3]


@pytest.mark.parametrize("at", ["step 4", "step 8", "validation 9", "validation 12", "test", "result"])
def test_killed_anywhere_nothing_is_recorded_twice_or_lost(
    sequences: Sequences, tmp_path: Path, validated: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Checkpoints after steps 5, 10 and 12; validations after 3, 6, 9 and 12. TensorBoard shows each step once."""
    trial = trial_of(sequences, **{"train.validations": 4})
    done: list[int] = []

    def progress(record: dict) -> None:
        if at == f"step {record['step']}":
            raise Stopped

    def evaluated(self: Evaluator, params: Any, part: Any, call: Any = Evaluator.each) -> list[metrics.Metrics]:
        done.append(3 * len(done) + 3)
        if at == (part if part == "test" else f"validation {done[-1]}"):
            raise Stopped
        return call(self, params, part)

    def written(path: Path, record: dict[str, Any], write: Any = loop.write_json) -> None:
        if at == path.stem:
            raise Stopped
        write(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "each", evaluated)
        patch.setattr(loop, "write_json", written)
        with pytest.raises(Stopped):
            loop.train(trial, tmp_path / "cut", on_progress=progress)
    time.sleep(1.01 - time.time() % 1)  # event files are read in the order of the seconds in their names
    cut = loop.train(trial, tmp_path / "cut")
    assert len(list((tmp_path / "cut/tensorboard").iterdir())) == 2
    whole = json.loads((validated / "result.json").read_text(encoding="utf-8"))
    assert untimed(cut) == untimed(whole)
    assert lines(tmp_path / "cut") == lines(validated)
    assert board(tmp_path / "cut") == board(validated)
    for tag, shown in board(validated).items():
        assert len({step for step, _ in shown}) == len(shown), tag


def test_time_of_validations_is_not_time_of_training(
    sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = [0.0]

    def slow(*_: Any) -> list[metrics.Metrics]:
        spent[0] += 1000.0
        return [metrics.RankingMetrics(("click",))]

    clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + spent[0])
    monkeypatch.setattr(Evaluator, "each", slow)
    monkeypatch.setattr(loop, "time", clock)
    result = loop.train(trial_of(sequences, **{"train.validations": 4}), tmp_path / "run")
    assert result["train_seconds"] < 1000
    assert result["wall_seconds"] > 5000  # four validations and the test
    shown = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("examples_per_second")
    assert all(event.value > result["targets"] / 1000 for event in shown)


def test_result_is_complete_and_consistent(sequences: Sequences, tmp_path: Path) -> None:
    trial = trial_of(sequences, "dirl", **{"model.heads": 2})
    result = loop.train(trial, tmp_path / "run")
    assert json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8")) == result
    assert result["status"] == "done"
    assert result["train_flops"] == estimate(trial).flops
    assert result["flops_per_target"] * result["targets"] == pytest.approx(result["train_flops"])
    assert result["steps"] * 8 == result["rows"]
    assert result["device"] == device_name()
    assert abs(date.fromisoformat(result["finished"]) - datetime.now(UTC).date()) <= timedelta(days=1)
    assert result["version/jax"] == jax.__version__
    for key in ("ne/click", "auc/like", "gauc", "ne", "validation/ne", "eval_set", "base_rate/click"):
        assert key in result


def test_a_device_is_named_for_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert device_name(file) == f"{platform.machine()}, 2 cores"
    file.write_text("processor\t: 0\nmodel name\t: Abacus 7\ncores\t: 1\n\nmodel name\t: Abacus 7\n", encoding="utf-8")
    assert device_name(file) == "Abacus 7, 2 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert device_name(file) == "Abacus 7, 1 core"


def test_the_account_follows_the_packing(sequences: Sequences) -> None:
    """Thinned histories leave fewer rows, fewer pairs in each, and fewer targets; by the batches of the run itself."""
    settings = {"data.segments": 4, "data.stochastic_length": 1.2, "train.steps": 0, "train.epochs": 2.5}
    thinned, whole = (
        trial_of(sequences, "hstu", **{"model.heads": 2, **settings, **change})
        for change in ({}, {"data.stochastic_length": 2.0})
    )
    counted = plan_account(thinned)
    stream = loop.TrainStream(sequences, thinned.data, "windows", 8, seed=0)
    batches = [next(stream) for _ in range(counted.steps)]
    stream.close()
    pairs, targets = 0.0, 0
    for batch in batches:
        targets += int(batch.history.supervised.sum() + (batch.candidates.segment > 0).sum())
        for s in range(4):
            prefix = 1 + 2 * (batch.history.segment == s + 1).sum(axis=1)[batch.user[:, s] >= 0]
            pairs += (prefix * (prefix + 1) / 2 + 2 * (prefix + 1)).sum()
    assert counted.targets == pytest.approx(targets, rel=0.02)  # the last pass is counted by the share that is in
    filled = Filled(0.0, 0.0, 0.0)
    bare = abstract_model(thinned, sequences.schema).cost(dataclasses.replace(thinned.data.shape, filled=filled)).flops
    per_pair = 4 * 8  # one layer of width 8: a dot product and a value
    assert counted.train_flops == pytest.approx(3 * (bare * counted.rows + per_pair * pairs), rel=0.02)
    assert counted.train_flops < plan_account(whole).train_flops
    assert counted.rows < plan_account(whole).rows


def test_cuts_of_the_log_cost_the_same_and_differ_in_targets(sequences: Sequences) -> None:
    """HSTU on windows, requests and prefixes, one candidate each: equal rows, equal FLOPs, targets as delivered."""
    found = {}
    for rows in ("windows", "requests", "prefixes"):
        settings = {"data.candidates": 1, "data.rows_per_user": 1, "model.rows": rows, "model.heads": 2}
        trial = trial_of(sequences, "hstu", **settings)
        counted = plan_account(trial)
        stream = loop.TrainStream(sequences, trial.data, rows, 8, seed=0)
        batches = [next(stream) for _ in range(counted.steps)]
        stream.close()
        delivered = sum(int(b.history.supervised.sum() + (b.candidates.segment > 0).sum()) for b in batches)
        assert counted.targets == pytest.approx(delivered, rel=0.05)
        found[rows] = counted
    assert len({one.train_flops for one in found.values()}) == 1
    assert found["requests"].targets == found["requests"].rows
    assert found["prefixes"].targets > 3 * found["requests"].targets
    assert found["windows"].targets > 3 * found["requests"].targets


def test_the_test_part_can_be_left_unread(sequences: Sequences, tmp_path: Path) -> None:
    both, one = (loop.train(trial_of(sequences, **{"train.report_test": r}), tmp_path / str(r)) for r in (True, False))
    assert one["validation/ne"] == both["validation/ne"]
    assert "ne" in both
    assert "ne" not in one
    assert one["eval_set"] != both["eval_set"]


def test_tensorboard_holds_scalars_and_hparams(sequences: Sequences, tmp_path: Path) -> None:
    result = loop.train(trial_of(sequences), tmp_path / "run")
    (file,) = (tmp_path / "run/tensorboard").glob("events*")
    found = list(EventFileLoader(str(file)).Load())
    scalars = {(v.tag, event.step): v for event in found for v in event.summary.value}
    losses = {step for tag, step in scalars if tag == "loss"}
    assert losses == {2, 4, 6, 8, 10, 12}
    assert {"mfu", "examples_per_second", "achieved_flops", "grad_norm"} <= {tag for tag, _ in scalars}
    for step in losses:  # 12 steps, one of warm-up
        rate = tensor_util.make_ndarray(scalars["learning_rate", step].tensor).item()
        assert rate == pytest.approx(5e-4 * (1 + math.cos(math.pi * (step - 1) / 12)), rel=1e-6)
    assert all(event.wall_time > 1e9 for event in found)
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
    assert {tag for tag in board(tmp_path / "run") if tag.startswith("validation/")} == {
        f"validation/{name}@{k}" for name in ("hr", "ndcg") for k in (10, 50, 200)
    } | {"validation/mrr"}
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
