"""Objectives of next-item retrieval: the sampled softmax of HSTU's public code (arXiv 2402.17152) and the full one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.target import target

_CHUNK = 256  # positions whose logits are held at a time
# What is gathered of the item table at a time: on a CPU, whose second-level caches it must stay in, so many rows; on
# accelerators, where it is memory, so many numbers (128 MiB).
_GATHERED_ROWS, _GATHERED_NUMBERS = 2**13, 2**25
_LANES = 16  # float32 numbers of a vector register
_BLOCK = 2048  # items whose logits of one chunk the full softmax holds at a time


def l2_normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / max(‖x‖₂, epsilon) along the last axis; the gradient at x = 0 is finite."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def draw_negatives(key: jax.Array, shape: tuple[int, ...], items: int) -> jax.Array:
    """Uniform negatives among the ids 1..items, each drawn on its own with replacement.

    Args:
      key: a random key.
      shape: [B, T, R], or [R].
      items: largest id; 0 is padding and never drawn.

    Returns:
      int32 ids. An id's probability is off from 1/items by less than items / 2**32, relatively.
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    return (bits % jnp.uint32(items)).astype(jnp.int32) + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Popularity:
    """Items by their share of the training targets: ``counts`` [V], of which that of id 0 does not count."""

    counts: np.ndarray

    def _shares(self) -> np.ndarray:
        own = np.where(np.arange(len(self.counts)) > 0, self.counts, 0).astype(np.float64)
        return own / own.sum()

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """int32 ids of the given shape, each drawn on its own with replacement."""
        cumulated = jnp.asarray(np.cumsum(self._shares()), jnp.float32)
        # The draw is below the last value, and an item without counts adds nothing: neither it nor 0 is ever found.
        ids = jnp.searchsorted(cumulated, jax.random.uniform(key, shape) * cumulated[-1], side="right")
        return ids.astype(jnp.int32)

    def log_q(self) -> np.ndarray:
        """log Q [V] float32 of every item; of one that is never drawn, that of half a count."""
        half = 0.5 / max(float(self.counts[1:].sum()), 1.0)
        return np.log(np.maximum(self._shares(), half)).astype(np.float32)


def sampled_softmax(
    outputs: jax.Array,
    items: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float,
    log_q: jax.Array | None = None,
) -> jax.Array:
    """Weighted mean of ``-log softmax([u·v⁺, u·v⁻₁ … u·v⁻_R] / temperature)[0]``.

    A negative equal to its position's target does not count. Gradients flow into outputs and items.

    With ``log_q`` every logit, the positive's too, is ``u·v / temperature - log Q(v)``, where Q is the probability with
    which the negatives were drawn (Yi et al., RecSys 2019, section 3; Bengio & Senécal 2008): then the best logits are
    log P(v | u) up to a constant, and without it log P - log Q. Uniform negatives need none, Q being a constant.

    Args:
      outputs: [B, T, D] (normalise first for cosine similarity).
      items: [V, D], the whole table, normalised likewise.
      targets: int [B, T], ids in 0..V-1.
      weights: [B, T], 1 for a supervised position and 0 for padding; all zero gives a loss of 0.
      negatives: int [B, T, R], or [R] that all positions share.
      temperature: divisor of the similarities.
      log_q: [V], or None.

    Raises:
      ValueError: shapes that do not fit.
    """
    _check(outputs, targets, weights)
    batch, length = targets.shape
    shared = negatives.ndim == 1
    if not shared and (negatives.ndim != 3 or negatives.shape[:2] != (batch, length)):
        raise ValueError(f"negatives must be [{batch}, {length}, R] or [R], got {negatives.shape}")
    scaled = (outputs / temperature).reshape(batch * length, -1)
    if log_q is not None:  # as one more column: u·v - log Q(v) is a product, too
        scaled = jnp.concatenate([scaled, -jnp.ones_like(scaled[:, :1])], axis=1)
        items = jnp.concatenate([items, log_q[:, None].astype(items.dtype)], axis=1)
    weights = _normalised(weights)
    if shared:
        return _shared(scaled, items, targets.reshape(-1, 1), weights, negatives)
    ids = jnp.concatenate([targets[..., None], negatives], axis=-1).reshape(batch * length, -1)
    return _gathered(scaled, items, ids, weights)


