"""The fixed tables of a world: label probabilities by hidden state, items, and their drifting popularity.

An item matters to labels only by its kind, cluster * qualities + quality, and a state is z * S + s; so everything a
label depends on is a small table [kind, state], and filtering is look-ups. Dimensions: A tasks, P = 2^A label patterns
(task t is bit t), G domains, Z types, S states, H = Z S, C clusters, Q qualities, I items.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from genrec_jax.data.synthetic.exact import Stream, exp, log, sigmoid, total
from genrec_jax.data.synthetic.world import World

# Streams of the world's own tables, far from the user blocks' (0, 1, 2, ...).
_LABEL_STREAM, _ITEM_STREAM, _POPULARITY_STREAM = (2**63 + i for i in range(3))
# Share of an affinity's or interest's variance that all tasks have in common.
_COMMON = 0.6


@dataclasses.dataclass(frozen=True)
class Labels:
    """What labels depend on. pattern [C Q, H, P]: P(label pattern | kind, state in its domain); rate [C Q, H, A]:
    P(y_t = 1 | the same); region [R, Z]: P(region | type in domain 0); domain [C Q]: of a kind, cluster modulo G."""

    pattern: np.ndarray
    rate: np.ndarray
    region: np.ndarray
    domain: np.ndarray


@dataclasses.dataclass(frozen=True)
class Items:
    """Tables by item id, row 0 being padding: kind [I + 1] int32 and category [I + 1] int32 in ``1..categories``."""

    kind: np.ndarray
    category: np.ndarray
    categories: int


@dataclasses.dataclass(frozen=True)
class Popularity:
    """The distribution of shown items in each period, end to end.

    item [L] int32: ids of the atoms alive in period 0, then of those alive in period 1, and so on. mass [L] float64:
    the period plus the cumulative probability of the atoms up to this one, so one sorted search serves all periods.
    """

    item: np.ndarray
    mass: np.ndarray

    def draw(self, period: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """[n] item ids: one draw from each period's distribution, by inversion."""
        return self.item[np.searchsorted(self.mass, period + uniform, side="right")]


def label_tables(world: World) -> Labels:
    """The label tables of a world, noise e marginalised."""
    logits = label_logits(world)
    patterns = 2 ** len(world.tasks)
    chance = np.zeros((*logits.shape[1:], patterns))
    for noise in (-world.noise, world.noise):
        rate = sigmoid(logits + noise)
        product = np.full((*rate.shape[1:], patterns), 0.5)
        for pattern in range(patterns):
            for task in range(len(world.tasks)):
                product[..., pattern] *= rate[task] if pattern >> task & 1 else 1.0 - rate[task]
        chance += product
    has_label = np.arange(patterns)[:, None] >> np.arange(len(world.tasks)) & 1
    rates = [total(chance[..., has_label[:, t] == 1], axis=-1) for t in range(len(world.tasks))]
    domain = np.repeat(np.arange(world.clusters) % world.domains, world.qualities)
    return Labels(chance, np.stack(rates, axis=-1), _region_table(world), domain)


def label_logits(world: World) -> np.ndarray:
    """[A, C Q, H] logits of P(y_t = 1 | kind, state, e = 0)."""
    stream = Stream(world.seed, _LABEL_STREAM)
    affinity_atc = world.affinity * _centred_effect(stream, world, world.types)
    interest_asc = world.interest * _centred_effect(stream, world, world.states)
    cross_tsc = world.cross * _parity(stream, world)
    base_a = np.array(world.base).reshape(-1, 1, 1, 1, 1)
    logits_atsc = affinity_atc[:, :, None, :] + interest_asc[:, None, :, :] + cross_tsc
    logits = base_a + np.moveaxis(logits_atsc, -1, 1)[:, :, None] + _quality_levels(world).reshape(-1, 1, 1)
    return logits.reshape(len(world.tasks), world.clusters * world.qualities, world.types * world.states)


def _centred_effect(stream: Stream, world: World, levels: int) -> np.ndarray:
    """[A, levels, C] of variance about 1, sharing _COMMON of it between tasks, with mean zero over levels."""
    common = stream.normal(1, levels, world.clusters)
    own = stream.normal(len(world.tasks), levels, world.clusters)
    effect = np.sqrt(_COMMON) * common + np.sqrt(1 - _COMMON) * own
    return effect - total(effect, axis=1)[:, None] / levels


def _parity(stream: Stream, world: World) -> np.ndarray:
    """[Z, S, C] of +-1: Walsh functions of type times those of state, another pair for each cluster while they last."""
    pairs = (world.types - 1) * (world.states - 1)
    shuffled = np.argsort(stream.uniform(pairs), kind="stable")
    pair = shuffled[np.arange(world.clusters) % pairs]
    type_mask, state_mask = pair // (world.states - 1) + 1, pair % (world.states - 1) + 1
    return _walsh(world.types, type_mask)[:, None, :] * _walsh(world.states, state_mask)[None, :, :]


