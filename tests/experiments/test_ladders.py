"""The frozen recipes: rates by hand, and every rung a trial that trains."""

import dataclasses
from pathlib import Path

import pytest

from experiments import gr_vs_dlrm, lr_depth, rate_check
from experiments.ladders import LADDER, Ladder, Recipe, heads, read
from genrec_jax.config import TrainConfig, default_trial, override
from genrec_jax.errors import UserError


def test_learning_rate_falls_with_the_width_from_32_on() -> None:
    recipe = Recipe(0.02, 1.5, 0.1, 16)
    expected = {
        "train.learning_rate": 0.02,
        "train.embedding_learning_rate": 0.04,
        "train.batch_rows": 16,
        "model.dropout": 0.1,
    }
    assert recipe.training(16) == recipe.training(32) == expected
    assert recipe.training(128)["train.learning_rate"] == 0.0025  # (1 / 4) ** 1.5
    assert recipe.training(128)["train.embedding_learning_rate"] == 0.005
    assert Recipe(0.02, 0.5, 0.0, 32).training(128)["train.learning_rate"] == 0.01


def test_a_ladder_that_extends_another_has_its_rungs() -> None:
    mup = read("mup")
    assert mup.sizes == LADDER.sizes
    assert mup.base == LADDER.base
    assert mup.recipes["dlrm"] == LADDER.recipes["dlrm"]
    assert {point.values["train.learning_rate"] for point in mup.rungs("hstu", 0, 10)} == {0.02}
    assert {point.values["model.base_width"] for point in mup.rungs("dirl", 0, 10)} == {32}


