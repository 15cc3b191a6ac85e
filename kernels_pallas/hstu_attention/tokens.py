"""Token attributes and the one mask that is a program over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """What attention has to know of each token; every field is int32 [B, T].

    A row may pack several sequences (segments). A token sees nothing that stands after it in the row, so backends
    compute only the causal half of the square.

    Attributes:
      segment: 0 for padding, otherwise 1..S, the packed sequence the token belongs to.
      order: causal position inside the segment. Items of one request share one value, so that they see the history
        and themselves but not each other.
      query_time: seconds; the token's time when it asks (retrieval: the time of the next event).
      key_time: seconds; the token's time when it is looked at.
    """

    segment: jax.Array
    order: jax.Array
    query_time: jax.Array
    key_time: jax.Array


def visible(tokens: Tokens, rows: slice = slice(None), columns: slice = slice(None)) -> jax.Array:
    """Which key (last axis) each query (axis -2) sees: bool [B, T, T], or the rectangle ``rows`` × ``columns``.

    A token sees itself and every earlier token of its own segment with a strictly smaller order; padding sees nothing
    and is seen by nothing.
    """
    index = jnp.arange(tokens.segment.shape[-1], dtype=jnp.int32)
    segment_q, segment_k = tokens.segment[..., rows, None], tokens.segment[..., None, columns]
    order_q, order_k = tokens.order[..., rows, None], tokens.order[..., None, columns]
    index_q, index_k = index[rows, None], index[None, columns]
    earlier = (index_k < index_q) & (order_k < order_q)
    return (segment_q == segment_k) & (segment_q != 0) & (earlier | (index_q == index_k))
