"""The maximal-update parametrisation: what it scales, and that nothing grows or vanishes with the width."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.coordinate_check import movements, slopes
from genrec_jax.batch import Shape
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig
from genrec_jax.models.mup import rates
from genrec_jax.train.estimate import abstract_model
from genrec_jax.train.optimizer import make_optimizer, make_row_rule
from tests.models.gr_helpers import SCHEMA, initialised, random_batch

SHAPE = Shape(8, 4, 1)
SIZES = {"data.history": 8, "data.candidates": 4, "model.depth": 2, "model.dropout": 0.0}


def trial(model: str, width: int, base: int, **more: object) -> Trial:
    sizes = {"model.width": width, "model.heads": max(1, width // 32), "model.base_width": base}
    return override(default_trial(model), {**SIZES, **sizes, **{key.replace("__", "."): x for key, x in more.items()}})


def initial(one: Trial) -> Any:
    """Its initial parameters."""
    return nnx.to_pure_dict(nnx.state(initialised(one.model, SHAPE), nnx.Param))


@pytest.mark.parametrize("model", ["hstu", "dirl", "transformer"])
def test_at_the_base_width_it_is_the_standard_parametrisation(model: str) -> None:
    standard, own = trial(model, 32, 0), trial(model, 32, 32)
    assert rates(abstract_model(own, SCHEMA)) == {}
    jax.tree.map(np.testing.assert_array_equal, initial(standard), initial(own))
    scales = [scale_of_products(model, one.model) for one in (standard, own)]
    assert scales[0] == pytest.approx(scales[1])


def test_blocks_of_models_deeper_than_the_base_add_their_share() -> None:
    shares = [trial("hstu", 32, 32, model__base_depth=2, model__depth=depth).model.branch for depth in (1, 2, 4, 8)]
    assert shares == [1.0, 1.0, 0.5, 0.25]


def test_initial_values_and_rates_by_hand() -> None:
    """Four times the base width, twice the base depth."""
    wide = trial("hstu", 128, 32, model__base_depth=1)
    found, params = rates(abstract_model(wide, SCHEMA)), initial(wide)
    standard = initial(trial("hstu", 128, 0))
    block = ("stack", "blocks", 1)
    assert found[(*block, "project", "kernel")] == 1 / 4
    assert found[(*block, "out", "kernel")] == 1 / 4 / 2
    assert found[(*block, "out", "bias")] == 1 / 2
    assert found[("head", "kernel")] == 1 / 4
    assert found[("items", "items", "rows_table")] == 1 / 2
    assert found[("actions", "actions", "rows_table")] == 1 / 2
    alone = {("head", "bias"), (*block, "bias", "time"), (*block, "bias", "position"), ("context", "start")}
    assert not alone & found.keys()
    halves = [
        lambda tree: tree["head"]["kernel"],  # 1 / sqrt(m)
        lambda tree: tree["stack"]["blocks"][1]["out"]["kernel"],  # the branch
    ]
    for part in halves:
        np.testing.assert_allclose(part(params), 0.5 * part(standard), rtol=1e-6)
    for part in (lambda tree: tree["stack"]["blocks"][1]["project"]["kernel"], lambda tree: tree["items"]["items"]):
        jax.tree.map(np.testing.assert_array_equal, part(params), part(standard))


def test_features_of_a_request_do_not_fade_beside_a_wide_item() -> None:
    """DirL reads them by a map of their own, whose fan-in does not grow: it starts and moves as at the base width."""
    wide = trial("dirl", 512, 32)
    own, base = (np.asarray(initial(one)["cross"]["beside"]["kernel"]) for one in (wide, trial("dirl", 32, 0)))
    assert ("cross", "beside", "kernel") not in rates(abstract_model(wide, SCHEMA))
    assert np.std(own) == pytest.approx(np.std(base), rel=0.15)


@pytest.mark.parametrize(
    ("model", "heads", "wanted"), [("hstu", 1, 32 / 128), ("hstu", 4, 1.0), ("transformer", 1, 32**0.5 / 128)]
)
def test_products_of_queries_and_keys_are_divided_by_the_width_of_a_head(model: str, heads: int, wanted: float) -> None:
    config = dataclasses.replace(trial(model, 128, 32).model, heads=heads)
    assert scale_of_products(model, config) == pytest.approx(wanted)


def scale_of_products(model: str, config: ModelConfig) -> float:
    """By which its first block multiplies the product of a query and a key."""
    built = nnx.eval_shape(lambda: registry.build(config, Build(SCHEMA, SHAPE, jnp.dtype("float32")), rngs=nnx.Rngs(0)))
    block = built.ranker.stack.blocks[0] if model == "transformer" else built.stack.blocks[0]
    return float(block.scale if model == "transformer" else block.alpha)


def test_a_step_moves_each_parameter_at_its_own_rate_and_decays_all_alike() -> None:
    wide = trial("hstu", 128, 32, train__weight_decay=0.5, train__clip=0.0, train__embedding_learning_rate=1e-3)
    params, factors = initial(wide), rates(abstract_model(wide, SCHEMA))
    grads = jax.tree.map(jnp.ones_like, params)
    moved = []
    for own in (factors, {}):
        optimizer = make_optimizer(wide.train, 10, own)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        moved.append(updates)
    rate = wide.train.learning_rate  # the first of ten steps is the whole of the warm-up
    head, plain = (tree["head"]["kernel"] for tree in moved)
    decay = -rate * 0.5 * params["head"]["kernel"]
    np.testing.assert_allclose(plain, decay - rate, rtol=1e-4)
    np.testing.assert_allclose(head, decay - rate / 4, rtol=1e-4)
    table, plain = (tree["items"]["items"]["rows_table"] for tree in moved)
    np.testing.assert_allclose(table, 0.5 * plain, rtol=1e-5)


def test_row_wise_rules_move_tables_at_their_rate() -> None:
    wide = trial("hstu", 128, 32, train__embedding_optimizer="rowwise_adamw")
    rule = make_row_rule(wide.train, 10, rates(abstract_model(wide, SCHEMA)))
    plain = make_row_rule(wide.train, 10)
    assert rule is not None
    assert plain is not None
    assert rule.rate(3) == pytest.approx(0.5 * plain.rate(3))


@pytest.mark.parametrize(("model", "widest", "depth"), [("hstu", 1024, 2), ("dirl", 512, 1), ("transformer", 512, 1)])
def test_coordinates_are_level(model: str, widest: int, depth: int) -> None:
    """What four steps move in a model with heads of 32 does not depend on its width."""
    for name, power in powers(model, (32, widest), 32, depth).items():
        assert abs(power) < 0.15, name


def test_coordinates_of_the_standard_parametrisation_grow() -> None:
    """So the check above can fail."""
    found = powers("hstu", (32, 256), 0, 1)
    assert min(found.values()) > 0.15
    assert found["block 1"] > 0.4


def powers(model: str, widths: tuple[int, ...], base: int, depth: int) -> dict[str, float]:
    """By quantity, the power of the width by which four steps on one batch move it."""
    training = {"learning_rate": 0.01, "embedding_learning_rate": 0.02, "decay": "constant", "batch_rows": 6}
    keys: dict[str, Any] = {f"train__{key}": value for key, value in training.items()} | {"model__depth": depth}
    batch = random_batch(SHAPE, [[8], [5], [0], [7], [8], [6]])
    moved = [movements(trial(model, width, base, **keys), SCHEMA, batch, 4) for width in widths]
    return {name: slopes(widths, [each[name][-1] for each in moved]) for name in moved[0]}


def test_refusals() -> None:
    for key in ("model.base_width", "model.base_depth"):
        with pytest.raises(UserError, match="must not be negative"):
            override(default_trial("hstu"), {key: -1})
    with pytest.raises(UserError, match="unknown configuration key"):
        override(default_trial("dlrm"), {"model.base_width": 32})
