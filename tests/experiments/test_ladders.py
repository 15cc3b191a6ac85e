"""The frozen recipes: rates by hand, and every rung a trial that trains."""

import pytest

from experiments.ladders import RECIPES, RUNGS, Recipe, heads, rungs, training


def test_learning_rate_falls_with_the_width_from_32_on() -> None:
    recipe = Recipe(0.02, 1.5, 0.1, 16)
    expected = {
        "train.learning_rate": 0.02,
        "train.embedding_learning_rate": 0.04,
        "train.batch_rows": 16,
        "model.dropout": 0.1,
    }
    assert training(recipe, 16) == training(recipe, 32) == expected
    assert training(recipe, 128)["train.learning_rate"] == 0.0025  # (1 / 4) ** 1.5
    assert training(recipe, 128)["train.embedding_learning_rate"] == 0.005
    assert training(Recipe(0.02, 0.5, 0.0, 32), 128)["train.learning_rate"] == 0.01


@pytest.mark.parametrize("family", RUNGS)
def test_rungs_train_by_the_family_recipe_or_by_another(family: str) -> None:
    chosen = list(rungs(family, 1, 3))
    assert [point.label for point in chosen] == ["s1", "s2", "s3"]
    for point, sizes in zip(chosen, RUNGS[family][1:4], strict=True):
        assert point.values == {**sizes, **training(RECIPES[family], sizes["model.width"])}
    (other,) = rungs(family, 2, 2, Recipe(1e-4, 0.0, 0.3, 8))
    assert other.values["train.learning_rate"] == 1e-4
    assert other.values["model.dropout"] == 0.3


@pytest.mark.parametrize("width", [16, 24, 48, 64, 96, 160, 256, 320, 1280])
def test_heads_divide_the_width_and_are_never_narrower_than_32(width: int) -> None:
    assert width % heads(width) == 0
    assert width // heads(width) >= min(32, width)
