"""Retrieval's protocols: batches packed by themselves, packed evaluation, which evaluation is watched and selected."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from genrec_jax.config import override
from genrec_jax.data.pipeline import evaluation_batches
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.metrics import Metrics
from genrec_jax.train import loop
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.evaluate import Evaluator, make_scorer
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import bind, init_state, make_step
from tests.data.helpers import random_dataset
from tests.train.helpers import Stopped, lines, trial_of, untimed

RETRIEVAL = {
    "data.candidates": 1,
    "data.segments": 3,
    "data.packing": "batch",
    "model.heads": 1,
    "model.negatives": 4,
}


WHOLE = {"data.history": 40, "model.dropout": 0.0, "model.negatives": 0}  # nothing cut, nothing drawn


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


def test_pieces_without_events_are_skipped_without_a_trace(sequences: Sequences) -> None:
    """A batch packed by itself leaves rows empty: in pieces or whole, the gradient is the same."""
    trial = trial_of(sequences, "hstu_retrieval", **(RETRIEVAL | WHOLE))
    optimizer = make_optimizer(trial.train, 10)
    batch = next(iter(loop.TrainStream(sequences, trial.data, "users", 8, seed=0)))
    occupied = (np.asarray(batch.user) >= 0).any(axis=1)
    assert occupied[:2].all()
    assert not occupied[-2:].any()
    model = abstract_model(trial, sequences.schema)
    found = []
    for pieces in (1, 4):
        state = init_state(init_params(trial, sequences.schema), optimizer, 0)
        state, metrics_ = make_step(model, optimizer, pieces)(state, batch)
        found.append((state.params, {k: float(v) for k, v in metrics_.items()}))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for one, other in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def ranks_by_hand(model: Any, params: Any, batches: Any) -> list[int]:
    """Ranks of the targets by sorting in float64, one user at a time."""
    bound = bind(model, params)
    items, out = np.asarray(bound.items(), np.float64), []
    for batch in batches:
        users = np.asarray(bound.users(batch), np.float64)
        for row in np.flatnonzero(batch.candidates.segment[:, 0]):
            target = int(batch.candidates.item[row, 0])
            others = set(range(1, len(items))) - set(batch.history.item[row].tolist()) - {target}
            scores = items @ users[row, 0]
            out.append(1 + sum(scores[i] >= scores[target] for i in others))
    return out


@pytest.mark.parametrize("held", [1 << 24, 700])
def test_packed_evaluation_equals_one_user_at_a_time(
    sequences: Sequences, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """Scores held all at once and few at a time, the last part shorter."""
    monkeypatch.setattr("genrec_jax.train.evaluate._SCORES", held)
    trial = trial_of(sequences, "hstu_retrieval", **RETRIEVAL)
    single = override(trial, {"data.segments": 1})
    model, params = abstract_model(trial, sequences.schema), init_params(trial, sequences.schema)
    wanted = ranks_by_hand(model, params, evaluation_batches(sequences, single.data, "retrieval", "test", 50))
    scorer = make_scorer(model)
    for one in (trial, single):
        batches = evaluation_batches(sequences, one.data, "retrieval", "test", 5)
        found = np.concatenate([np.asarray(scorer(params, batch)).ravel() for batch in batches])
        np.testing.assert_array_equal(np.sort(found[found > 0]), np.sort(wanted))


def evaluations(run: Path, part: str) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of every recorded evaluation of a part."""
    start = f"{part}/"
    found = [(r["step"], {k[len(start) :]: v for k, v in r.items() if k.startswith(start)}) for r in lines(run)]
    return [(step, metrics_) for step, metrics_ in found if metrics_]


def test_the_original_protocol_watches_the_test_part(sequences: Sequences, tmp_path: Path) -> None:
    settings = {**RETRIEVAL, "data.protocol": "original", "train.validations": 3}
    trial = trial_of(sequences, "hstu_retrieval", **settings)
    result = loop.train(trial, tmp_path / "run")
    watched = evaluations(tmp_path / "run", "test")
    assert [step for step, _ in watched] == [4, 8, 12]
    assert watched[-1][1].items() <= result.items()
    assert result["tested_step"] == 12
    assert not any(key.startswith("validation/") for key in result)
    _, model, params = loop.restored(trial, tmp_path / "run")
    assert Evaluator(trial, sequences, model)(params, "test").items() <= result.items()
    with pytest.raises(UserError, match=r"data\.protocol"):
        override(trial, {"train.select": "best"})
    with pytest.raises(UserError, match=r"data\.protocol"):
        trial_of(sequences, **{"data.protocol": "original"})
    with pytest.raises(UserError, match=r"'data\.split' can be 'users' for ranking alone"):
        override(trial, {"data.split": "users"})


# With this seed the best of the validations is neither the first nor the last.
SELECTING = {
    "seed": 4,
    **RETRIEVAL,
    "train.validations": 6,
    "train.select": "best",
    "train.learning_rate": 0.3,
    "train.decay": "constant",
}


@pytest.fixture(scope="module")
def selected(sequences: Sequences, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 12 steps with six validations, tested at the best of them, left alone."""
    run = tmp_path_factory.mktemp("selected") / "run"
    return run, loop.train(trial_of(sequences, "hstu_retrieval", **SELECTING), run)


def test_the_best_validation_is_tested(sequences: Sequences, selected: tuple[Path, dict[str, Any]]) -> None:
    run, result = selected
    watched = evaluations(run, "validation")
    best = max(watched, key=lambda pair: (pair[1]["ndcg@10"], pair[0]))
    assert watched[0][0] < best[0] < watched[-1][0] == 12
    assert result["tested_step"] == best[0]
    assert {f"validation/{key}": value for key, value in best[1].items()}.items() <= result.items()
    trial = trial_of(sequences, "hstu_retrieval", **SELECTING)
    _, model, params = loop.restored(trial, run)
    evaluator = Evaluator(trial, sequences, model)
    assert evaluator(params, "validation") == best[1]
    assert evaluator(params, "test").items() <= result.items()


@pytest.mark.parametrize("at", ["validation 6", "test"])
def test_a_killed_selection_resumes_exactly(
    sequences: Sequences,
    tmp_path: Path,
    selected: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    """Killed after an evaluation was recorded, before its checkpoint; and after the last step."""
    trial = trial_of(sequences, "hstu_retrieval", **SELECTING)

    def saved(self: Checkpoints, step: int, *rest: Any, save: Any = Checkpoints.save) -> None:
        if at == f"validation {step}":
            raise Stopped
        save(self, step, *rest)

    def evaluated(self: Evaluator, params: Any, part: Any, call: Any = Evaluator.each) -> list[Metrics]:
        if at == part:
            raise Stopped
        return call(self, params, part)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved)
        patch.setattr(Evaluator, "each", evaluated)
        with pytest.raises(Stopped):
            loop.train(trial, tmp_path / "cut")
    run, result = selected
    assert untimed(loop.train(trial, tmp_path / "cut")) == untimed(result)
    assert lines(tmp_path / "cut") == lines(run)
