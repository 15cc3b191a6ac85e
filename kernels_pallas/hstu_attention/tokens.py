"""Token attributes and the one mask that is a program over them; every backend evaluates `sees`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """What attention has to know of each token; every field is int32 [B, T].

    A row may pack several sequences (segments). Build the attributes of jagged or padded sequences with
    `jagged_tokens` and `padded_tokens`.

    Attributes:
      segment: 0 for padding, otherwise 1..S, the packed sequence the token belongs to.
      order: causal position inside the segment, from 0. Items of one request share one value, so that they see the
        history and themselves but not each other.
      query_time: seconds; the token's time when it asks (retrieval: the time of the next event).
      key_time: seconds; the token's time when it is looked at.
      low: the smallest order the token sees (a sliding window); None for 0.
      high: the token sees orders below this one; None for its own order. A token whose ``high`` exceeds its order (a
        context prefix) also sees keys that stand after it in the row; every other token sees only keys before it.
      position: the place the position bias counts from; None for the order.
    """

    segment: jax.Array
    order: jax.Array
    query_time: jax.Array
    key_time: jax.Array
    low: jax.Array | None = None
    high: jax.Array | None = None
    position: jax.Array | None = None


class Queries(NamedTuple):
    """What a query's row of the mask and of the bias needs; every field is int32 [B, T].

    Attributes:
      low, high: the query sees keys with ``low <= rank < high``; both 0 for padding.
      until: it sees keys whose index in the row is below this one.
      self: index of the key that is the query itself, -1 for padding.
      position, time: for the biases.
    """

    low: jax.Array
    high: jax.Array
    until: jax.Array
    self: jax.Array
    position: jax.Array
    time: jax.Array


class Keys(NamedTuple):
    """What a key's column of the mask and of the bias needs; every field is int32 [B, T].

    Attributes:
      rank: grows with the segment, inside it with the order; -1 for padding.
      position, time: for the biases.
    """

    rank: jax.Array
    position: jax.Array
    time: jax.Array


def sees(
    low: jax.Array, high: jax.Array, until: jax.Array, self: jax.Array, rank: jax.Array, index: jax.Array
) -> jax.Array:
    """The mask, elementwise with broadcasting: may the query (first four) look at the key (last two)?"""
    return ((low <= rank) & (rank < high) & (index < until)) | (self == index)


def attributes(tokens: Tokens) -> tuple[Queries, Keys]:
    """The attributes of a row's tokens as queries and as keys.

    Segment and order become one number, the rank, so that the keys a query sees are an interval of ranks. Ranks stay
    below (S + 1) · (largest order + 2), which must fit in int32.
    """
    real = tokens.segment > 0
    order = jnp.where(real, tokens.order, 0)
    low = jnp.zeros_like(order) if tokens.low is None else jnp.maximum(tokens.low, 0)
    high = order if tokens.high is None else tokens.high
    length = order.shape[-1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), order.shape)
    span = jnp.max(jnp.maximum(order, jnp.where(real, high, 0)), axis=-1, keepdims=True, initial=0) + 1
    base = tokens.segment * span
    position = order if tokens.position is None else tokens.position
    queries = Queries(
        low=jnp.where(real, base + jnp.minimum(low, span - 1), 0),
        high=jnp.where(real, base + high, 0),
        until=jnp.where(high > order, length, index),
        self=jnp.where(real, index, -1),
        position=position,
        time=tokens.query_time,
    )
    return queries, Keys(jnp.where(real, base + order, -1), position, tokens.key_time)


def visible(tokens: Tokens, rows: slice = slice(None), columns: slice = slice(None)) -> jax.Array:
    """Which key (last axis) each query (axis -2) sees: bool [B, T, T], or the rectangle ``rows`` × ``columns``.

    A token sees itself, and the tokens of its own segment whose order lies in ``[low, high)``: by default every
    earlier token with a strictly smaller order. Padding sees nothing and is seen by nothing.
    """
    queries, keys = attributes(tokens)
    index = jnp.arange(tokens.segment.shape[-1], dtype=jnp.int32)
    low, high, until, itself = (x[..., rows, None] for x in queries[:4])
    return sees(low, high, until, itself, keys.rank[..., None, columns], index[columns])


def jagged_tokens(
    offsets: jax.Array,
    total: int,
    *,
    num_targets: jax.Array | None = None,
    window: int = 0,
    full_len: int = 0,
    context_len: int = 0,
    timestamps: jax.Array | None = None,
) -> Tokens:
    """Attributes [1, total] of sequences that stand one after the other (the public HSTU kernels' semantics).

    Sequence b fills ``offsets[b]:offsets[b + 1]`` as [context | history | targets]; what lies past ``offsets[B]`` is
    padding. A history token sees itself and what is before it; a target sees context, history and itself, never
    another target; a context token sees context and history.

    Args:
      offsets: int [B + 1], rising from 0.
      total: T, the number of rows of q, k and v.
      num_targets: int [B], the candidates at the end of each sequence; None for none.
      window: a query sees at most this many steps back; 0 for all.
      full_len: the last this many history tokens and all targets see beyond the window (semi-local attention).
      context_len: tokens at the start of each sequence that see all of the history, as one step of the window.
      timestamps: int32 [total] in seconds, for a time bias. A history token asks at the time of its successor (the
        last one of a sequence at its own), a target at its own time.
    """
    offsets = offsets.astype(jnp.int32)
    index = jnp.arange(total, dtype=jnp.int32)
    sequence = jnp.searchsorted(offsets, index, side="right").astype(jnp.int32) - 1
    real = index < offsets[-1]
    b = jnp.clip(sequence, 0, max(offsets.shape[0] - 2, 0))
    length = offsets[b + 1] - offsets[b]
    place = index - offsets[b]
    targets = jnp.zeros_like(length) if num_targets is None else num_targets.astype(jnp.int32)[b]
    times = _times(timestamps, place, length, targets)
    fields = _sequence_fields(place, length, targets, window=window, full_len=full_len, context_len=context_len)
    segment = jnp.where(real, b + 1, 0)
    return jax.tree.map(lambda x: x[None], Tokens(segment, fields[0], *times, *fields[1:]))


def padded_tokens(
    lengths: jax.Array,
    longest: int,
    *,
    num_targets: jax.Array | None = None,
    window: int = 0,
    full_len: int = 0,
    context_len: int = 0,
    timestamps: jax.Array | None = None,
) -> Tokens:
    """Attributes [B, longest] of one sequence per row, of ``lengths`` [B] tokens; the rest as in `jagged_tokens`.

    ``timestamps`` is int32 [B, longest].
    """
    place = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), (lengths.shape[0], longest))
    length = lengths.astype(jnp.int32)[:, None]
    targets = jnp.zeros_like(length) if num_targets is None else num_targets.astype(jnp.int32)[:, None]
    times = _times(timestamps, place, length, targets)
    fields = _sequence_fields(place, length, targets, window=window, full_len=full_len, context_len=context_len)
    segment = (place < length).astype(jnp.int32)
    return Tokens(segment, fields[0], *times, *fields[1:])


def _times(
    timestamps: jax.Array | None, place: jax.Array, length: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """query_time and key_time of the tokens at ``place`` in sequences of ``length`` tokens."""
    if timestamps is None:
        return jnp.zeros_like(place), jnp.zeros_like(place)
    own = timestamps.astype(jnp.int32)
    following = jnp.concatenate([own[..., 1:], own[..., -1:]], axis=-1)
    return jnp.where((place + 1 < length) & (place < length - targets), following, own), own


def _sequence_fields(
    place: jax.Array, length: jax.Array, targets: jax.Array, *, window: int, full_len: int, context_len: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """order, low, high and position of the tokens at ``place`` in sequences of ``length`` tokens; None where `Tokens`
    has it by itself, so that a backend knows that no window, or no look ahead, is about.

    The context counts as one step and all targets as one step (Meta's HSTU kernels: the same ids, the same distances).
    """
    steps = length - max(context_len - 1, 0) - targets  # the order of the targets
    order = jnp.minimum(jnp.maximum(place - max(context_len - 1, 0), 0), jnp.maximum(steps, 0))
    low = high = position = None
    if window:
        low = order - window
        if full_len:
            low = jnp.where(order >= steps - full_len, 0, low)
    if context_len:
        prefix = place < context_len
        low = None if low is None else jnp.where(prefix, 0, low)
        high = jnp.where(prefix, jnp.maximum(steps, order), order)
        position = jnp.minimum(place, length - targets)
    return order, low, high, position
