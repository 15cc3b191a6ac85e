"""The cache never holds more than its budget, and forgets the least recently used first."""

import numpy as np
import pytest

from genrec_jax.serve import UserCache
from genrec_jax.serve.cache import Entry
from genrec_jax.serve.events import no_events
from tests.models.gr_helpers import SCHEMA

KEYS = 10_000  # bytes of keys and values in `entry`


def entry(size=KEYS):
    layers = np.zeros(size, np.int8) if size else None
    return Entry(no_events(SCHEMA), {}, tokens=1, capacity=1, layers=layers)


ONE, BARE = entry().nbytes, entry(0).nbytes


def warm(cache, users):
    return [user for user in users if (found := cache.get(user)) is not None and found.layers is not None]


def test_the_least_recently_used_loses_its_keys_then_its_events():
    cache = UserCache(2 * ONE + 2 * BARE)
    assert 2 * BARE > cache.budget / 8 > BARE  # room for one user's events beside
    for user in "abc":
        cache.put(user, entry())
    assert warm(cache, "abc") == ["b", "c"]
    assert "a" in cache
    cache.put("b", cache.pop("b"))
    cache.put("d", entry())
    assert warm(cache, "abcd") == ["b", "d"]
    assert [user for user in "abcd" if user in cache] == ["b", "c", "d"]


def test_events_alone_do_not_crowd_out_keys():
    cache, budget_of_events = UserCache(3 * ONE), 3 * ONE // 8
    for user in range(1000):
        cache.put(user, entry())
    assert warm(cache, range(1000)) == [998, 999]
    assert len(cache) == 2 + budget_of_events // BARE


def test_what_does_not_fit_is_kept_in_part_or_not_at_all():
    cache = UserCache(ONE - 1)
    cache.put("a", entry())
    assert cache.get("a").layers is None
    assert cache.nbytes == BARE
    small = UserCache(BARE - 1)
    small.put("a", entry())
    assert len(small) == small.nbytes == 0


def test_a_new_entry_takes_the_place_of_the_old():
    cache = UserCache(10 * ONE)
    cache.put("a", entry())
    cache.put("a", entry(0))
    assert (len(cache), cache.nbytes) == (1, BARE)
    assert cache.pop("a").layers is None
    assert cache.pop("a") is None
    assert cache.nbytes == 0


@pytest.mark.parametrize("seed", range(5))
def test_invariants_under_random_use(seed):
    """Bytes are those of the entries, within the budget; what was just put, or is used since, outlives the others."""
    draw = np.random.default_rng(seed)
    budget = int(draw.integers(0, 12 * ONE))
    cache = UserCache(budget)
    for _ in range(500):
        user = int(draw.integers(0, 30))
        if draw.random() < 0.3:
            cache.pop(user)
        else:
            new = entry(int(draw.choice([0, KEYS // 8, KEYS, 3 * KEYS])))
            cache.put(user, new)
            assert (user in cache) == (budget >= BARE)
            if new.nbytes <= budget:
                assert cache.get(user) is new
        held = [cache.get(u) for u in range(30) if u in cache]
        assert cache.nbytes == sum(found.nbytes for found in held) <= budget
        assert len(cache) == len(held)


def test_bytes_are_the_arrays_bytes():
    grown = Entry(no_events(SCHEMA), {"age": np.zeros((), np.int32)}, layers=(np.zeros((1, 8, 2, 4), np.float32),) * 2)
    assert grown.nbytes - BARE == 4 + 2 * 256
