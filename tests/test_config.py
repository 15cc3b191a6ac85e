"""Configurations: JSON round trip, dotted overrides, refusals that name the key."""

import json

import pytest

from genrec_jax.config import Trial, default_trial, override, trial_from_json
from genrec_jax.errors import UserError
from genrec_jax.models import registry


@pytest.mark.parametrize("model", registry.names())
def test_round_trip_through_json_keeps_the_hash(model: str) -> None:
    trial = override(default_trial(model, path="somewhere"), {"train.batch_rows": "7", "seed": 3})
    again = trial_from_json(json.loads(json.dumps(trial.to_json())))
    assert again == trial
    assert again.hash == trial.hash
    assert again.train.batch_rows == 7


def test_hash_tells_configurations_apart() -> None:
    trial = default_trial("hstu")
    changed = [override(trial, change) for change in ({"seed": 1}, {"model.depth": 7}, {"data.history": 9})]
    assert len({t.hash for t in [trial, *changed]}) == 4


def test_data_are_known_by_their_digest_wherever_they_lie() -> None:
    trial = override(default_trial("hstu"), {"data.path": "here", "data.digest": "0123456789ab"})
    assert override(trial, {"data.path": "there"}).hash == trial.hash
    assert override(trial, {"data.digest": "ba9876543210"}).hash != trial.hash
    assert trial_from_json(trial.to_json()).data.path == "here"


BAD = [
    ({"model.no_such": 1}, "model.no_such"),
    ({"nonsense": 1}, "nonsense"),
    ({"data": 1}, "section"),
    ({"data.history.x": 1}, "data.history.x"),
    ({"data.history": 0}, "data.history"),
    ({"data.history": "many"}, "data.history"),
    ({"data.history": 3.5}, "data.history"),
    ({"data.candidates": -1}, "data.candidates"),
    ({"data.fraction": 0}, "data.fraction"),
    ({"data.fraction": 1.5}, "data.fraction"),
    ({"data.validation": 0.6, "data.test": 0.4}, "data.validation"),
    ({"train.epochs": -1}, "train.epochs"),
    ({"train.steps": -5}, "train.steps"),
    ({"train.learning_rate": 0}, "train.learning_rate"),
    ({"train.learning_rate": "nan"}, "train.learning_rate"),
    ({"train.warmup": 1}, "train.warmup"),
    ({"train.precision": "float8"}, "train.precision"),
    ({"train.batch_rows": 0}, "train.batch_rows"),
    ({"train.batch_rows": 10, "train.pieces": 4}, "train.pieces"),
    ({"train.checkpoint_seconds": -1}, "train.checkpoint_seconds"),
    ({"train.validations": 0}, "train.validations"),
    ({"train.validations": -2}, "train.validations"),
    ({"train.validations": 2**31}, "train.validations"),
    ({"train.epochs": "inf"}, "train.epochs"),
    ({"train.epochs": 1e9}, "train.epochs"),
    ({"train.steps": 2**31}, "train.steps"),
    ({"train.steps": 3, "train.epochs": "nan"}, "train.epochs"),
    ({"train.learning_rate": "inf"}, "train.learning_rate"),
    ({"train.learning_rate": "1e400"}, "train.learning_rate"),
    ({"train.learning_rate": 10**400}, "train.learning_rate"),
    ({"train.learning_rate": 1e300}, "train.learning_rate"),
    ({"train.embedding_learning_rate": "inf"}, "train.embedding_learning_rate"),
    ({"train.clip": "inf"}, "train.clip"),
    ({"train.clip": -1}, "train.clip"),
    ({"train.decay": "linear"}, "train.decay"),
    ({"data.protocol": "original"}, "data.protocol"),
    ({"data.split": "items"}, "data.split"),
    ({"train.beta1": 1.0}, "train.beta1"),
    ({"train.beta1": -0.1}, "train.beta1"),
    ({"train.beta2": 1.5}, "train.beta2"),
    ({"train.beta2": "nan"}, "train.beta2"),
    ({"train.weight_decay": -1e-3}, "train.weight_decay"),
    ({"train.weight_decay": "inf"}, "train.weight_decay"),
    ({"train.embedding_weight_decay": -1.0}, "train.embedding_weight_decay"),
    ({"train.embedding_weight_decay": "nan"}, "train.embedding_weight_decay"),
    ({"train.batch_rows": 2**40}, "train.batch_rows"),
    ({"data.history": 10**12}, "data.history"),
    ({"data.candidates": 10**12}, "data.candidates"),
    ({"data.segments": 10**12}, "data.segments"),
    ({"data.eval_impressions": 10**30}, "data.eval_impressions"),
    ({"data.workers": 10**6}, "data.workers"),
    ({"seed": 2**63}, "seed"),
    ({"model.width": 10**12}, "model.width"),
    ({"model.dropout": "nan"}, "model.dropout"),
    ({"seed": -1}, "seed"),
    ({"model.width": 0}, "model.width"),
    ({"model.width": 30, "model.heads": 4}, "model.heads"),
    ({"model.depth": -1}, "model.depth"),
    ({"model.dropout": 1.0}, "model.dropout"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_bad_configuration_is_refused_by_key(change: dict, named: str) -> None:
    with pytest.raises(UserError) as refusal:
        override(default_trial("hstu"), change)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown model 'nope'.*dlrm.*hstu"):
        default_trial("nope")


def test_unknown_section_in_json_is_refused() -> None:
    record = default_trial("dlrm").to_json() | {"extra": {"a": 1}}
    with pytest.raises(UserError, match="extra"):
        trial_from_json(record)


def test_trial_defaults_are_valid_for_every_model() -> None:
    for name in registry.names():
        assert isinstance(override(default_trial(name), {}), Trial)