def test_a_ladder_that_extends_another_may_set_keys_anew(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "tuned"\n[train]\nwarmup = 0.1\n[data]\ntest = 0.03\n', encoding="utf-8")
    mine = read(str(file))
    assert mine.base == {**LADDER.base, "train.warmup": 0.1, "data.test": 0.03}
    assert (mine.recipes, mine.sizes) == (LADDER.recipes, LADDER.sizes)
    assert mine.mark.partition("@")[2] != LADDER.mark.partition("@")[2]


def test_mup_leaves_the_rate_alone_and_sets_the_base() -> None:
    found = Recipe(0.02, 0.0, 0.0, 16, base_width=32, base_depth=2).training(512)
    assert found["train.learning_rate"] == 0.02
    assert (found["model.base_width"], found["model.base_depth"]) == (32, 2)


@pytest.mark.parametrize("family", LADDER.sizes)
def test_rungs_train_by_the_family_recipe_or_by_another(family: str) -> None:
    chosen = list(LADDER.rungs(family, 1, 3))
    assert [point.label for point in chosen] == ["s1", "s2", "s3"]
    for point, sizes in zip(chosen, LADDER.sizes[family][1:4], strict=True):
        assert point.values == {**sizes, **LADDER.training(family, sizes["model.width"])}
    (other,) = LADDER.rungs(family, 2, 2, Recipe(1e-4, 0.0, 0.3, 8))
    assert other.values["train.learning_rate"] == 1e-4
    assert other.values["model.dropout"] == 0.3


@pytest.mark.parametrize("family", LADDER.sizes)
def test_every_rung_is_a_trial_and_bigger_than_the_last(family: str) -> None:
    points = list(LADDER.rungs(family, 0, len(LADDER.sizes[family]) - 1))
    trials = [override(default_trial(family), {**LADDER.base, **point.values}) for point in points]
    sizes = [(one.model.width, one.model.depth, one.train.epochs) for one in trials]
    assert sizes == sorted(sizes)


def test_a_ladder_fixes_what_training_depends_on() -> None:
    """All of the training but what a rung or the machine decides; so that a new default changes no ladder."""
    machine = {"pieces", "select", "report_test", "log_every", "checkpoint_every", "checkpoint_seconds", "validations"}
    rung = {"epochs", "steps", "learning_rate", "embedding_learning_rate", "batch_rows"}
    open_ = machine | rung | {"embedding_precision"}  # of row-wise rules alone
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {f"train.{name}" for name in fields - open_} <= LADDER.base.keys()


def test_the_mark_is_of_everything_that_is_set() -> None:
    """Of this ladder: a change is a new recipe, with a name of its own."""
    assert LADDER.mark == "tuned@f3bf98e4be88"
    assert read("tuned").mark == LADDER.mark
    assert read("mup").mark == "mup@58aef3cf3ddf"
    assert read("growing").mark == "growing@9b4ad13eb1e5"
    assert read("world").mark == "world@3ad5c09447a5"
    assert read("globo").mark == "globo@612594692bfd"
    changed: list[Ladder] = [
        dataclasses.replace(LADDER, base={**LADDER.base, "train.warmup": 0.1}),
        dataclasses.replace(LADDER, recipes={**LADDER.recipes, "din": Recipe(0.01, 0.5, 0.0, 32)}),
        dataclasses.replace(LADDER, sizes={**LADDER.sizes, "hstu": LADDER.sizes["hstu"][1:]}),
    ]
    assert len({LADDER.mark, *(one.mark for one in changed)}) == 4


def test_a_file_of_ones_own_is_a_ladder_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'extends = "tuned"\n[hstu]\nlearning_rate = 0.005\npower = 1.0\ndropout = 0.1\nbatch_rows = 8\n'
        "rungs = [{ width = 64, depth = 3, epochs = 2.0 }]\n",
        encoding="utf-8",
    )
    mine = read(str(file))
    assert (mine.name, mine.base, mine.sizes["dlrm"]) == ("mine", LADDER.base, LADDER.sizes["dlrm"])
    (point,) = mine.rungs("hstu", 0, 0)
    assert point.values["train.learning_rate"] == 0.0025
    assert (point.values["model.width"], point.values["train.epochs"]) == (64, 2.0)
    assert mine.mark.startswith("mine@")
    assert mine.mark.partition("@")[2] != LADDER.mark.partition("@")[2]

    by_mine = rate_check.STUDY.on(read("mup"))
    rates = {one.trial.train.learning_rate for one in by_mine.trials("data", "small") if one.family == "hstu"}
    assert rates == {0.02 * factor for factor in rate_check.FACTORS}
    with pytest.raises(UserError, match="ladder 'mine' has no rung s4 of hstu"):
        rate_check.STUDY.on(mine)
    assert list(gr_vs_dlrm.STUDY.points) == ["small", "medium", "large"]
    assert list(gr_vs_dlrm.STUDY.on(read("growing")).points) == ["small", "medium"]
    assert not gr_vs_dlrm.STUDY.on(mine).points
    with pytest.raises(UserError, match="study 'lr_depth' follows no ladder"):
        lr_depth.STUDY.on(mine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[hstu", "is not valid TOML"),
        ("[data]\nhistory = 8", r"sections \[data\] and \[train\]"),
        ('extends = "tuned"\ntrain = 0.1', r"sections \[data\] and \[train\]"),
        ('extends = "tuned"\nwidth = 3', "'width' is neither a key of a ladder nor a model"),
        ('extends = "tuned"\n[hsut]\npower = 1', "'hsut' is neither a key of a ladder nor a model"),
        ('extends = "tuned"\n[hstu]\npower = 1.0', r"\[hstu\] must have a number 'learning_rate'"),
        ('extends = "tuned"\n[hstu]\nrate = 1.0', r"\[hstu\] has an unknown key 'rate'"),
        ('extends = "tuned"\n[hstu]\nrungs = [{ width = 8 }]', "a list of tables with a width and a depth"),
        ('extends = "tunde"', "there is no ladder 'tunde'; give one of globo, growing, mup, tuned, world"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(str(file))


@pytest.mark.parametrize("width", [16, 24, 48, 64, 96, 160, 256, 320, 1280])
def test_heads_divide_the_width_and_are_never_narrower_than_32(width: int) -> None:
    assert width % heads(width) == 0
    assert width // heads(width) >= min(32, width)
