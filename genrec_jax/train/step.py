"""The state of a trial and its one jitted, donated training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from genrec_jax.batch import Batch
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


def bind(model: Model, params: Any) -> Model:
    """The model (abstract or not) with ``params`` in place of its own, without touching the original."""
    state: Any = nnx.split(model, nnx.Param, ...)
    graph, own, rest = state
    nnx.replace_by_pure_dict(own, params)
    return nnx.merge(graph, own, rest)


def make_step(model: Model, optimizer: optax.GradientTransformation) -> Step:
    """(state, batch) -> (next state, {loss: mean per target, targets, grad_norm}); the given state is consumed."""

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            # Made here, not outside: its counter may only change at the trace level that made it.
            total, targets = bind(model, params).loss(batch, nnx.Rngs(key))
            return total / jnp.maximum(targets, 1), targets

        (loss, targets), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "targets": targets, "grad_norm": optax.tree.norm(grads)}
        return State(params, opt, state.step + 1, state.key), metrics

    return jax.jit(step, donate_argnums=0)
