"""The state of a trial and its one jitted, donated training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from genrec_jax.batch import Batch
from genrec_jax.config import TrainConfig
from genrec_jax.models.registry import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """params: parameters (float32); opt: optimiser state; step: scalar int32; key: of dropout and sampling."""

    params: Any
    opt: Any
    step: jax.Array
    key: jax.Array


Step = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def init_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> State:
    opt = jax.jit(optimizer.init)(params)
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


def make_step(model: Model, optimizer: optax.GradientTransformation, pieces: int = 1) -> Step:
    """(state, batch) -> (next state, {loss: mean per target, targets, grad_norm}); the given state is consumed.

    ``pieces`` > 1 sums the gradient over that many equal parts of the batch, one after another, so that a part's
    activations stay in a CPU's caches. A part without events is skipped. The mean is over the targets of the whole
    batch.
    """

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def total_loss(params: Any, part: Batch, own: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Rngs are made here, not outside: their counters may only change at the trace level that made them.
            # The stream "batch" is for what all pieces of a batch have in common.
            return bind(model, params).loss(part, nnx.Rngs(own, batch=jax.random.fold_in(key, 1)))

        def add(summed: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            def more() -> Any:
                return jax.tree.map(jnp.add, summed, jax.value_and_grad(total_loss, has_aux=True)(state.params, *part))

            rows = part[0]
            events = jnp.any(rows.history.segment > 0) | jnp.any(rows.candidates.segment > 0)
            return jax.lax.cond(events, more, lambda: summed), None

        if pieces == 1:
            (total, targets), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params, batch, key)
        else:
            parts = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)
            zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
            ((total, targets), grads), _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, pieces)))
        share = 1.0 / jnp.maximum(targets, 1)
        grads = jax.tree.map(lambda g: g * share, grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total * share, "targets": targets, "grad_norm": optax.tree.norm(grads)}
        return State(params, opt, state.step + 1, state.key), metrics

    return jax.jit(step, donate_argnums=0)