def full_softmax(
    outputs: jax.Array, items: jax.Array, targets: jax.Array, weights: jax.Array, *, temperature: float
) -> jax.Array:
    """Weighted mean of ``-log softmax(u·V / temperature)[target]`` over all items but row 0, which is padding.

    Arguments and errors as in :func:`sampled_softmax`. Memory beside the arguments and their gradients is linear in
    B T: logits are made block by block, in the backward pass once more.
    """
    _check(outputs, targets, weights)
    scaled = (outputs / temperature).reshape(-1, outputs.shape[-1])
    positive = jnp.einsum("pd,pd->p", scaled, items[targets.reshape(-1)])
    return jnp.sum(_normalised(weights) * (log_partition(scaled, items) - positive))


def _check(outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> None:
    rows = outputs.shape[:2]
    if targets.shape != rows or weights.shape != rows:
        raise ValueError(f"targets {targets.shape} and weights {weights.shape} must be {rows}")


def _normalised(weights: jax.Array) -> jax.Array:
    """[B, T] -> [B * T] that add up to one, or to zero."""
    total = weights.sum()
    return jnp.where(total > 0, weights / jnp.maximum(total, 1e-9), 0).reshape(-1)


def _cross_entropy(logits: jax.Array, hit: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of -log softmax(logits)[..., 0]; ``hit`` marks negatives that are the target itself."""
    logits = jnp.where(hit, -jnp.inf, logits)
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]))


def _hits(ids: jax.Array) -> jax.Array:
    """True where an id past the first equals the first, the target."""
    return (ids == ids[..., :1]).at[..., 0].set(False)


def _in_chunks(
    scaled: jax.Array, ids: jax.Array, weights: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pads positions (with weight 0) to a multiple of ``size`` and splits them: [chunks, positions, ...]."""
    size = max(1, min(size, scaled.shape[0]))
    short = -scaled.shape[0] % size
    scaled, ids = (jnp.pad(x, ((0, short), (0, 0))).reshape(-1, size, x.shape[1]) for x in (scaled, ids))
    return scaled, ids, jnp.pad(weights, (0, short)).reshape(-1, size)


def _shared(
    scaled: jax.Array, items: jax.Array, targets: jax.Array, weights: jax.Array, negatives: jax.Array
) -> jax.Array:
    """The loss with the same R negatives for every position: R rows are gathered once. targets [P, 1]."""
    rows = items[negatives]

    @jax.checkpoint
    def chunk(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        u, target, w = xs
        positive = jnp.einsum("pd,pd->p", u, items[target[:, 0]])
        logits = jnp.concatenate([positive[:, None], u @ rows.T], axis=1)
        ids = jnp.concatenate([target, jnp.broadcast_to(negatives, (len(target), len(negatives)))], axis=1)
        return total + _cross_entropy(logits, _hits(ids), w), None

    return jax.lax.scan(chunk, jnp.zeros((), scaled.dtype), _in_chunks(scaled, targets, weights, _CHUNK))[0]


@jax.custom_vjp
def _gathered(scaled: jax.Array, items: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The loss by gathering each position's rows of the table, the target's first: scaled [P, D], ids [P, 1 + R]."""
    return _gathered_forward(scaled, items, ids, weights)[0]


_Gradients = tuple[jax.Array, jax.Array, jax.Array]


def _gathered_forward(
    scaled: jax.Array, items: jax.Array, ids: jax.Array, weights: jax.Array
) -> tuple[jax.Array, _Gradients]:
    """Loss and gradients in one pass: the loss is a scalar, so its gradient is known up to a factor already here, and
    the rows of a chunk need not be gathered a second time."""
    positions, width = scaled.shape
    # Rows of whole vector registers: XLA's CPU adds those to a table three times as fast.
    scaled, items = (jnp.pad(x, ((0, 0), (0, -width % _LANES))) for x in (scaled, items))

    def chunk(
        carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        total, d_items = carry
        u, picked, w = xs
        rows = items.at[picked].get(mode="promise_in_bounds")
        logits = jnp.einsum("pd,prd->pr", u, rows)
        loss, pull = jax.vjp(lambda x, y: _cross_entropy(x, _hits(picked), y), logits, w)
        d_logits, d_w = pull(jnp.ones_like(loss))
        d_items = d_items.at[picked].add(d_logits[..., None] * u[:, None], mode="promise_in_bounds")
        return (total + loss, d_items), (jnp.einsum("pr,prd->pd", d_logits, rows), d_w)

    start = (jnp.zeros((), scaled.dtype), jnp.zeros_like(items))
    rows_at_once = _GATHERED_ROWS if target() == "cpu" else _GATHERED_NUMBERS // items.shape[1]
    size = rows_at_once // ids.shape[1]
    (total, d_items), (d_scaled, d_weights) = jax.lax.scan(chunk, start, _in_chunks(scaled, ids, weights, size))
    d_scaled = d_scaled.reshape(-1, d_scaled.shape[-1])[:positions, :width]
    return total, (d_scaled, d_items[:, :width], d_weights.reshape(-1)[:positions])


def _gathered_backward(gradients: _Gradients, d_loss: jax.Array) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_scaled, d_items, d_weights = gradients
    return d_loss * d_scaled, d_loss * d_items, None, d_loss * d_weights


_gathered.defvjp(_gathered_forward, _gathered_backward)


@jax.custom_vjp
def log_partition(scaled: jax.Array, items: jax.Array) -> jax.Array:
    """log of the sum over v >= 1 of exp(scaled · items[v]): [P, D], [V, D] -> [P], with no more than a block of logits
    at a time, forward and backward."""
    return _log_partition_forward(scaled, items)[0]


def _log_partition_forward(scaled: jax.Array, items: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    blocks = _item_blocks(items)

    def chunk(u: jax.Array) -> jax.Array:
        def block(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            most, total = carry
            logits = _block_logits(u, *xs)
            higher = jnp.maximum(most, logits.max(axis=1))
            return (higher, total * jnp.exp(most - higher) + jnp.exp(logits - higher[:, None]).sum(axis=1)), None

        none = (jnp.full(len(u), _LOWEST, u.dtype), jnp.zeros(len(u), u.dtype))
        most, total = jax.lax.scan(block, none, blocks)[0]
        return most + jnp.log(total)

    found = jax.lax.map(chunk, _position_chunks(scaled)).reshape(-1)[: len(scaled)]
    return found, (scaled, items, found)


def _log_partition_backward(kept: tuple[jax.Array, ...], d_found: jax.Array) -> tuple[jax.Array, jax.Array]:
    scaled, items, found = kept
    blocks = _item_blocks(items)

    def chunk(d_items: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, log_total, d_log_total = xs

        def block(d_u: jax.Array, own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_logits = d_log_total[:, None] * jnp.exp(_block_logits(u, *own) - log_total[:, None])
            return d_u + d_logits @ own[0], d_logits.T @ u

        d_u, more = jax.lax.scan(block, jnp.zeros_like(u), blocks)
        return d_items + more, d_u

    log_total, d_log_total = (_position_chunks(x[:, None])[..., 0] for x in (found, d_found))
    chunks = (_position_chunks(scaled), log_total, d_log_total)
    d_items, d_scaled = jax.lax.scan(chunk, jnp.zeros_like(blocks[0]), chunks)
    return (
        d_scaled.reshape(-1, scaled.shape[1])[: len(scaled)],
        d_items.reshape(-1, items.shape[1])[: len(items)],
    )


log_partition.defvjp(_log_partition_forward, _log_partition_backward)

_LOWEST = -1e30  # of a logit that does not count: finite, so that differences are


def _item_blocks(items: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [blocks, block, D], the last filled up with zeros, and which of them count [blocks, block]."""
    size = min(_BLOCK, len(items))
    short = -len(items) % size
    index = jnp.arange(len(items) + short)
    rows = jnp.pad(items, ((0, short), (0, 0)))
    return rows.reshape(-1, size, items.shape[1]), ((index > 0) & (index < len(items))).reshape(-1, size)


def _position_chunks(x: jax.Array) -> jax.Array:
    """[P, D] -> [chunks, chunk, D], filled up with zeros."""
    size = min(_CHUNK, max(1, len(x)))
    return jnp.pad(x, ((0, -len(x) % size), (0, 0))).reshape(-1, size, x.shape[1])


def _block_logits(u: jax.Array, rows: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.where(counts, u @ rows.T, _LOWEST)
