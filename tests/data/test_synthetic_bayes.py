import itertools

import numpy as np
import pytest

from genrec_jax.data.sequences import Sequences, save
from genrec_jax.data.synthetic import (
    World,
    bayes_probabilities,
    floors,
    generate,
    oracle_probabilities,
    preset,
    read_world,
    truth,
)
from genrec_jax.data.synthetic import bayes as bayes_module
from genrec_jax.data.synthetic.tables import item_tables, label_logits
from genrec_jax.data.synthetic.world import SESSION_GAP
from genrec_jax.errors import UserError

# Two domains of two types and two interests: every path of four requests can be listed.
LISTABLE = World(
    users=40,
    requests=2,
    candidates=3,
    items=12,
    concentration=10.0,
    turnover=0.0,
    periods=2,
    domains=2,
    types=2,
    states=2,
    clusters=4,
    qualities=2,
    tasks=("click", "like"),
    base=(-0.3, 0.4),
    affinity=1.0,
    noise=0.8,
    persistence=0.8,
    long_gap=0.4,
    regions=2,
    region_signal=0.5,
)


def listed(s: Sequences, user: int, opened: int, stop: int, event: int) -> np.ndarray:
    """[A] P(labels of ``event`` = 1 | labels of events opened..stop-1, region), by listing every hidden path of the
    user in all domains at once and both values of every event's noise."""
    world = read_world(s.path)
    logits = label_logits(world).reshape(2, world.clusters, world.qualities, world.types, world.states)
    kind = item_tables(world).kind[s.item]
    shown = [*range(opened, stop), event]
    requests = sorted(set(s.request[shown].tolist()))
    when = {int(s.request[e]): int(s.time[e]) for e in shown}

    def rates(e, types, interests):
        """[2 noises, A]"""
        cluster, quality = divmod(int(kind[e]), world.qualities)
        g = cluster % world.domains
        x = logits[:, cluster, quality, types[g], interests[g]]
        return 1 / (1 + np.exp(-(x + world.noise * np.array([[-1.0], [1.0]]))))

    total, positive = 0.0, np.zeros(2)
    for types in itertools.product(range(2), repeat=2):
        match = types[0] % world.regions == s.features["region"][user] - 1
        prior = world.region_signal * match + (1 - world.region_signal) / world.regions
        for path in itertools.product(itertools.product(range(2), repeat=2), repeat=len(requests)):
            weight = prior
            for before, after in itertools.pairwise(range(len(requests))):
                long = when[requests[after]] - when[requests[before]] >= SESSION_GAP
                keep = world.long_persistence if long else world.persistence
                for g in range(2):
                    weight *= keep * (path[before][g] == path[after][g]) + (1 - keep) / 2
            for e in range(opened, stop):
                p = rates(e, types, path[requests.index(s.request[e])])
                weight *= np.where(s.labels[e], p, 1 - p).prod(axis=1).mean()
            total += weight
            positive += weight * rates(event, types, path[-1]).mean(axis=0)
    return positive / total


