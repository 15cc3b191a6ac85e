"""Row-wise rules of tables: their formulas, and that a step moves the rows it reads by the true gradient, alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path

from genrec_jax.batch import Batch
from genrec_jax.config import EmbeddingOptimizer, Trial, default_trial, override
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences
from genrec_jax.errors import UserError
from genrec_jax.nn import embedding
from genrec_jax.nn.embedding import Table, tables
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.estimate import abstract_model, init_params, plan_account
from genrec_jax.train.optimizer import is_table, make_optimizer, make_row_rule
from genrec_jax.train.rows import RowRule, holding, lookups, round_at_random, rows_of
from genrec_jax.train.step import State, bind, init_state, make_step
from tests.data.helpers import random_dataset
from tests.models.gr_helpers import random_batch
from tests.train.helpers import trial_of

RULES = ("rowwise_adagrad", "rowwise_adamw")
SMALL = {"model.heads": 2, "model.dropout": 0.0, "train.embedding_weight_decay": 0.1}
USERS = {**SMALL, "data.candidates": 1, "model.negatives": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dlrm": ("dlrm", {"train.embedding_weight_decay": 0.1}),
    "din": ("din", {"train.embedding_weight_decay": 0.1}),
    "hstu": ("hstu", SMALL),
    "dirl": ("dirl", SMALL),
    "sasrec": ("sasrec", USERS),
    "quotients and remainders": ("dlrm", {"model.item_rows": 500, "train.embedding_weight_decay": 0.1}),
    "two hashes": ("hstu", {**SMALL, "model.item_rows": 900, "model.item_hashing": "double"}),
    "shared negatives": ("hstu_retrieval", {**USERS, "model.shared_negatives": True}),
    "logq": ("hstu_retrieval", {**USERS, "model.sampling": "popularity", "model.logq": True}),
}

IN_PIECES = ("dlrm", "sasrec", "two hashes")  # a ranker, a retriever, two rows for an id


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


@pytest.mark.parametrize("kind", RULES)
def test_rules_follow_their_formulas(kind: EmbeddingOptimizer) -> None:
    """Five steps of which each reads some rows, against loops in float64."""
    rng = np.random.default_rng(0)
    rule = RowRule(kind, lambda step: 0.1 / (1.0 + step), 0.2, 0.8, 0.9)
    table = rng.normal(size=(7, 3))
    own, state = jnp.asarray(table), rule.init(jnp.asarray(table))
    square, mean = np.zeros(7), np.zeros((7, 3))
    for step, asked in enumerate(([0, 2, 5], [2], [1, 2, 6], [5, 6], [0])):
        grads, rate = rng.normal(size=(len(asked), 3)), 0.1 / (1 + step)
        for row, g in zip(asked, grads, strict=True):
            table[row] *= 1 - rate * 0.2
            if kind == "rowwise_adagrad":
                square[row] += (g**2).mean()
                table[row] -= rate * g / np.sqrt(square[row])
            else:
                mean[row] = 0.8 * mean[row] + 0.2 * g
                square[row] = 0.9 * square[row] + 0.1 * (g**2).mean()
                corrected = mean[row] / (1 - 0.8 ** (step + 1)), square[row] / (1 - 0.9 ** (step + 1))
                table[row] -= rate * corrected[0] / np.sqrt(corrected[1])
        rows = jnp.asarray(asked)
        moved, new = rule.move(own[rows], jnp.asarray(grads), {k: v[rows] for k, v in state.items()}, jnp.array(step))
        own, state = own.at[rows].set(moved), {k: v.at[rows].set(new[k]) for k, v in state.items()}
    np.testing.assert_allclose(own, table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ids", "vocab"), [([3, 9, 3, 0, 9, 3], 1000), ([3, 4, 3, 0], 5), ([1, 1], 2), ([1], 2)])
def test_a_holding_has_each_row_once(ids: list[int], vocab: int) -> None:
    asked = holding(jnp.array(ids), vocab)
    array = jnp.arange(vocab * 2.0).reshape(vocab, 2)
    assert len(asked.ids) == min(len(ids), vocab)
    assert bool((jnp.diff(asked.ids) >= 0).all())
    for row in ids:
        place = int(jnp.searchsorted(asked.ids, row))
        np.testing.assert_array_equal(asked.take(array)[place], array[row])
    written = asked.put(array, -asked.take(array) - 1)
    changed = np.flatnonzero((written != array).any(axis=1))
    assert changed.tolist() == sorted(set(ids))
    np.testing.assert_array_equal(written[changed], -array[changed] - 1)


def step_once(trial: Trial, sequences: Sequences, pieces: int) -> tuple[State, Batch, State, dict[str, float], Any]:
    """The state, a batch, the state after it, its metrics, and the model."""
    stream = TrainStream(sequences, trial.data, trial.model.rows, 8, seed=0)
    model = abstract_model(trial, sequences.schema, Popularity(stream.target_counts()))
    optimizer, rule = make_optimizer(trial.train, 10), make_row_rule(trial.train, 10)
    state = init_state(init_params(trial, sequences.schema), optimizer, 0, rule)
    before, batch = jax.tree.map(np.array, state), next(stream)
    stream.close()
    after, metrics = make_step(model, optimizer, pieces, rule)(state, batch)
    return before, batch, after, {name: float(value) for name, value in metrics.items()}, model


def true_gradients(
    model: Any, state: State, batch: Batch, pieces: int
) -> tuple[dict[str, float], Any, dict[Any, np.ndarray]]:
    """A step's metrics and the mean loss's gradient, with whole tables and piece by piece with the step's own keys; and
    the ids asked for."""
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(state.key)), state.step)
    keys = [key] if pieces == 1 else jax.random.split(key, pieces)
    total, loss, targets, asked = jax.tree.map(np.zeros_like, state.params), 0.0, 0.0, {}

    def rngs(own: jax.Array) -> nnx.Rngs:
        return nnx.Rngs(own, batch=jax.random.fold_in(key, 1))

    @jax.jit
    def one(params: Any, part: Batch, own: jax.Array) -> Any:
        def loss(p: Any) -> tuple[jax.Array, jax.Array]:
            return bind(model, p).loss(part, rngs(own))

        return jax.value_and_grad(loss, has_aux=True)(params), lookups(bind(model, params), part, rngs(own))

    for place, own in enumerate(keys):
        part = jax.tree.map(lambda x, at=place: np.split(x, pieces)[at], batch)
        ((one_loss, count), grads), ids = jax.tree.map(np.asarray, one(state.params, part, own))
        total, loss, targets = jax.tree.map(np.add, total, grads), loss + one_loss, targets + count
        asked = {path: np.concatenate([asked.get(path, np.array([], int)), ids[path]]) for path in ids}
    grads = jax.tree.map(lambda g: g / targets, total)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads)))
    return {"loss": loss / targets, "targets": targets, "grad_norm": norm}, grads, asked


@pytest.mark.parametrize(("name", "pieces"), [*((name, 1) for name in MODELS), *((name, 4) for name in IN_PIECES)])
def test_a_step_moves_what_it_reads_by_the_true_gradient(sequences: Sequences, name: str, pieces: int) -> None:
    """Against autodiff through whole tables: the metrics, dense parameters, rows and their states."""
    model_name, settings = MODELS[name]
    trial = trial_of(sequences, model_name, **settings, **{"train.embedding_optimizer": "rowwise_adagrad"})
    before, batch, after, found, model = step_once(trial, sequences, pieces)
    expected, grads, asked = true_gradients(model, before, batch, pieces)
    assert found == pytest.approx(expected, rel=1e-5)
    clipped = min(1.0, trial.train.clip / expected["grad_norm"])
    # Of the dense parameters by Adam's first moment: its first step is by the sign, which noise has, too.
    moments = [m for path, m in tree_leaves_with_path(after.opt["dense"]) if ".mu" in keystr(path)]
    wanted = [g for path, g in tree_leaves_with_path(grads) if not is_table(path)]
    for moment, grad in zip(moments, wanted, strict=True):
        np.testing.assert_allclose(moment, (1 - trial.train.beta1) * clipped * grad, rtol=1e-3, atol=1e-7)
    rule = make_row_rule(trial.train, 10)
    assert rule is not None
    for path in tables(model):
        old, new, grad = (np.asarray(rows_of(tree, path)) for tree in (before.params, after.params, grads))
        rows = np.unique(asked[path])
        others = np.setdiff1d(np.arange(len(old)), rows)
        none = {"square": np.zeros(len(rows), np.float32)}
        moved, state = jax.jit(rule.move)(old[rows], clipped * grad[rows], none, np.int32(0))
        kept = np.asarray(after.opt["rows"]["/".join(map(str, path))]["square"])
        # Adagrad's first step is by the gradient's direction, which the smallest gradients lose to rounding.
        large = np.abs(grad[rows]).max(axis=1) > 1e-6
        np.testing.assert_allclose(new[rows][large], moved[large], rtol=1e-3, atol=1e-5, err_msg=str(path))
        np.testing.assert_allclose(kept[rows], state["square"], rtol=1e-3, atol=1e-12)
        np.testing.assert_array_equal(new[others], old[others], err_msg=str(path))
        assert not kept[others].any()
        assert not grad[others].any()  # what is not asked for has no gradient
        assert large.any()
    assert any(len(np.unique(ids)) < len(rows_of(before.params, path)) / 2 for path, ids in asked.items())


def test_a_step_holds_nothing_of_a_tables_size() -> None:
    """By XLA's own account: beside the table, which is moved in place, a thousandth of it."""
    schema = Schema(items=10**7, tasks=("a",))
    trial = override(
        default_trial("dlrm"),
        {"model.embedding": 16, "data.history": 8, "train.embedding_optimizer": "rowwise_adagrad"},
    )
    model, rule = abstract_model(trial, schema), make_row_rule(trial.train, 10)
    optimizer = make_optimizer(trial.train, 10)
    state = jax.eval_shape(lambda: init_state(init_params(trial, schema), optimizer, 0, rule))
    batch = random_batch(trial.data.shape, [[8]] * 4, schema=Schema(items=100, tasks=("a",)))
    memory = make_step(model, optimizer, tables=rule).lower(state, batch).compile().memory_analysis()
    table = 4 * 16 * 10**7
    assert memory.alias_size_in_bytes > table
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < table / 1000


