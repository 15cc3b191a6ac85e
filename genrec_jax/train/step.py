"""The state of a trial and its one jitted, donated training step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from genrec_jax.batch import Batch
from genrec_jax.config import TrainConfig
from genrec_jax.models.registry import Model
from genrec_jax.train.rows import Holding, Place, RowRule, hold_rows, lookups, move_rows, row_states, told, with_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """params: parameters (float32); opt: optimiser state; step: scalar int32; key: of dropout and sampling."""

    params: Any
    opt: Any
    step: jax.Array
    key: jax.Array


Step = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int, tables: RowRule | None = None) -> State:
    """``tables``: the row-wise rule of the embedding tables, whose states then stand beside the optimiser's."""
    opt = jax.jit(optimizer.init)(params)
    if tables is not None:
        opt = {"dense": opt, "rows": jax.jit(functools.partial(row_states, tables))(params)}
    return State(params, opt, jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed)))


def bind[M: Model](model: M, params: Any) -> M:
    """The model (abstract or not) with ``params`` in place of its own, without touching the original."""
    state: Any = nnx.split(model, nnx.Param, ...)
    graph, own, rest = state
    nnx.replace_by_pure_dict(own, params)
    return nnx.merge(graph, own, rest)


def pieces_here(train: TrainConfig) -> int:
    """Parts of a batch that this machine works on one after another: an accelerator takes it whole."""
    return train.pieces if jax.default_backend() == "cpu" else 1


def make_step(
    model: Model, optimizer: optax.GradientTransformation, pieces: int = 1, tables: RowRule | None = None
) -> Step:
    """(state, batch) -> (next state, {loss: mean per target, targets, grad_norm}); the given state is consumed.

    ``pieces`` > 1 sums the gradient over that many equal parts of the batch, one after another, so that a part's
    activations stay in a CPU's caches. A part without events is skipped. The mean is over the targets of the whole
    batch. ``tables``: the row-wise rule of the embedding tables; None if they are the optimiser's.
    """

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        parts, keys = batch, key
        if pieces > 1:
            parts = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)
            keys = jax.random.split(key, pieces)

        def rngs(own: jax.Array) -> nnx.Rngs:
            # Made where they are used, not outside: their counters may only change at the trace level that made them.
            # The stream "batch" is for what all pieces of a batch have in common.
            return nnx.Rngs(own, batch=jax.random.fold_in(key, 1))

        def asked(part: tuple[Batch, jax.Array]) -> dict[Place, jax.Array]:
            return lookups(bind(model, state.params), part[0], rngs(part[1]))

        params = state.params
        held: dict[Place, Holding] = {}
        if tables is not None:
            ids = jax.lax.map(asked, (parts, keys)) if pieces > 1 else asked((parts, keys))
            params, held = hold_rows(params, ids)

        def total_loss(params: Any, part: Batch, own: jax.Array) -> tuple[jax.Array, jax.Array]:
            return told(bind(model, params), held).loss(part, rngs(own))

        def add(summed: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            def more() -> Any:
                return jax.tree.map(jnp.add, summed, jax.value_and_grad(total_loss, has_aux=True)(params, *part))

            rows = part[0]
            events = jnp.any(rows.history.segment > 0) | jnp.any(rows.candidates.segment > 0)
            return jax.lax.cond(events, more, lambda: summed), None

        if pieces == 1:
            (total, targets), grads = jax.value_and_grad(total_loss, has_aux=True)(params, parts, keys)
        else:
            zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
            ((total, targets), grads), _ = jax.lax.scan(add, zero, (parts, keys))
        share = 1.0 / jnp.maximum(targets, 1)
        grads = jax.tree.map(lambda g: g * share, grads)
        updates, opt = optimizer.update(grads, state.opt if tables is None else state.opt["dense"], params)
        moved = optax.apply_updates(params, updates)
        if tables is not None:
            own = jax.random.fold_in(key, 2)
            whole, rows = move_rows(tables, state.params, state.opt["rows"], held, updates, state.step, own)
            moved, opt = with_rows(moved, whole), {"dense": opt, "rows": rows}
        metrics = {"loss": total * share, "targets": targets, "grad_norm": optax.tree.norm(grads)}
        return State(moved, opt, state.step + 1, state.key), metrics

    return jax.jit(step, donate_argnums=0)
