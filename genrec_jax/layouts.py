"""From a Batch to a row of tokens: which token stands where, what each may see, and how many pairs that makes.

Every row is ``[S context | N history events, one or two tokens each | C candidates]``. Within a segment the order is
context 0, then the history, then one shared order for all candidates: a candidate sees its segment's context and
history and itself, never another candidate, so scoring K candidates together equals scoring them one by one. Events
shown together share an order too: nobody knows the action on an item while choosing on its neighbour, so none of a
request's events sees another, as history or as candidates. Nothing here depends on S or on a row's neighbours, so a
packed row equals its segments alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genrec_jax.batch import Batch, Filled, Shape
from genrec_jax.nn.features import of_segment
from kernels_pallas.hstu_attention import Tokens

_NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Layout:
    """``context``: leading tokens of a segment (0 or 1); ``per_event``: tokens of one history event;
    ``candidates``: whether candidates are tokens."""

    context: int
    per_event: int
    candidates: bool = True

    def row_tokens(self, shape: Shape) -> int:
        """Tokens of a row, padding included."""
        return shape.segments * self.context + shape.history * self.per_event + self.candidates * shape.slots

    def longest(self, history: int) -> int:
        """Longest sequence one token can see: HSTU's constant divisor and the reach of the position tables."""
        return self.context + history * self.per_event + self.candidates

    def pairs(self, shape: Shape) -> float:
        """Attention pairs of a row: in each segment the causal half of its prefix, and each candidate's row.

        ``P (P + 1) / 2 + K (P + 1)`` for P context and history tokens and K candidates that see the prefix and
        themselves, summed over the segments that fill the row, or over S equal ones.
        """
        segments, n = shape.segments, shape.history
        filled = shape.filled or Filled(segments, n, n**2 / segments)
        c, e = self.context, self.per_event
        prefix = c * filled.segments + e * filled.events
        squares = c**2 * filled.segments + 2 * c * e * filled.events + e**2 * filled.squares
        candidates = shape.candidates if self.candidates else 0
        return (squares + prefix) / 2 + candidates * (prefix + filled.segments)

    def tokens(self, batch: Batch) -> Tokens:
        """Attributes of the T = ``row_tokens`` tokens of each row; a token asks and is looked at at its own time."""
        history, candidates = batch.history, batch.candidates
        segments = batch.user.shape[1]
        # An action comes one order after its item, so it sees it; its request's other items may stand later in the row.
        event_order = self._order(history.before)[..., None] + jnp.arange(self.per_event, dtype=jnp.int32)
        context_segment, context_time = _segments(batch)

        def row(context: jax.Array, event: jax.Array, candidate: jax.Array) -> jax.Array:
            event = event.reshape(event.shape[0], -1)
            return jnp.concatenate([context[:, : segments * self.context], event, candidate], axis=1).astype(jnp.int32)

        def twice(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, self.per_event, axis=1)

        time = row(context_time, twice(history.time), candidates.time)
        return Tokens(
            segment=row(context_segment, twice(history.segment), candidates.segment),
            order=row(jnp.zeros_like(context_segment), event_order, self._order(candidates.before)),
            query_time=time,
            key_time=time,
        )

    def _order(self, before: jax.Array) -> jax.Array:
        """Order of the first token of what was shown after ``before`` events of its segment."""
        return self.context + self.per_event * before


# HSTU ranking: context, i1, a1, i2, a2, ..., candidates (arXiv 2402.17152, section 2).
INTERLEAVED = Layout(context=1, per_event=2)
# DirL: context, one token per event, candidates.
CONTEXT_HISTORY_CANDIDATES = Layout(context=1, per_event=1)
# Retrieval: the history's items alone.
ITEMS = Layout(context=0, per_event=1, candidates=False)


