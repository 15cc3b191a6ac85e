"""Training objectives."""

import jax
import jax.numpy as jnp


def bce(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multi-task binary cross-entropy in nats: (sum over targets of the mean over tasks, number of targets).

    logits [..., A]; labels [..., A] in {0, 1}; mask [...] bool: which rows are targets. float32 and without overflow:
    -y log s(x) - (1 - y) log(1 - s(x)) = max(x, 0) - x y + log(1 + exp(-|x|)).
    """
    x, y = logits.astype(jnp.float32), labels.astype(jnp.float32)
    losses = jnp.mean(jnp.maximum(x, 0.0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))), axis=-1)
    return jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask.astype(jnp.float32))
