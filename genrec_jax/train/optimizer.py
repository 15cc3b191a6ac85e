"""AdamW with warm-up, a decay that ends at the trial's own last step, and a separate rule for embedding tables."""

import jax
import optax

from genrec_jax.config import TrainConfig


def is_table(path: tuple) -> bool:
    """Whether a parameter's tree path leads to an embedding table (an attribute named ``*_table``)."""
    return any(_name(key).endswith("_table") for key in path)


def _decays(path: tuple, value: jax.Array) -> bool:
    """Matrices decay; biases (stacked ones have two axes) and norms' scales do not."""
    return value.ndim > 1 and _name(path[-1]) not in {"bias", "scale"}


def _name(key: object) -> str:
    return str(getattr(key, "key", getattr(key, "name", "")))


def schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Linear warm-up over ``warmup * steps`` steps, then cosine decay to zero at ``steps``."""
    warm = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(steps, warm + 1))


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a trial of ``steps`` steps; weight decay is decoupled and spares biases and norms."""

    def adamw(rate: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            schedule(rate, steps, config.warmup),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
        )

    def label(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: "table" if is_table(path) else "dense", params)

    rules = {
        "dense": adamw(config.learning_rate, config.weight_decay),
        "table": adamw(config.embedding_learning_rate, config.embedding_weight_decay),
    }
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.partition(rules, label))