def join(context: jax.Array, events: list[jax.Array], candidates: jax.Array) -> jax.Array:
    """context [B, S, D], one [B, N, D] per token of an event, candidates [B, C, D] -> [B, T, D] in layout order."""
    batch, n, width = events[0].shape
    history = jnp.stack(events, axis=2).reshape(batch, n * len(events), width)
    return jnp.concatenate([context, history, candidates], axis=1)


def split(x: jax.Array, context: int, history: int, per_event: int) -> tuple[jax.Array, jax.Array]:
    """The inverse for reading predictions: [B, T, D] -> each event's first token [B, N, D], candidates [B, C, D]."""
    end = context + history * per_event
    return x[:, context:end:per_event], x[:, end:]


class NextItem(NamedTuple):
    """Retrieval's rows. position [B, N]: place in the segment, oldest 0; target [B, N]: next item's id, 0 for none."""

    tokens: Tokens
    position: jax.Array
    target: jax.Array


def next_item(batch: Batch) -> NextItem:
    """Each history item predicts the one after it, a segment's last item its (first) candidate.

    A token asks at the time of the event it predicts, as in the public HSTU code: a recommender knows when it is
    asked. Without a candidate the last item asks at its own time and has no target.
    """
    history, candidates = batch.history, batch.candidates
    here = _member(candidates.segment, batch.user.shape[1])  # [B, C, S]
    has = of_segment(jnp.any(here, axis=1), history.segment)
    slot = of_segment(jnp.argmax(here, axis=1), history.segment)  # [B, N]: the segment's first candidate
    inside = (history.segment == _shifted(history.segment, 0)) & (history.segment > 0)
    last = (history.segment > 0) & ~inside & has

    def following(past: jax.Array, candidate: jax.Array, otherwise: jax.Array) -> jax.Array:
        ends = jnp.where(last, jnp.take_along_axis(candidate, slot, axis=1), otherwise)
        return jnp.where(inside, _shifted(past, 0), ends).astype(jnp.int32)

    position = segment_positions(history.segment)
    tokens = Tokens(
        segment=history.segment.astype(jnp.int32),
        order=position,
        query_time=following(history.time, candidates.time, history.time),
        key_time=history.time.astype(jnp.int32),
    )
    return NextItem(tokens, position, following(history.item, candidates.item, jnp.zeros_like(history.item)))


def last_events(segment: jax.Array, segments: int) -> jax.Array:
    """Index [B, S] of each segment's last event in ``segment`` [B, N]; 0 for an empty segment."""
    index = jnp.arange(segment.shape[1], dtype=jnp.int32)[None, :, None]
    return jnp.max(jnp.where(_member(segment, segments), index, 0), axis=1)


def segment_positions(segment: jax.Array) -> jax.Array:
    """segment [B, N], contiguous -> position [B, N] int32 of each event in its own segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    before = jnp.pad(segment[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segment != before, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def _member(segment: jax.Array, segments: int) -> jax.Array:
    """[B, N] -> [B, N, S] bool: event n belongs to segment s + 1."""
    return segment[..., None] == jnp.arange(1, segments + 1, dtype=segment.dtype)


def _shifted(x: jax.Array, fill: int) -> jax.Array:
    """x [B, N] one step earlier: entry n holds x[n + 1]."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)


def _segments(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Segment ids [B, S] of the context tokens (0 where a segment is empty) and their times.

    The context's time is that of its segment's first event: a later one would tell past events about the future.
    """
    segments = batch.user.shape[1]
    members = [_member(part.segment, segments) for part in (batch.history, batch.candidates)]
    times = [batch.history.time, batch.candidates.time]
    present = jnp.any(members[0], axis=1) | jnp.any(members[1], axis=1)
    first = [jnp.min(jnp.where(m, t[..., None], _NEVER), axis=1) for m, t in zip(members, times)]
    ids = jnp.arange(1, segments + 1, dtype=jnp.int32)
    return jnp.where(present, ids, 0), jnp.minimum(*first)