@pytest.fixture(scope="module")
def listable(tmp_path_factory) -> Sequences:
    return generate(LISTABLE, tmp_path_factory.mktemp("listable") / "w", floor_requests=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Sequences:
    return generate(preset("tiny"), tmp_path_factory.mktemp("tiny") / "w", floor_requests=0)


def owners(s: Sequences, event: np.ndarray) -> np.ndarray:
    return np.searchsorted(s.offsets, event, side="right") - 1


def request_starts(s: Sequences) -> np.ndarray:
    """[E] first event of each event's request."""
    user = owners(s, np.arange(s.events))
    new = (np.diff(s.request, prepend=-1) != 0) | (np.diff(user, prepend=-1) != 0)
    return np.maximum.accumulate(np.where(new, np.arange(s.events), 0))


# 4 and 5 cut a request of three in two.
@pytest.mark.parametrize("history", [None, 0, 1, 4, 5, 6])
def test_posterior_equals_the_sum_over_every_hidden_path(listable, history):
    event = np.flatnonzero((listable.request <= 3) & (np.arange(listable.events) % 3 == 1))
    start = request_starts(listable)[event]
    user = owners(listable, event)
    chosen = np.unique(np.concatenate([np.flatnonzero(listable.request[event] == r)[:5] for r in range(4)]))
    p = bayes_probabilities(listable, event, start, history)
    gaps = set()
    for m in chosen:
        first = listable.offsets[user[m]]
        opened = first if history is None else max(first, start[m] - history)
        expected = listed(listable, user[m], opened, start[m], event[m])
        np.testing.assert_allclose(p[m], expected, rtol=0, atol=1e-10)
        if start[m] > first:
            gaps.add(bool(listable.time[start[m]] - listable.time[start[m] - 1] >= SESSION_GAP))
    assert gaps == {False, True}


@pytest.mark.parametrize("history", [None, 2])
def test_history_may_end_inside_the_request(listable, history):
    event = np.flatnonzero((listable.request == 1) & (np.arange(listable.events) % 3 == 2))[:6]
    user = owners(listable, event)
    p = bayes_probabilities(listable, event, event, history)
    for m in range(len(event)):
        opened = listable.offsets[user[m]] if history is None else event[m] - history
        np.testing.assert_allclose(p[m], listed(listable, user[m], opened, event[m], event[m]), rtol=0, atol=1e-10)


def test_order_chunks_and_chaining_do_not_change_the_answer(tiny, monkeypatch):
    rng = np.random.default_rng(0)
    event = rng.permutation(tiny.events)[:3000]
    start = request_starts(tiny)[event]
    longest = int(np.diff(tiny.offsets).max())
    chained = bayes_probabilities(tiny, event, start)
    # A window that holds everything must agree with beliefs built one on the other.
    np.testing.assert_allclose(bayes_probabilities(tiny, event, start, longest), chained, rtol=1e-9)
    alone = np.concatenate([bayes_probabilities(tiny, event[[m]], start[[m]]) for m in range(20)])
    np.testing.assert_allclose(alone, chained[:20], rtol=1e-9)
    monkeypatch.setattr(bayes_module, "_CHUNK", 100)
    for history, expected in ((None, chained), (30, bayes_probabilities(tiny, event, start, 30))):
        np.testing.assert_allclose(bayes_probabilities(tiny, event, start, history), expected, rtol=1e-9)


def test_full_history_predictions_are_calibrated(tiny):
    # One event per request, each predicted from all before it: residuals are martingale differences, so in every bin
    # of p* their sum has the variance sum p (1 - p), and the sum of squares is chi-square of one degree per bin.
    event = np.arange(0, tiny.events, 4)
    p = bayes_probabilities(tiny, event, event)
    y = tiny.labels[event]
    for task in range(3):
        group = np.argsort(np.argsort(p[:, task])) * 10 // len(event)
        residual = np.bincount(group, y[:, task] - p[:, task])
        variance = np.bincount(group, p[:, task] * (1 - p[:, task]))
        assert (residual**2 / variance).sum() < 29.6  # 0.999 quantile, 10 degrees of freedom


def test_floors_fall_with_history_to_the_oracle(tiny):
    start = request_starts(tiny)
    event = np.flatnonzero(tiny.request >= 40)
    found = [truth(tiny, event, start[event], history) for history in (0, 4, 16, 64, None)]
    table = np.array([f.bayes_ne for f in found])
    assert (np.diff(table[:-1], axis=0) < -0.005).all()
    assert (np.diff(table[-2:], axis=0) < 0).all()
    assert (np.array(found[-1].oracle_ne) < table[-1] - 0.05).all()
    assert (table[0] <= np.array(found[0].item_ne) + 1e-3).all()
    assert max(found[0].item_ne) < 1
    for f in found:
        np.testing.assert_allclose(f.bayes_realised, f.bayes_ne, atol=0.02)
        np.testing.assert_allclose(f.oracle_realised, f.oracle_ne, atol=0.02)
        assert f.mean["bayes_ne"] == pytest.approx(np.mean(f.bayes_ne))


def test_truth_states_ne_of_the_same_rows(tiny):
    event = np.arange(1000, 1400)
    start = request_starts(tiny)[event]
    found = truth(tiny.path, event, start, 8)
    y, p = tiny.labels[event].astype(float), bayes_probabilities(tiny, event, start, 8)
    base = y.mean(axis=0)
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    np.testing.assert_allclose(found.base_rate, base)
    np.testing.assert_allclose(
        found.bayes_realised, -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(0) / entropy, rtol=1e-12
    )
    np.testing.assert_allclose(found.bayes_ne, -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(0) / entropy, rtol=1e-12)
    assert (found.impressions, found.history) == (400, 8)


def gain(world: World, path, history: int | None) -> float:
    """How far a history lowers the NE below that of no history."""
    s = generate(world, path, floor_requests=0)
    event = np.flatnonzero(s.request >= 20)
    start = request_starts(s)[event]
    return truth(s, event, start, 0).mean["bayes_ne"] - truth(s, event, start, history).mean["bayes_ne"]


def test_knobs_set_the_value_of_history(tmp_path):
    world = preset("tiny", users=256)
    recent = gain(world, tmp_path / "a", 8)
    fickle = preset("tiny", users=256, persistence=0.0, long_persistence=0.0)
    assert gain(fickle, tmp_path / "b", 8) < 0.4 * recent
    # More domains: the same events tell less of each, so it takes more of them to know as much.
    wide = preset("tiny", users=256, domains=16)
    assert gain(wide, tmp_path / "c", 64) < 0.8 * gain(world, tmp_path / "a", 64)
    blank = preset("tiny", users=256, affinity=0.0, interest=0.0, cross=0.0)
    assert abs(gain(blank, tmp_path / "d", None)) < 1e-9


def test_cross_effect_takes_both_earlier_sessions_and_the_present_one(tmp_path):
    world = preset(
        "tiny",
        users=128,
        candidates=1,
        affinity=0.0,
        interest=0.0,
        cross=2.0,
        region_signal=0.0,
        domains=1,
        long_persistence=0.0,
    )
    s = generate(world, tmp_path / "w", floor_requests=0)
    cluster = item_tables(world).kind[s.item] // world.qualities
    opens = (s.request > 0) & (np.diff(s.time, prepend=0) >= SESSION_GAP)

    def told(event: np.ndarray, history: int | None) -> np.ndarray:
        """[M] how far a history moves the prediction."""
        moved = bayes_probabilities(s, event, event, history) - bayes_probabilities(s, event, event, 0)
        return np.abs(moved).max(axis=1)

    # At a session's first event: earlier sessions alone tell nothing, however many they are.
    assert told(np.flatnonzero(opens), None).max() < 1e-12
    # At its second, the first alone tells nothing (of another cluster); with the earlier sessions, it does.
    second = np.flatnonzero(opens[:-1] & ~opens[1:] & (np.diff(s.request) == 1)) + 1
    same = cluster[second] == cluster[second - 1]
    assert told(second[~same], 1).max() < 1e-12
    assert told(second[~same], None).max() > 0.1
    assert told(second[same], 1).min() > 0.01


def test_long_gaps_weaken_the_past(tiny):
    start = request_starts(tiny)
    event = np.flatnonzero((start == np.arange(tiny.events)) & (tiny.request >= 5))
    moved = np.abs(bayes_probabilities(tiny, event, event, 4) - bayes_probabilities(tiny, event, event, 0)).mean(axis=1)
    long = tiny.time[event] - tiny.time[event - 1] >= SESSION_GAP
    assert moved[long].mean() < 0.7 * moved[~long].mean()


def test_floors_use_whole_requests_of_the_test_part(tiny):
    found = floors(tiny, requests=50)
    assert {t.impressions for t in found.truths} == {200}
    assert [t.history for t in found.truths] == [0, 8, 64, 256, None]
    assert 0 <= found.unseen_items <= 1


def test_mistakes_are_refused(tiny, tmp_path):
    start = request_starts(tiny)
    event = np.arange(400, 800)
    with pytest.raises(UserError, match="not at its request"):
        truth(tiny, event, start[event - 4])
    with pytest.raises(UserError, match="not at its request"):
        bayes_probabilities(tiny, np.array([4]), np.array([5]))
    with pytest.raises(UserError, match="outside"):
        bayes_probabilities(tiny, np.array([tiny.events]), np.array([0]))
    with pytest.raises(UserError, match="one length"):
        bayes_probabilities(tiny, event, start[:3])
    with pytest.raises(UserError, match="history of -1"):
        bayes_probabilities(tiny, event, start[event], -1)
    with pytest.raises(UserError, match="constant"):
        truth(tiny, event[:1], start[event[:1]])
    with pytest.raises(UserError, match="constant on the 0"):
        truth(tiny, event[:0], event[:0])
    columns = {"item": tiny.item, "time": tiny.time, "labels": tiny.labels, "features": dict(tiny.features)}
    plain = save(tmp_path / "p", name="p", schema=tiny.schema, origin=0, offsets=tiny.offsets, **columns)
    with pytest.raises(UserError, match="no known answer"):
        oracle_probabilities(plain, event)
    (plain.path / "truth.json").write_text((tiny.path / "truth.json").read_text())
    with pytest.raises(UserError, match=r"state\.npy cannot be read"):
        oracle_probabilities(plain, event)
    assert oracle_probabilities(tiny, event).shape == (400, 3)
