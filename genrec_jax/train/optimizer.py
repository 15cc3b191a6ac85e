"""AdamW with warm-up, a decay that ends with the trial's own last step or none, and a rule of its own for tables."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genrec_jax.config import TrainConfig
from genrec_jax.distributed.host import as_before, fetched, on_host
from genrec_jax.distributed.tensor import place
from genrec_jax.models.mup import Rates
from genrec_jax.train.rows import RowRule

Decay = Literal["cosine", "constant"]
Scalars = dict[str, Any]

_PARTS = 8  # of what is kept in the host's memory

# The settings of TrainConfig that a compiled step takes as arguments: trials that differ in these alone share it.
SCALARS = ("learning_rate", "embedding_learning_rate", "weight_decay", "embedding_weight_decay", "beta1", "beta2")


def scalars(config: TrainConfig) -> Scalars:
    """The values of :data:`SCALARS`, float32."""
    return {name: np.float32(getattr(config, name)) for name in SCALARS}


def is_table(path: tuple) -> bool:
    """Whether a parameter's tree path leads to an embedding table (an attribute named ``*_table``)."""
    return any(_name(key).endswith("_table") for key in path)


def _decays(path: tuple, value: jax.Array) -> bool:
    """Matrices decay; biases (stacked ones have two axes) and norms' scales do not."""
    return value.ndim > 1 and _name(path[-1]) not in {"bias", "scale"}


def _name(key: object) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


def schedule(peak: float, steps: int, warmup: float, decay: Decay = "cosine") -> optax.Schedule:
    """The learning rate of a step, given the number of steps before it (0 for the first; an int or a traced scalar).

    With w = max(1, round(``warmup * steps``)), step k <= w moves at ``peak * k / w``; from there a cosine falls to the
    zero that step ``steps + 1`` would have, so that no step is spent on a rate of zero; or it stays ("constant").
    """
    warm = max(1, round(warmup * steps))

    def rate(before: Any) -> Any:
        xp = jnp if isinstance(before, jax.Array) else np  # a number on the host needs no program on the device
        step = before + 1.0
        decayed = xp.minimum((step - warm) / (steps + 1 - warm), 1.0) * (decay == "cosine")
        return xp.where(step <= warm, peak * step / warm, 0.5 * peak * (1.0 + xp.cos(xp.pi * decayed)))

    return rate


def make_row_rule(config: TrainConfig, steps: int, rates: Rates | None = None) -> RowRule | None:
    """The row-wise rule of a trial's tables, if it has one; ``rates``: as of :func:`make_optimizer`."""
    if config.embedding_optimizer == "adamw":
        return None
    factor = min((rate for path, rate in (rates or {}).items() if is_table(path)), default=1.0)  # they are alike
    rate = schedule(factor * config.embedding_learning_rate, steps, config.warmup, config.decay)
    return RowRule(config.embedding_optimizer, rate, config.embedding_weight_decay, config.beta1, config.beta2)


def make_optimizer(config: TrainConfig, steps: int, rates: Rates | None = None) -> optax.GradientTransformation:
    """The optimiser of a trial of ``steps`` steps; weight decay is decoupled and spares biases and norms.

    ``rates``: factors of the learning rate by a parameter's place, 1 where there is none
    (:func:`genrec_jax.models.mup.rates`). What decays does so at the rate itself, whatever its factor.

    The config's :data:`SCALARS` may be traced. What the optimiser keeps does not depend on them, nor on the rates.
    Gradients of tables that have a row-wise rule pass through: clipped, not yet applied.
    """

    def adamw(rate: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(
            _scaled(optax.scale_by_adam(config.beta1, config.beta2), rates or {}),
            optax.add_decayed_weights(weight_decay, lambda params: jax.tree_util.tree_map_with_path(_decays, params)),
            optax.scale_by_learning_rate(schedule(rate, steps, config.warmup, config.decay)),
        )

    def label(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: "table" if is_table(path) else "dense", params)

    rules = {
        "dense": adamw(config.learning_rate, config.weight_decay),
        "table": adamw(config.embedding_learning_rate, config.embedding_weight_decay)
        if config.embedding_optimizer == "adamw"
        else optax.identity(),
    }
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, optax.partition(rules, label))


def _scaled(rule: optax.GradientTransformation, rates: Rates) -> optax.GradientTransformation:
    """The rule with each parameter's update times its rate."""
    if not rates:
        return rule

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        updates, state = rule.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(lambda path, x: rates.get(place(path), 1.0) * x, updates), state

    return optax.GradientTransformation(rule.init, update)


def update_in_parts(
    optimizer: optax.GradientTransformation, grads: Any, state: optax.OptState, params: Any
) -> tuple[Any, optax.OptState]:
    """``optimizer.update``, for one that moves each parameter by itself but for the norm of all gradients.

    What lies in the host's memory comes to the device in :data:`_PARTS`, each when the one before it is done with, and
    goes back, so that the device needs room for about one part, or for what belongs to the largest parameter.
    """
    leaves, tree = jax.tree.flatten(state)
    if not any(map(on_host, leaves)):
        return optimizer.update(grads, state, params)
    part_of = _parts(params)
    parts = [_part(place(path), part_of) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    moves, kept, done = jax.tree.leaves(grads), leaves, grads
    for part in sorted(set(part_of.values())):
        # All of the update is written down each time; what is not of this part is not used, and falls away.
        here = jax.tree.unflatten(tree, [fetched(x, done) for x in leaves])
        updates, new = map(jax.tree.leaves, optimizer.update(grads, here, params))
        moves = _chosen(part, part_of.values(), updates, moves)
        kept = _chosen(part, parts, new, kept)
        done = [x for x, own in zip(new, parts, strict=True) if own == part]
    back = [as_before(x, before) for x, before in zip(kept, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(grads), moves), jax.tree.unflatten(tree, back)


def _parts(params: Any) -> dict[tuple[Any, ...], int]:
    """Which part each parameter is in, by its place."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ends = itertools.accumulate((x.size for _, x in leaves), initial=0)
    return {place(path): _PARTS * end // sum(x.size for _, x in leaves) for (path, _), end in zip(leaves, ends)}


def _part(names: tuple[Any, ...], part_of: Mapping[tuple[Any, ...], int]) -> int:
    """The part of what is kept at a place, which ends with that of its parameter; 0 for what belongs to all."""
    return next((part_of[names[n:]] for n in range(len(names)) if names[n:] in part_of), 0)


def _chosen(part: int, parts: Iterable[int], new: Iterable[Any], old: Iterable[Any]) -> list[Any]:
    return [x if own == part else y for own, x, y in zip(parts, new, old, strict=True)]
