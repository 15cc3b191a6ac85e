"""AdamW with warm-up, a decay that ends with the trial's own last step or none, and a rule of its own for tables."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genrec_jax.config import TrainConfig
from genrec_jax.train.rows import RowRule

Decay = Literal["cosine", "constant"]
Scalars = dict[str, Any]

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
    return str(getattr(key, "key", getattr(key, "name", "")))


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


def make_row_rule(config: TrainConfig, steps: int) -> RowRule | None:
    """The row-wise rule of a trial's tables, if it has one."""
    if config.embedding_optimizer == "adamw":
        return None
    rate = schedule(config.embedding_learning_rate, steps, config.warmup, config.decay)
    return RowRule(config.embedding_optimizer, rate, config.embedding_weight_decay, config.beta1, config.beta2)


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a trial of ``steps`` steps; weight decay is decoupled and spares biases and norms.

    The config's :data:`SCALARS` may be traced. What the optimiser keeps does not depend on them.
    Gradients of tables that have a row-wise rule pass through: clipped, not yet applied.
    """

    def adamw(rate: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            schedule(rate, steps, config.warmup, config.decay),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
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
