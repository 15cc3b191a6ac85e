"""Row-wise optimisers of embedding tables: a step reads, moves and keeps the rows that its batch asks for, no others.

The gradient never has the table's size: before the backward pass the rows at hand take the table's place, each once.
What a step costs does not depend on how many rows a table has.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from genrec_jax.batch import Batch
from genrec_jax.config import EmbeddingOptimizer
from genrec_jax.distributed.host import DEVICE, HOST, at_host, on_host
from genrec_jax.models.registry import Model
from genrec_jax.nn.embedding import Held, recorded, tables

Place = tuple[Any, ...]
RowState = dict[str, jax.Array]
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class RowRule:
    """Moves rows w [U, D] by their gradients g; every row has one second moment, that of its mean squared gradient.

    rowwise_adagrad: s += mean(g²); w -= rate g / (sqrt(s) + eps) (Duchi et al. 2011; per row as in FBGEMM and DLRM).
    rowwise_adamw: m = b1 m + (1 - b1) g; s = b2 s + (1 - b2) mean(g²); both divided by 1 - b^t, t being the trial's
    steps, not the row's; w -= rate m / (sqrt(s) + eps).
    Lazy: in a step that does not read a row, neither its moments nor its weight decay (w *= 1 - rate decay) move.
    """

    kind: EmbeddingOptimizer
    rate: optax.Schedule
    weight_decay: float
    beta1: float
    beta2: float

    def init(self, table: jax.Array) -> RowState:
        state = {"square": jnp.zeros(table.shape[0], jnp.float32)}
        if self.kind == "rowwise_adamw":
            state["mean"] = jnp.zeros(table.shape, jnp.float32)
        return state

    def move(self, rows: jax.Array, grads: jax.Array, state: RowState, step: jax.Array) -> tuple[jax.Array, RowState]:
        """The rows and their state after the step that ``step`` others precede."""
        rate, square = self.rate(step), jnp.mean(grads * grads, axis=1)
        rows = rows * (1.0 - rate * self.weight_decay)
        if self.kind == "rowwise_adagrad":
            state = {"square": state["square"] + square}
            return rows - rate * grads / (jnp.sqrt(state["square"])[:, None] + _EPSILON), state
        state = {
            "square": self.beta2 * state["square"] + (1.0 - self.beta2) * square,
            "mean": self.beta1 * state["mean"] + (1.0 - self.beta1) * grads,
        }
        count = step + 1.0
        mean = state["mean"] / (1.0 - self.beta1**count)
        root = jnp.sqrt(state["square"] / (1.0 - self.beta2**count))
        return rows - rate * mean / (root[:, None] + _EPSILON), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Holding:
    """What of one table, or of a device's block of it, a step works on.

    ids [U] int32, ascending: the rows at hand, by their places in it. write [U]: where they go back to; past the
    table's end for a place that holds none of the rows that were asked for.
    """

    ids: jax.Array
    write: jax.Array

    def take(self, array: jax.Array) -> jax.Array:
        """The rows of ``array`` [V, ...]: [U, ...], on the device."""
        return at_host(_take, DEVICE)(array, self.ids) if on_host(array) else _take(array, self.ids)

    def put(self, array: jax.Array, rows: jax.Array) -> jax.Array:
        """``array`` with the rows in their places, where it lies."""
        return at_host(_put, HOST)(array, self.write, rows) if on_host(array) else _put(array, self.write, rows)


def _take(array: jax.Array, ids: jax.Array) -> jax.Array:
    return array.at[ids].get(mode="clip", indices_are_sorted=True)


def _put(array: jax.Array, write: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[write].set(rows, mode="drop", unique_indices=True)


def holding(ids: jax.Array, vocab: int) -> Holding:
    """What a step needs of a table of ``vocab`` rows that it asks for ``ids`` [N]: min(N, vocab) rows."""
    every = jnp.arange(vocab, dtype=jnp.int32)
    if vocab <= ids.size:
        asked = jnp.zeros(vocab, bool).at[ids].set(True)
        return Holding(every, jnp.where(asked, every, vocab + every))
    found = jnp.unique(ids.astype(jnp.int32), size=ids.size, fill_value=vocab)
    beyond = vocab + jnp.arange(ids.size, dtype=jnp.int32)
    return Holding(found, jnp.where(found < vocab, found, beyond))


def lookups(model: Model, batch: Batch, rngs: nnx.Rngs) -> dict[Place, jax.Array]:
    """The rows [N] that the loss asks each table for, by the table's place in the model."""
    return asked_by(model, lambda: model.loss(batch, rngs))


