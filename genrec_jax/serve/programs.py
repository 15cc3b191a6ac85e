"""The two compiled functions of M-FALCON (Zhai et al., arXiv 2402.17152): encode a history, score candidates.

What a user's prefix [context | events] leaves behind is each block's keys and values, *layers*: per block a pair
[1, P, H, D], P = context + tokens of ``capacity`` events. Masks, orders and times come from the model's own layout of
the same Batch that the model would read whole.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from genrec_jax.batch import Batch, History
from genrec_jax.layouts import join
from genrec_jax.models.sequence import SequenceRanker
from genrec_jax.nn.hstu import HSTUBlock, Kept
from genrec_jax.train.step import bind
from kernels_pallas.hstu_attention import Tokens, scaled, split_tokens

CacheType = Literal["float32", "bfloat16", "int8"]
Layers = tuple[tuple[Kept, Kept], ...]


def keep(x: jax.Array, kind: CacheType) -> Kept:
    """Keys or values as a cache of this kind holds them."""
    return scaled(x) if kind == "int8" else x.astype(kind)


def prefix_tokens(model: SequenceRanker, capacity: int) -> int:
    """P."""
    return model.layout.context + model.layout.per_event * capacity


def hstu_blocks(model: SequenceRanker) -> list[HSTUBlock]:
    return [block for block in model.stack.blocks if isinstance(block, HSTUBlock)]


class Programs:
    """The functions of one model, compiled once for each shape they meet; parameters are an argument."""

    def __init__(self, model: SequenceRanker, kind: CacheType):
        self.model, self.kind = model, kind
        self.extend = jax.jit(functools.partial(extend, model, kind), static_argnames="chunk", donate_argnums=1)
        self.score = jax.jit(functools.partial(score, model))

    @property
    def widths(self) -> list[tuple[int, int, int]]:
        """Of each block: heads, and the widths of one head's keys and values."""
        return [(b.heads, b.keys // b.heads, b.values // b.heads) for b in hstu_blocks(self.model)]

    def empty(self, capacity: int) -> Layers:
        """Layers that hold nothing yet."""
        return empty_layers(self.widths, prefix_tokens(self.model, capacity), self.kind)


def empty_layers(widths: Sequence[tuple[int, int, int]], slots: int, kind: CacheType) -> Layers:
    """Layers of P = ``slots`` tokens that hold nothing yet; ``widths`` as in `Programs`."""

    def part(heads: int, width: int) -> Kept:
        return keep(jnp.zeros((1, slots, heads, width), jnp.float32), kind)

    return tuple((part(heads, keys), part(heads, values)) for heads, keys, values in widths)


def extend(
    model: SequenceRanker, kind: CacheType, params: Any, layers: Layers, batch: Batch, tokens: jax.Array, *, chunk: int
) -> Layers:
    """Layers with the prefix's next ``chunk`` events added to the ``tokens`` it holds (0, or the context and whole
    events); ``layers`` is consumed. The batch has one row and holds the whole history, the new events included."""
    model = bind(model, params)
    layout, capacity = model.layout, batch.history.item.shape[1]
    slots = prefix_tokens(model, capacity)
    first = jnp.maximum(tokens - layout.context, 0) // layout.per_event
    context, events = model.prefix(_with_history(batch, first, chunk))
    x = join(context, events, jnp.zeros_like(context[:, :0]))
    # Once the context is in the cache the rows begin with the events; what then stands last is a slot too many, which
    # the next chunk overwrites before anyone sees it.
    x = jnp.where(tokens == 0, x, jnp.roll(x, -layout.context, axis=1))
    whole = jax.tree.map(lambda field: field[:, :slots], layout.tokens(batch))
    new, earlier = split_tokens(whole, tokens[None], slots, x.shape[1])
    x = jnp.where((new.segment > 0)[..., None], x, 0)
    place = tokens + jnp.arange(x.shape[1], dtype=jnp.int32)
    grown = []
    for block, kept in zip(hstu_blocks(model), layers, strict=True):
        x, own = block.cached(x, new, kept, earlier, keep=functools.partial(keep, kind=kind))
        # Padding at the end lands in slots of later events, or beyond the last slot and is dropped.
        grown.append(jax.tree.map(lambda old, part: old.at[:, place].set(part, mode="drop"), kept, own))
    return tuple(grown)


def score(model: SequenceRanker, params: Any, layers: Sequence[Layers], batch: Batch) -> jax.Array:
    """Logits [B, C, A] float32 of the batch's candidates, given each row's layers with its whole prefix."""
    model = bind(model, params)
    slots = prefix_tokens(model, batch.history.item.shape[1])
    together = layers[0] if len(layers) == 1 else jax.tree.map(lambda *rows: jnp.concatenate(rows), *layers)
    whole = model.layout.tokens(batch)
    earlier, new = (_part(whole, part) for part in (slice(0, slots), slice(slots, None)))
    x = jnp.where((new.segment > 0)[..., None], model.candidate_tokens(batch), 0)
    for block, kept in zip(hstu_blocks(model), together, strict=True):
        x, _ = block.cached(x, new, kept, earlier, one_request=True)
    return model.logits(x)


def _part(tokens: Tokens, part: slice) -> Tokens:
    return jax.tree.map(lambda field: field[:, part], tokens)


def _with_history(batch: Batch, first: jax.Array, count: int) -> Batch:
    """The batch with only ``count`` of its history slots, from ``first`` on; what lies past the end is padding."""
    index = first + jnp.arange(count, dtype=jnp.int32)
    history: History = jax.tree.map(lambda x: jnp.take(x, index, axis=1, mode="fill", fill_value=0), batch.history)
    return Batch(batch.user, batch.context, history, batch.candidates)
