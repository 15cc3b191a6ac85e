"""The sampled-softmax objective of next-item retrieval (HSTU, arXiv 2402.17152, public retrieval code)."""

import jax
import jax.numpy as jnp

_CHUNK = 256  # positions whose logits against the whole corpus are held at a time
# Up to this many items per negative, products with the whole corpus beat gathering the rows of the negatives.
_DENSE_ITEMS_PER_NEGATIVE = 64


def l2_normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / max(‖x‖₂, epsilon) along the last axis; the gradient at x = 0 is finite."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def draw_negatives(key: jax.Array, targets: jax.Array, count: int, items: int) -> jax.Array:
    """Uniform negatives with replacement among the ids 1..items, drawn for each position on its own.

    Args:
      key: a random key.
      targets: [B, T], read for its shape only.
      count: R, negatives per position.
      items: largest id; 0 is padding and never drawn.

    Returns:
      int32 ids [B, T, R]. An id's probability is off from 1/items by less than items / 2**32, relatively.
    """
    bits = jax.random.bits(key, (*targets.shape, count), jnp.uint32)
    return (bits % jnp.uint32(items)).astype(jnp.int32) + 1


def sampled_softmax(
    outputs: jax.Array,
    items: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """Weighted mean of ``-log softmax([u·v⁺, u·v⁻₁ … u·v⁻_R] / temperature)[0]``, without logQ correction.

    A negative equal to its position's target does not count. Gradients flow into outputs and items.

    Args:
      outputs: [B, T, D] (normalise first for cosine similarity).
      items: [V, D], the whole table, normalised likewise.
      targets: int [B, T], ids in 0..V-1.
      weights: [B, T], 1 for a supervised position and 0 for padding; all zero gives a loss of 0.
      negatives: int [B, T, R].
      temperature: divisor of the similarities.

    Raises:
      ValueError: shapes that do not fit.
    """
    batch, length, _ = outputs.shape
    if targets.shape != (batch, length) or weights.shape != (batch, length):
        raise ValueError(f"targets {targets.shape} and weights {weights.shape} must be {(batch, length)}")
    if negatives.ndim != 3 or negatives.shape[:2] != (batch, length):
        raise ValueError(f"negatives must be [{batch}, {length}, R], got {negatives.shape}")
    weights = jnp.where(weights.sum() > 0, weights / jnp.maximum(weights.sum(), 1e-9), 0)
    scaled = outputs / temperature
    ids = jnp.concatenate([targets[..., None], negatives], axis=-1).reshape(batch * length, -1)
    flat = (scaled.reshape(batch * length, -1), items, ids, weights.reshape(-1))
    if items.shape[0] <= _DENSE_ITEMS_PER_NEGATIVE * negatives.shape[2]:
        return _dense(*flat)
    return _gathered(*flat)


def _cross_entropy(logits: jax.Array, hit: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of -log softmax(logits)[..., 0]; ``hit`` marks negatives that are the target itself."""
    logits = jnp.where(hit, -jnp.inf, logits)
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]))


def _hits(ids: jax.Array) -> jax.Array:
    """True where an id past the first equals the first, the target."""
    return (ids == ids[..., :1]).at[..., 0].set(False)


def _in_chunks(scaled: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pads positions (with weight 0) to a multiple of the chunk and splits them: [chunks, positions, ...]."""
    size = min(_CHUNK, max(1, scaled.shape[0]))
    short = -scaled.shape[0] % size
    scaled, ids = (jnp.pad(x, ((0, short), (0, 0))).reshape(-1, size, x.shape[1]) for x in (scaled, ids))
    return scaled, ids, jnp.pad(weights, (0, short)).reshape(-1, size)


def _gathered(scaled: jax.Array, items: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The loss by gathering each position's rows of the table: the way for a large corpus."""

    @jax.checkpoint
    def chunk(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        u, picked, w = xs
        return total + _cross_entropy(jnp.einsum("pd,prd->pr", u, items[picked]), _hits(picked), w), None

    return jax.lax.scan(chunk, jnp.zeros((), scaled.dtype), _in_chunks(scaled, ids, weights))[0]


@jax.custom_vjp
def _dense(scaled: jax.Array, items: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The loss by products with the whole table and a look-up of scalars: the way for a small corpus.

    Fetching R rows of D numbers per position, and scattering as many in the backward pass, costs far more than the
    products it saves while the corpus is small.
    """

    def chunk(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        u, picked, w = xs
        return total + _cross_entropy(_look_up(u @ items.T, picked), _hits(picked), w), None

    return jax.lax.scan(chunk, jnp.zeros((), scaled.dtype), _in_chunks(scaled, ids, weights))[0]


def _look_up(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """logits[p, ids[p, r]] as [P, R]."""
    return jnp.take_along_axis(logits, ids, axis=1, mode="promise_in_bounds")


_Gradients = tuple[jax.Array, jax.Array, jax.Array]


def _dense_forward(
    scaled: jax.Array, items: jax.Array, ids: jax.Array, weights: jax.Array
) -> tuple[jax.Array, _Gradients]:
    """Loss and gradients in one pass: the loss is a scalar, so its gradient is known up to a factor already here."""
    items_t = items.T + 0  # both orientations are kept: each product below then has the one XLA's CPU runs fastest
    count = items.shape[0]

    def chunk(
        carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        total, d_items_t = carry
        u, picked, w = xs
        loss, pull = jax.vjp(lambda x, y: _cross_entropy(x, _hits(picked), y), _look_up(u @ items.T, picked), w)
        d_picked, d_w = pull(jnp.ones_like(loss))
        places = jnp.arange(u.shape[0], dtype=jnp.int32)[:, None] * count + picked
        flat = jnp.zeros(u.shape[0] * count, u.dtype)
        d_logits = flat.at[places].add(d_picked, mode="promise_in_bounds").reshape(-1, count)
        return (total + loss, d_items_t + u.T @ d_logits), (jnp.einsum("dv,pv->dp", items_t, d_logits), d_w)

    start = (jnp.zeros((), scaled.dtype), jnp.zeros_like(items_t))
    (total, d_items_t), (d_scaled, d_weights) = jax.lax.scan(chunk, start, _in_chunks(scaled, ids, weights))
    positions = scaled.shape[0]
    d_scaled = d_scaled.transpose(0, 2, 1).reshape(-1, scaled.shape[1])[:positions]
    return total, (d_scaled, d_items_t.T, d_weights.reshape(-1)[:positions])


def _dense_backward(gradients: _Gradients, d_loss: jax.Array) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_scaled, d_items, d_weights = gradients
    return d_loss * d_scaled, d_loss * d_items, None, d_loss * d_weights


_dense.defvjp(_dense_forward, _dense_backward)
