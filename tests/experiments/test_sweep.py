from typing import Any

import pytest
from fake_trainer import FakeConfig

from experiments.study import Study
from experiments.sweep import Sweep, ladder, model, param, zipped
from genrec_jax.errors import UserError
from genrec_jax.models import registry


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._MODELS, "fake", (FakeConfig, object))  # type: ignore[arg-type]


def study(points: Sweep, **settings: Any) -> Study:
    defaults: dict[str, Any] = {"metric": "ne", "axis": "model.width"}
    return Study("depth", "Depth", "Does depth pay?", {"small": points}, **{**defaults, **settings})


def test_product_pairs_everything() -> None:
    points = list(model("fake") * param("model.width", [8, 16], axis=True) * param("seed", [0, 1]))
    assert [(p.label, p.axis_value, p.values) for p in points] == [
        ("width=8", 8, {"model.width": 8, "seed": 0}),
        ("width=8", 8, {"model.width": 8, "seed": 1}),
        ("width=16", 16, {"model.width": 16, "seed": 0}),
        ("width=16", 16, {"model.width": 16, "seed": 1}),
    ]
    assert {p.family for p in points} == {"fake"}


def test_zip_walks_in_step_and_sum_concatenates() -> None:
    sweep = zipped(param("model.width", [8, 16]), param("train.learning_rate", [1e-3, 5e-4])) + param(
        "model.steps", [3]
    )
    assert [p.label for p in sweep] == ["width=8 learning_rate=0.001", "width=16 learning_rate=0.0005", "steps=3"]
    with pytest.raises(UserError, match="2 and 1 points"):
        zipped(param("model.width", [8, 16]), param("seed", [0]))


def test_ladder_names_its_rungs() -> None:
    rungs = {"S": {"model.width": 8, "model.steps": 2}, "M": {"model.width": 16, "model.steps": 4}}
    assert [(p.label, p.axis_value, p.values) for p in ladder(rungs)] == [
        ("S", None, rungs["S"]),
        ("M", None, rungs["M"]),
    ]


def test_an_axis_has_numbers() -> None:
    with pytest.raises(UserError, match=r"the axis 'model.behaviour' must have numbers as values, not 'raise'"):
        param("model.behaviour", ["raise"], axis=True)
    assert [p.axis_value for p in param("model.behaviour", ["raise"])] == [None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: param("seed", [0]) * param("seed", [1]), "sets 'seed' twice"),
        (lambda: model("fake") * (model("fake") + model("hstu")), "two models"),
        (lambda: param("seed", [0], axis=True) * param("model.width", [8], axis=True), "two axes"),
    ],
)
def test_nothing_is_set_twice(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_study_resolves_its_trials() -> None:
    points = model("fake", family="wide") * param("model.width", [8, 16], axis=True) * param("seed", [0, 1])
    planned = study(points, base={"train.batch_rows": 7, "model.steps": "9"}).trials("data/world", "small")
    assert [one.name for one in planned][:2] == ["wide width=8 seed=0", "wide width=8 seed=1"]
    trial = planned[3].trial
    assert isinstance(trial.model, FakeConfig)
    assert (trial.data.path, trial.train.batch_rows, trial.model.width, trial.model.steps, trial.seed) == (
        "data/world",
        7,
        16,
        9,
        1,
    )
    assert (planned[3].study, planned[3].axis, planned[3].axis_value) == ("depth", "model.width", 16)
    assert len({one.trial.hash for one in planned}) == 4


@pytest.mark.parametrize(
    ("points", "base", "message"),
    [
        (model("fake") * param("model.depht", [1]), {}, "unknown configuration key 'model.depht'"),
        (model("fake"), {"model.depht": 1}, "unknown configuration key 'model.depht'"),
        (model("fake") * param("seed", [0]), {"seed": 1}, "sets 'seed' for all its points and again"),
        (param("seed", [0]), {}, "names no model"),
        (model("fake") + model("fake"), {}, "two points of study 'depth' are called 'fake seed=0'"),
    ],
)
def test_study_refuses(points: Sweep, base: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(points, base=base).trials("data/world", "small")


def test_settings_hold_for_every_trial_and_are_in_the_recipes_name() -> None:
    points = model("fake") * param("model.width", [8, 16])
    found = study(points, base={"train.batch_rows": 7}).with_settings({"train.batch_rows": "9", "data.test": "0.03"})
    planned = found.trials("data/world", "small")
    assert [(one.trial.train.batch_rows, one.trial.data.test) for one in planned] == [(9, 0.03)] * 2
    assert [one.recipe for one in planned] == ["with data.test=0.03, train.batch_rows=9"] * 2
    assert study(points).with_settings({}) == study(points)


@pytest.mark.parametrize(
    ("key", "message"),
    [("model.width", "the points of study 'depth' set it themselves"), ("data.path", "the dataset is named by --data")],
)
def test_settings_that_a_study_cannot_take_are_refused(key: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--set {key}=...: {message}"):
        study(model("fake") * param("model.width", [8])).with_settings({key: "16"})


def test_unknown_budget_is_refused() -> None:
    with pytest.raises(UserError, match="has no budget 'large'; it has: small"):
        study(model("fake")).trials("data/world", "large")