def test_rounding_at_random_keeps_the_mean() -> None:
    x = jnp.array([1.0, -1.0 - 2**-9, 3.14159, -1e-20, 0.0], jnp.float32)
    drawn = jax.vmap(lambda key: round_at_random(x, key))(jax.random.split(jax.random.key(0), 20000))
    assert drawn.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(drawn, np.float64) - np.asarray(x)) <= np.abs(np.asarray(x)) * 2**-7).all()
    assert [len(np.unique(column)) for column in np.asarray(drawn, np.float32).T] == [1, 2, 2, 2, 1]
    np.testing.assert_allclose(np.asarray(drawn, np.float64).mean(0), x, rtol=1e-4)


def test_small_steps_add_up_in_bfloat16(sequences: Sequences) -> None:
    """Twelve steps go as far as those of float32 rows; rounded to the nearest they would go nowhere."""
    settings = {"train.embedding_optimizer": "rowwise_adagrad", "train.embedding_learning_rate": 1e-4}
    starts, ends = [], []
    for precision in ("float32", "bfloat16"):
        own = {"train.embedding_precision": precision, "model.embedding": 256}
        trial = trial_of(sequences, "dlrm", **settings, **own)
        optimizer, rule = make_optimizer(trial.train, 12), make_row_rule(trial.train, 12)
        state = init_state(init_params(trial, sequences.schema), optimizer, 0, rule)
        starts.append(np.asarray(state.params["fields"]["items"]["rows_table"], np.float64))
        step = make_step(abstract_model(trial, sequences.schema), optimizer, tables=rule)
        stream = TrainStream(sequences, trial.data, trial.model.rows, 8, seed=0)
        batch = next(stream)
        stream.close()
        for _ in range(12):
            state, _ = step(state, batch)
        table = state.params["fields"]["items"]["rows_table"]
        assert table.dtype == precision
        assert state.opt["rows"]["fields/items"]["square"].dtype == jnp.float32
        ends.append(np.asarray(table, np.float64))
    exact, rounded = (end - start for start, end in zip(starts, ends, strict=True))
    moved = np.abs(exact).sum(axis=1) > 0
    assert 0 < moved.sum() < len(moved)
    assert not rounded[~moved].any()
    assert np.abs(exact).max() < 0.01  # of entries of 1/16, whose neighbours are 1/4096 apart
    share = (exact[moved] * rounded[moved]).sum() / (exact[moved] ** 2).sum()
    assert share == pytest.approx(1.0, abs=0.05)


