"""What every ranker may know of a request beside its ids: numeric features and the classical rankers' fields.

Both are computed inside jit from the Batch alone, so that pointwise rankers and sequence models see the same
information. No field holds the user's id: users of a split by time are mostly new, and the history is the user.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Shape
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.nn.cost import Cost
from genrec_jax.nn.embedding import FeatureTables
from genrec_jax.nn.hashing import Hashing, item_table

DAY = 86_400  # seconds
RECENT = 8  # events of the short-term rate
PRIOR = 2.0  # pseudo-events that pull a rate towards its prior
COUNTED_VOCAB = 256  # a feature with more ids is matched by comparison: a table of counts would be mostly zeros


def request_feature_count(schema: Schema) -> int:
    """F, the last axis of :func:`request_features`."""
    tasks = len(schema.tasks)
    return 8 + 2 * tasks + (2 + tasks) * len(schema.item_features)


def request_features(batch: Batch, schema: Schema) -> jax.Array:
    """Numeric features [B, C, F] float32 of every candidate's request, all of order one; zeros at padding.

    In order: log history length; per task the positive rate of the history, then its change over the last 8 events;
    per item feature the log count and the share of history events that have the candidate's ids, then per task the
    change of the positive rate on those events (means over the candidate's ids); log time since the last and since
    the first event; whether the item was seen; sine and cosine of the time of day and of the week. Rates are log-odds
    of counts smoothed by two pseudo-events (towards one half for the history, towards the history's own rate
    below it), so an absent history or id reads as exact zeros.
    """
    history, candidates = batch.history, batch.candidates
    member = segment_members(history.segment, batch.user.shape[1])  # [B, N, S]
    ones = jnp.ones((*history.item.shape, 1), jnp.float32)
    events = jnp.concatenate([ones, history.labels.astype(jnp.float32)], axis=-1)  # [B, N, 1 + A]: count, positives
    totals = jnp.einsum("bns,bna->bsa", member, events)
    recent = jnp.einsum("bns,bna->bsa", member * (_recency(member) <= RECENT).astype(jnp.float32), events)
    rate = (totals[..., 1:] + 0.5 * PRIOR) / (totals[..., :1] + PRIOR)

    segment = candidates.segment
    total, rate_c = of_segment(totals, segment), of_segment(rate, segment)
    parts = [_log_count(total[..., :1]), of_segment(_log_odds(rate), segment)]
    parts.append(of_segment(_lift(recent, rate), segment))
    for feature in schema.item_features:
        parts += _feature_match(feature, batch, member, events, total, rate_c)
    same = (segment[..., None] == history.segment[:, None]) & (segment > 0)[..., None]  # [B, C, N]
    seen = jnp.any(same & (candidates.item[..., None] == history.item[:, None]), axis=-1, keepdims=True)
    parts += [_gaps(batch, member, total[..., 0] > 0), seen.astype(jnp.float32), _clock(candidates.time)]
    return jnp.where((segment > 0)[..., None], jnp.concatenate(parts, axis=-1), 0.0)


def request_features_cost(schema: Schema, shape: Shape) -> Cost:
    """FLOPs of :func:`request_features` for one row: its products over the history, at 2 per multiply-add.

    An event brings 1 + A numbers, itself and its labels. They are summed over the history and over its last events; per
    item feature, into its place in a one-hot table of V counts, or into each of W ids of the K candidates of its own
    segment (by the feature's vocabulary). The one-hot table is a true product and is charged whole. Comparisons of
    ids, minima, running counts, and what is done to finished counts (logarithms, rates) are elementwise: not counted.
    There are no parameters and nothing is kept for the backward pass; training is charged three times this like
    everything else, although these numbers need no gradient.
    """
    targets = (f.vocab if _counted_by_table(f) else shape.candidates * f.width for f in schema.item_features)
    return Cost(flops=2.0 * shape.history * (1 + len(schema.tasks)) * (2 + sum(targets)))


def segment_members(segment: jax.Array, segments: int) -> jax.Array:
    """segment [B, N] -> [B, N, S] float32, 1 where event n belongs to segment s + 1; padding belongs to none."""
    return jax.nn.one_hot(segment - 1, segments, dtype=jnp.float32)


def of_segment(values: jax.Array, segment: jax.Array) -> jax.Array:
    """values [B, S, ...] of each segment, segment [B, C] -> [B, C, ...] of each candidate's (padding: the first's)."""
    index = jnp.maximum(segment - 1, 0).reshape(*segment.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def _recency(member: jax.Array) -> jax.Array:
    """[B, N, S]: 1 at a segment's last event, 2 at the one before, ..."""
    return jnp.flip(jnp.cumsum(jnp.flip(member, axis=1), axis=1), axis=1)


def _log_count(count: jax.Array) -> jax.Array:
    return jnp.log1p(count) / jnp.log(65.0)


def _log_time(seconds: jax.Array) -> jax.Array:
    return jnp.log1p(jnp.maximum(seconds, 0).astype(jnp.float32)) / jnp.log1p(float(DAY))


def _log_odds(rate: jax.Array) -> jax.Array:
    return jnp.log(rate) - jnp.log1p(-rate)


def _lift(counts: jax.Array, rate: jax.Array) -> jax.Array:
    """counts [..., 1 + A] of some events and of their positives, rate [..., A] -> change of the log-odds [..., A]."""
    smoothed = (counts[..., 1:] + PRIOR * rate) / (counts[..., :1] + PRIOR)
    return _log_odds(smoothed) - _log_odds(rate)


def _feature_match(
    feature: Feature, batch: Batch, member: jax.Array, events: jax.Array, total: jax.Array, rate: jax.Array
) -> list[jax.Array]:
    """Log count [B, C, 1], share [B, C, 1] and rate lift [B, C, A] of the history events with the candidate's ids."""
    past, ids = batch.history.features[feature.name], batch.candidates.features[feature.name]
    if feature.width == 1:
        past, ids = past[..., None], ids[..., None]
    segment = batch.candidates.segment
    if _counted_by_table(feature):
        counts = _counts_by_table(past, ids, segment, member, events, feature.vocab)
    else:
        counts = _counts_by_comparison(past, ids, segment, batch.history.segment, events)
    known = (ids > 0).astype(jnp.float32)[..., None]  # [B, C, W, 1]

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(known * values, axis=2) / jnp.maximum(jnp.sum(known, axis=2), 1.0)

    count = counts[..., :1]
    share = count / jnp.maximum(total[:, :, None, :1], 1.0)
    return [mean(_log_count(count)), mean(share), mean(_lift(counts, rate[:, :, None]))]


def _counted_by_table(feature: Feature) -> bool:
    return feature.vocab <= COUNTED_VOCAB


def _counts_by_table(
    past: jax.Array, ids: jax.Array, segment: jax.Array, member: jax.Array, events: jax.Array, vocab: int
) -> jax.Array:
    """[B, C, W, 1 + A]: events with each of the candidate's ids, read from counts per segment and id."""
    numbers = jnp.arange(vocab, dtype=past.dtype).reshape(1, 1, 1, vocab)
    has = jnp.any(past[..., None] == numbers, axis=2).astype(jnp.float32)  # [B, N, V]
    weights = member[..., None] * events[:, :, None]  # [B, N, S, 1 + A]
    flat = jnp.einsum("bnv,bnx->bvx", has, weights.reshape(*weights.shape[:2], -1))
    table = jnp.moveaxis(flat.reshape(*flat.shape[:2], *weights.shape[2:]), 1, 2)  # [B, S, V, 1 + A]
    rows = jnp.arange(ids.shape[0]).reshape(-1, 1, 1)
    return table[rows, jnp.maximum(segment - 1, 0)[..., None], ids]


def _counts_by_comparison(
    past: jax.Array, ids: jax.Array, segment: jax.Array, past_segment: jax.Array, events: jax.Array
) -> jax.Array:
    """The same counts by comparing every candidate id with every event's, one of the event's ids at a time."""
    has = jnp.zeros((*ids.shape, past.shape[1]), bool)  # [B, C, W, N]
    for w in range(past.shape[2]):
        has |= ids[..., None] == past[:, None, None, :, w]
    has &= segment[:, :, None, None] == past_segment[:, None, None]
    return jnp.einsum("bcwn,bna->bcwa", has.astype(jnp.float32), events)


def _gaps(batch: Batch, member: jax.Array, any_event: jax.Array) -> jax.Array:
    """[B, C, 2]: log time from the last and from the first event to the request; 0 without history."""
    inside, time = member > 0, batch.history.time[..., None]
    last = jnp.max(jnp.where(inside, time, jnp.iinfo(jnp.int32).min), axis=1, initial=0)
    first = jnp.min(jnp.where(inside, time, jnp.iinfo(jnp.int32).max), axis=1, initial=jnp.iinfo(jnp.int32).max)
    ends = of_segment(jnp.stack([last, first], axis=-1), batch.candidates.segment)
    return jnp.where(any_event[..., None], _log_time(batch.candidates.time[..., None] - ends), 0.0)


def _clock(time: jax.Array) -> jax.Array:
    """[B, C, 4]: sine and cosine of the phase in the day and in the week, taken in integers to keep the seconds."""
    phases = [(time % period).astype(jnp.float32) * (2 * jnp.pi / period) for period in (DAY, 7 * DAY)]
    return jnp.stack([f(p) for p in phases for f in (jnp.sin, jnp.cos)], axis=-1)


class Fields(nnx.Module):
    """The categorical fields of the classical rankers, each one ``dim``-vector per candidate.

    Context features; the candidate's item and its side features; the bag (mean) of the history's items and, per task,
    the bag of the items it was positive on. Bags share the item table.
    """

    def __init__(
        self,
        schema: Schema,
        dim: int,
        *,
        hashing: Hashing | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.dim, self.bags = dim, 1 + len(schema.tasks)
        self.item_width = dim * (1 + len(schema.item_features))
        self.count = len(schema.context_features) + 1 + len(schema.item_features) + self.bags
        self.items = item_table(schema.items, dim, hashing=hashing, dtype=dtype, rngs=rngs)
        self.sides = FeatureTables(schema.item_features, dim, dtype=dtype, rngs=rngs)
        self.contexts = FeatureTables(schema.context_features, dim, dtype=dtype, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        """[B, C, fields, dim]."""
        candidates = batch.candidates
        context = [of_segment(e, candidates.segment) for e in self.contexts(batch.context.features)]
        item = [self.items(candidates.item), *self.sides(candidates.features)]
        bags = of_segment(self._bags(batch), candidates.segment)
        return jnp.concatenate([jnp.stack([*context, *item], axis=2), bags], axis=2)

    def candidate(self, batch: Batch) -> jax.Array:
        """[B, C, item_width]: the candidate's item and side features, concatenated."""
        candidates = batch.candidates
        return jnp.concatenate([self.items(candidates.item), *self.sides(candidates.features)], axis=-1)

    def history(self, batch: Batch) -> jax.Array:
        """[B, N, item_width]: the same vector of every history event."""
        return jnp.concatenate([self.items(batch.history.item), *self.sides(batch.history.features)], axis=-1)

    def _bags(self, batch: Batch) -> jax.Array:
        """[B, S, 1 + A, dim]: mean item vector of each segment's events and of its positives of each task."""
        history = batch.history
        e = self.items(history.item)
        ones = jnp.ones((*history.item.shape, 1), jnp.float32)
        events = jnp.concatenate([ones, history.labels.astype(jnp.float32)], axis=-1)
        weights = segment_members(history.segment, batch.user.shape[1])[..., None] * events[:, :, None]
        mean = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
        return jnp.einsum("bnsa,bnd->bsad", mean.astype(e.dtype), e)

    def cost(self, shape: Shape, *, side_events: int = 0) -> Cost:
        """Look-ups and bags of one row; ``side_events``: history events whose side features are read too."""
        bags = Cost(flops=2.0 * shape.history * self.bags * self.dim)  # an event is in one segment
        reads = self.items.cost(shape.slots + shape.history) + self.contexts.cost(shape.segments)
        return reads + self.sides.cost(shape.slots + side_events) + bags
