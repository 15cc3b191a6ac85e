"""The formula and its derivative over rows [..., W], as plain array operations: XLA compiles them, and so does Pallas.

y = keep / (1 - rate) · u · (a - mean(a)) / sqrt(var(a) + eps), statistics over the last axis in at least float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """The constants of a call: ``grow`` = 1 / (1 - rate) multiplies the entries that dropout keeps."""

    backend: str
    eps: float
    grow: float


def forward(rule: Rule, a: jax.Array, u: jax.Array, keep: jax.Array | None) -> jax.Array:
    """y in the type of ``a``, rounded once."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    normal, _ = _normalised(rule, a.astype(wide))
    return _dropped(rule, normal * u.astype(wide), keep).astype(a.dtype)


def backward(
    rule: Rule, a: jax.Array, u: jax.Array, keep: jax.Array | None, d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cotangents of a and u; the normalised value is computed again."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    normal, scale = _normalised(rule, a.astype(wide))
    d_y = _dropped(rule, d_y.astype(wide), keep)
    d_normal = d_y * u.astype(wide)
    along = (d_normal * normal).mean(-1, keepdims=True)
    d_a = scale * (d_normal - d_normal.mean(-1, keepdims=True) - normal * along)
    return d_a.astype(a.dtype), (d_y * normal).astype(u.dtype)


def _normalised(rule: Rule, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normalised rows, and 1 / standard deviation [..., 1].

    Two passes: E[x²] - E[x]² loses digits on attention outputs that are small beside their mean.
    """
    centred = a - a.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + rule.eps)
    return centred * scale, scale


def _dropped(rule: Rule, x: jax.Array, keep: jax.Array | None) -> jax.Array:
    return x if keep is None else jnp.where(keep, x * rule.grow, 0)