def test_a_large_table_is_drawn_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a small one is, in distribution: every row, also where the last block does not fit, and none twice."""
    monkeypatch.setattr(embedding, "LARGE", 1000)
    monkeypatch.setattr(embedding, "SPREAD", 1024)
    monkeypatch.setattr(embedding, "_BLOCK", 2048)
    drawn = np.asarray(Table(5000, 8, std=0.5, rngs=nnx.Rngs(0)).rows_table[...])
    assert drawn.shape == (5120, 8)
    assert len(np.unique(drawn)) > 0.995 * drawn.size
    assert np.abs(drawn).max() <= 1.0
    assert drawn.std() == pytest.approx(0.5 * 0.8796, rel=0.02)  # of a normal cut at two deviations
    blocks = drawn.reshape(1024, 5, 8)
    assert abs(np.corrcoef(blocks[:, 0].ravel(), blocks[:, 2].ravel())[0, 1]) < 0.1


def test_the_account_counts_what_each_rule_keeps(sequences: Sequences) -> None:
    """AdamW: rows, gradient and two moments; by the row: rows, one number a row, rows and gradients at hand."""
    found = {}
    for rule in ("adamw", *RULES):
        trial = trial_of(sequences, "dlrm", **{"train.embedding_optimizer": rule})
        found[rule] = plan_account(trial).memory_bytes
    model = abstract_model(trial, sequences.schema)
    cost, rows = model.cost(trial.data.shape), sum(table.vocab for table in tables(model).values())
    at_hand = min(8 * cost.embedding_reads, cost.embedding_params)
    assert found["adamw"] - found["rowwise_adagrad"] == 12 * cost.embedding_params - 4 * rows - 8 * at_hand
    assert found["rowwise_adamw"] - found["rowwise_adagrad"] == 4 * cost.embedding_params


def test_the_full_softmax_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"'train.embedding_optimizer' cannot be 'rowwise_adamw' with model.negatives=0"
    ):
        override(default_trial("sasrec"), {"train.embedding_optimizer": "rowwise_adamw", "model.negatives": 0})