def _walsh(levels: int, mask: np.ndarray) -> np.ndarray:
    """[levels, C]: -1 to the number of bits that a level shares with the mask; balanced where the mask is not 0."""
    shared = np.bitwise_count(np.arange(levels)[:, None] & mask)
    return 1.0 - 2.0 * (shared % 2)


def _quality_levels(world: World) -> np.ndarray:
    """[Q] equally spaced logits of standard deviation ``world.quality``, about zero."""
    level = np.arange(world.qualities) - (world.qualities - 1) / 2
    spread = np.sqrt((world.qualities**2 - 1) / 12) if world.qualities > 1 else 1.0
    return world.quality * level / spread


def _region_table(world: World) -> np.ndarray:
    """[R, Z] P(region | type)."""
    match = np.arange(world.types) % world.regions == np.arange(world.regions)[:, None]
    return world.region_signal * match + (1 - world.region_signal) / world.regions


def item_tables(world: World) -> Items:
    """Clusters and qualities (uniform), and the category: shared by two clusters, or noise."""
    stream = Stream(world.seed, _ITEM_STREAM)
    count = world.items
    cluster, quality = stream.below(world.clusters, count), stream.below(world.qualities, count)
    categories = max(1, world.clusters // 2)
    noisy = stream.uniform(count) < world.category_noise
    category = 1 + np.where(noisy, stream.below(categories, count), cluster % categories)
    padding = np.zeros(1, np.int64)
    kind = np.concatenate([padding, cluster * world.qualities + quality]).astype(np.int32)
    return Items(kind, np.concatenate([padding, category]).astype(np.int32), categories)


def popularity_periods(world: World) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``item`` and ``mass`` of :class:`Popularity`, one period after the other: a large world's are better not held.

    Cohorts of atoms with stick-breaking weights are born period by period, each living a geometric time. An atom is an
    item with a weight: in the first cohort each has an item of its own; in later ones some have items never shown
    before, the others uniformly one of the items born until then (whose weights add up).
    """
    stream = Stream(world.seed, _POPULARITY_STREAM)
    cohorts = [world.first_items] + [world.new_atoms] * (world.periods - 1)
    birth = np.repeat(np.arange(world.periods), cohorts)
    item = _atom_items(stream, world, birth)
    weight = np.concatenate([_cohort_weights(stream, world, size) for size in cohorts])
    if world.turnover > 0:
        life = log(stream.uniform(len(birth))) / log(np.array([1 - world.turnover]))
        death = birth + 1 + np.minimum(life, world.periods).astype(np.int64)
    else:
        death = np.full(len(birth), world.periods)
    death[0] = world.periods  # so that no period is without an item
    for period in range(world.periods):
        alive = np.flatnonzero((birth <= period) & (period < death))
        mass = np.cumsum(weight[alive])
        mass /= mass[-1]
        mass[-1] = 1.0  # exactly, so that no draw falls beyond the period's last atom
        yield item[alive].astype(np.int32), period + mass


def _atom_items(stream: Stream, world: World, birth: np.ndarray) -> np.ndarray:
    """[atoms] item ids, new ids in order of birth."""
    later = max(1, world.periods - 1)
    born_by = world.first_items + world.new_items * np.arange(world.periods) // later  # items born up to each period
    known = np.where(birth == 0, 0, born_by[birth - 1])
    place = np.arange(len(birth)) - np.searchsorted(birth, birth)
    new_id = 1 + known + place
    returning = 1 + stream.below(known, len(birth))
    return np.where(new_id <= born_by[birth], new_id, returning)


def _cohort_weights(stream: Stream, world: World, size: int) -> np.ndarray:
    """[size] weights of a Gamma process: a Dirichlet process's sticks times a Gamma mass, in random order.

    The stick left after k breaks of Beta(1, a) is exp(sum of k log-uniforms / a); the mass is Gamma(a), a rounded to an
    integer so that a sum of exponentials gives it exactly. Cohorts share the concentration in proportion to their size.
    """
    if size == 0:
        return np.zeros(0)
    shape = max(1, round(world.concentration * size / world.first_items))
    left = np.concatenate([np.ones(1), exp(np.cumsum(log(stream.uniform(size))) / shape)])
    sticks = left[:-1] - left[1:]
    mass = -np.cumsum(log(stream.uniform(shape)))[-1]
    return mass * sticks[np.argsort(stream.uniform(size), kind="stable")]