def asked_by(model: Model, call: Callable[[], Any]) -> dict[Place, jax.Array]:
    """As :func:`lookups`, of any ``call`` of the model."""
    with recorded() as seen:
        call()
    asked = {path: seen[id(table)] for path, table in tables(model).items() if id(table) in seen}
    return {path: jnp.concatenate([ids.reshape(-1) for ids in calls]) for path, calls in asked.items()}


def hold_rows(params: Any, ids: dict[Place, jax.Array]) -> tuple[Any, dict[Place, Holding]]:
    """The parameters with the rows of ``ids`` in place of each table that is asked for any, and which these are."""
    held = {path: holding(asked.reshape(-1), len(rows_of(params, path))) for path, asked in ids.items()}
    at_hand = {path: own.take(rows_of(params, path)).astype(jnp.float32) for path, own in held.items()}
    return with_rows(params, at_hand), held


def told(model: Model, held: dict[Place, jax.Array]) -> Model:
    """The model, whose parameters are those of :func:`hold_rows`, told the ids of the rows that its tables hold."""
    for path, table in tables(model).items():
        if path in held:
            table.held = Held(held[path])
    return model


def row_states(rule: RowRule, params: Any) -> dict[str, RowState]:
    """The state of every table before the first step."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {name_of(tuple(key.key for key in path[:-1])): rule.init(leaf) for path, leaf in leaves if is_rows(path)}


def is_rows(path: tuple) -> bool:
    """Whether a parameter's tree path leads to the rows of a table."""
    return path[-1].key == "rows_table"


def move_rows(
    rule: RowRule,
    params: Any,
    states: dict[str, RowState],
    held: dict[Place, Holding],
    grads: Any,
    step: jax.Array,
    key: jax.Array,
) -> tuple[dict[Place, jax.Array], dict[str, RowState]]:
    """The tables after a step and their states; ``grads`` has the rows at hand in place of each table. ``key``: of the
    rounding to bfloat16."""
    moved, states = {}, dict(states)
    for path, own in held.items():
        name = name_of(path)
        moved[path], states[name] = move_held(
            rule, rows_of(params, path), states[name], own, rows_of(grads, path), step, key_of(key, path)
        )
    return moved, states


def move_held(
    rule: RowRule,
    table: jax.Array,
    state: RowState,
    own: Holding,
    grads: jax.Array,
    step: jax.Array,
    key: jax.Array,
    first: jax.Array | int = 0,
) -> tuple[jax.Array, RowState]:
    """A table, or a block of it from row ``first`` on, and its state after a step with these gradients of its rows."""
    rows, taken = rule.move(own.take(table).astype(jnp.float32), grads, jax.tree.map(own.take, state), step)
    if table.dtype == jnp.bfloat16:
        rows = round_rows(rows, own.ids + first, key)
    return own.put(table, rows), jax.tree.map(own.put, state, taken)


def key_of(key: jax.Array, path: Place) -> jax.Array:
    """The key of a table's rounding."""
    return jax.random.fold_in(key, zlib.crc32(name_of(path).encode()))


def round_rows(rows: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
    """[U, D] rounded at random; what a row draws depends on its id [U] alone, not on the rows beside it."""
    return jax.vmap(lambda row, own: round_at_random(row, jax.random.fold_in(key, own)))(rows, ids)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> a bfloat16 neighbour, the nearer the likelier, so that the mean is x (Gupta et al., ICML 2015).

    To the nearest, a step below 2^-9 of a row's entry would be lost every time.
    """
    below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + below
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def name_of(path: Place) -> str:
    """The name of a table's state."""
    return "/".join(map(str, path))


def rows_of(params: Any, path: Place) -> jax.Array:
    """The rows of the table at ``path`` in a tree of parameters."""
    for key in (*path, "rows_table"):
        params = params[key]
    return params


def with_rows(params: Any, new: Mapping[Place, Any]) -> Any:
    """A copy of the tree with these rows in their tables."""
    for path, rows in new.items():
        params = _with(params, (*path, "rows_table"), rows)
    return params


def _with(tree: Any, path: Place, value: Any) -> Any:
    return value if not path else {**tree, path[0]: _with(tree[path[0]], path[1:], value)}
