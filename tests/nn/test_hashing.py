"""Item tables with fewer rows than items."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genrec_jax.config import default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.errors import UserError
from genrec_jax.nn.hashing import HashedTable, Hashing, Kind
from genrec_jax.train.estimate import abstract_model, init_params

KINDS: tuple[Kind, ...] = ("quotient_remainder", "double")
VOCAB, DIM, ROWS = 23, 4, 5


def table(kind: Kind, vocab: int = VOCAB, dim: int = DIM, rows: int = ROWS) -> HashedTable:
    return HashedTable(Hashing(kind, rows), vocab, dim, rngs=nnx.Rngs(0))


def test_an_item_is_the_product_of_its_quotients_and_its_remainders_row() -> None:
    items = table("quotient_remainder")
    remainders, quotients = (np.array(own.rows_table[...], np.float64) for own in items.tables)
    assert (len(remainders), len(quotients)) == (1 + 5, 1 + 5)  # 22 items: quotients 0 to 4, and padding
    want = [np.zeros(DIM)] + [remainders[1 + n % 5] * quotients[1 + n // 5] for n in range(VOCAB - 1)]
    np.testing.assert_allclose(items(jnp.arange(VOCAB)), want, rtol=1e-6)
    assert len({tuple(row) for row in want}) == VOCAB


def test_an_item_is_the_sum_of_the_rows_of_two_hashes() -> None:
    items = table("double", vocab=1001, rows=64)
    (own,) = items.tables
    rows, first, second = np.array(own.rows_table[...], np.float64), *map(np.array, items._places(jnp.arange(1001)))
    np.testing.assert_allclose(items(jnp.arange(1, 1001)), rows[first[1:]] + rows[second[1:]], rtol=1e-5, atol=1e-7)
    assert (first[0], second[0]) == (0, 0)
    for places in (first[1:], second[1:]):
        load = np.bincount(places, minlength=65)
        assert load[0] == 0
        assert (load[1:].min(), load[1:].max()) == pytest.approx((1000 / 64, 1000 / 64), abs=4 * (1000 / 64) ** 0.5)
    # Of 499,500 pairs of items as many as chance has it, one in 64², have both rows in common.
    together = np.bincount(first[1:] * 65 + second[1:])
    assert (together * (together - 1) / 2).sum() == pytest.approx(499_500 / 64**2, rel=0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_have_the_size_of_a_row_of_their_own(kind: Kind) -> None:
    items = table(kind, vocab=20_001, dim=16, rows=2_000)
    std = float(items(jnp.arange(1, 20_001)).std())
    cut = 0.88  # deviation of a normal cut at two of them; a product has it twice
    assert std == pytest.approx((cut if kind == "double" else cut**2) * 16**-0.5, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_zero_and_moves_nothing(kind: Kind) -> None:
    items = table(kind)

    @nnx.grad
    def gradient(module: HashedTable, ids: jax.Array) -> jax.Array:
        return (module(ids) ** 2).sum()

    ids = jnp.array([[0, 3], [0, 0]])
    assert not items(ids)[0, 0].any()
    assert items.rows().shape == (VOCAB, DIM)
    np.testing.assert_array_equal(items.rows()[items.places(ids)], items(ids))
    moved = [np.abs(x).sum(axis=1) for x in jax.tree.leaves(gradient(items, ids))]
    assert sum(int((x > 0).sum()) for x in moved) == 2
    assert all(x[0] == 0 for x in moved)
    assert not any(x.any() for x in jax.tree.leaves(gradient(items, jnp.zeros(3, jnp.int32))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["dlrm", "hstu", "dirl", "sasrec"])
def test_models_hold_what_their_accounts_say(model: str, kind: Kind) -> None:
    settings = {"model.item_rows": 100, "model.item_hashing": kind, "data.history": 8, "train.steps": 3}
    trial = override(default_trial(model), settings | ({"data.candidates": 1} if model == "sasrec" else {}))
    schema = Schema(items=1000, tasks=("click",))
    held = jax.tree.map(lambda x: x.size, init_params(trial, schema))
    account = abstract_model(trial, schema).cost(trial.data.shape)
    assert account.dense_params + account.embedding_params == sum(jax.tree.leaves(held))
    whole = abstract_model(override(trial, {"model.item_rows": 0}), schema).cost(trial.data.shape)
    assert account.embedding_params < whole.embedding_params / 4
    assert account.embedding_reads > whole.embedding_reads


def test_rows_that_save_nothing_are_refused() -> None:
    trial = override(default_trial("dlrm"), {"model.item_rows": 50})
    assert abstract_model(trial, Schema(items=51, tasks=("click",)))
    with pytest.raises(UserError, match=r"'model.item_rows' \(50\) must be less than the dataset's items \(50\)"):
        abstract_model(trial, Schema(items=50, tasks=("click",)))
    with pytest.raises(UserError, match=r"'model.item_rows' must not be negative, not -1"):
        override(default_trial("dlrm"), {"model.item_rows": -1})
