import dataclasses
import hashlib
import json

import numpy as np
import pytest

from genrec_jax.data.sequences import Sequences, load
from genrec_jax.data.synthetic import PRESETS, World, floors, generate, oracle_probabilities, preset, read_world
from genrec_jax.data.synthetic.exact import Stream, exp, log, sigmoid
from genrec_jax.data.synthetic.tables import Popularity, item_tables, label_logits, label_tables, popularity_periods
from genrec_jax.data.synthetic.world import SESSION_GAP
from genrec_jax.errors import UserError

COLUMNS = ("users/region", "truth/type", "truth/state", "events/item", "events/time", "events/labels", "events/request")
SMALL = preset("tiny", users=64, requests=6)
THREE_BLOCKS = preset("tiny", users=2500, requests=3)


def columns(sequences: Sequences) -> dict[str, np.ndarray]:
    return {name: np.load(sequences.path / f"{name}.npy") for name in COLUMNS}


def test_exact_functions_are_accurate():
    x = np.concatenate([np.linspace(-30, 30, 4001), np.array([0.0, 1e-9, -700.0, 700.0])])
    np.testing.assert_allclose(exp(x), np.exp(x), rtol=2e-15)
    positive = np.concatenate([np.geomspace(1e-12, 1e6, 4001), np.array([1.0, 2.0, 0.5])])
    np.testing.assert_allclose(log(positive), np.log(positive), rtol=2e-15, atol=1e-16)
    np.testing.assert_allclose(sigmoid(x), 1 / (1 + np.exp(-x)), rtol=4e-15)


def test_streams_differ_by_seed_and_index_and_fill_the_unit_interval():
    draws = [Stream(seed, index).uniform(20_000) for seed, index in ((0, 0), (0, 1), (1, 0))]
    assert len(np.unique(np.concatenate(draws))) == 60_000
    for draw in draws:
        assert 0 < draw.min() < 1e-3
        assert 1 - 1e-3 < draw.max() < 1
        assert abs(draw.mean() - 0.5) < 0.01
    # Adding a period must not round, or a draw could fall into the next one.
    assert ((2047 + draws[0]) - 2047 == draws[0]).all()
    assert set(Stream(3, 0).below(4, 100).tolist()) == {0, 1, 2, 3}


def test_columns_follow_the_contract(tmp_path):
    world = preset("tiny", users=200)
    s = generate(world, tmp_path / "w", floor_requests=0)
    assert s.users == 200
    assert (s.item.dtype, s.time.dtype, s.labels.dtype, s.request.dtype) == (np.int32, np.int32, np.uint8, np.int32)
    assert 1 <= s.item.min() <= s.item.max() <= world.items < s.schema.items
    assert set(np.unique(s.labels)) == {0, 1}
    assert 0 <= s.time.min() <= s.time.max() < world.days * 86400
    for feature in s.schema.features:
        table = s.features[feature.name]
        assert table.min() >= (feature.level == "user")
        assert table.max() < feature.vocab
    same_user = np.diff(np.searchsorted(s.offsets, np.arange(s.events), side="right")) == 0
    same_request = np.diff(s.request) == 0
    gap = np.diff(s.time)
    assert (gap[same_user] >= 0).all()
    assert (gap[same_user & same_request] == 0).all()
    between = gap[same_user & ~same_request]
    assert ((between < 600) | (between >= SESSION_GAP)).all()
    assert abs((between >= SESSION_GAP).mean() - world.long_gap) < 0.02
    assert (np.diff(s.offsets) % world.candidates == 0).all()
    assert abs(np.diff(s.offsets).mean() / (world.requests * world.candidates) - 1) < 0.2


def test_same_bits_again_and_a_golden_checksum(tmp_path):
    first, second = (columns(generate(SMALL, tmp_path / n, floor_requests=0)) for n in ("a", "b"))
    other = columns(generate(dataclasses.replace(SMALL, seed=1), tmp_path / "c", floor_requests=0))
    digest = hashlib.sha256()
    for name in COLUMNS:
        np.testing.assert_array_equal(first[name], second[name])
        digest.update(first[name].astype("<i8").tobytes())
    assert first["events/item"].shape != other["events/item"].shape
    assert digest.hexdigest()[:16] == "4fca64db7b4894d1"


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_put_end_to_end_are_the_whole(tmp_path, workers):
    whole = generate(THREE_BLOCKS, tmp_path / "whole", floor_requests=0)
    parts = [
        generate(THREE_BLOCKS, tmp_path / str(i), workers=workers, shard=i, shards=2, floor_requests=0)
        for i in range(2)
    ]
    assert sum(part.users for part in parts) == whole.users
    for name, values in columns(whole).items():
        np.testing.assert_array_equal(np.concatenate([columns(part)[name] for part in parts]), values)
    np.testing.assert_array_equal(parts[0].features["category"], whole.features["category"])


def test_cross_effect_has_zero_marginals_and_is_independent_between_clusters():
    only = preset("tiny", affinity=0.0, interest=0.0, quality=0.0, base=(0.0, 0.0, 0.0))
    logits = label_logits(only)[0].reshape(only.clusters, only.qualities, only.types, only.states)[:, 0]
    np.testing.assert_array_equal(np.abs(logits), only.cross)
    np.testing.assert_allclose(logits.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(logits.sum(axis=2), 0, atol=1e-12)
    products = np.einsum("czs,dzs->cd", logits, logits)
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-9)


def test_label_tables_are_distributions_of_the_stated_strength():
    world = preset("tiny", clusters=64)
    tables = label_tables(world)
    np.testing.assert_allclose(tables.pattern.sum(axis=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(tables.region.sum(axis=0), 1, rtol=1e-12)
    logits = label_logits(world).reshape(3, world.clusters, world.qualities, world.types, world.states)
    assert abs(logits.mean(axis=(1, 3, 4)).std(axis=1).mean() - world.quality) < 1e-9
    assert abs(logits.mean(axis=(2, 4)).std(axis=2).mean() - world.affinity) < 0.06
    assert abs(logits.mean(axis=(2, 3)).std(axis=2).mean() - world.interest * np.sqrt(3 / 4)) < 0.12


def test_labels_correlate_beyond_the_hidden_state_only_through_noise(tmp_path):
    found = []
    for noise in (0.0, 1.0):
        s = generate(preset("tiny", noise=noise), tmp_path / str(noise), floor_requests=0)
        residual = s.labels - oracle_probabilities(s, np.arange(s.events))
        product = residual[:, 0] * residual[:, 1]
        found.append(product.mean() / product.std() * np.sqrt(len(product)))
    assert abs(found[0]) < 4
    assert found[1] > 20


def test_label_frequencies_given_the_hidden_state(tmp_path):
    s = generate(preset("tiny"), tmp_path / "w", floor_requests=0)
    p = oracle_probabilities(s, np.arange(s.events))
    z = (s.labels - p).sum(axis=0) / np.sqrt((p * (1 - p)).sum(axis=0))
    assert np.abs(z).max() < 4
    assert ((s.labels.mean(axis=0) > 0.2) & (s.labels.mean(axis=0) < 0.5)).all()


def distributions(world: World) -> np.ndarray:
    """[periods, items + 1] probabilities of being shown."""
    shown = popularity(world)
    period = np.ceil(shown.mass).astype(int) - 1
    start = np.flatnonzero(np.diff(period, prepend=-1))
    probability = np.diff(shown.mass, prepend=0.0)
    probability[start] = shown.mass[start] - period[start]
    result = np.zeros((world.periods, world.items + 1))
    np.add.at(result, (period, shown.item), probability)
    return result


def popularity(world: World) -> Popularity:
    items, masses = zip(*popularity_periods(world))
    return Popularity(np.concatenate(items), np.concatenate(masses))


def test_popularity_drifts_and_new_items_enter():
    moving = distributions(preset("tiny", turnover=0.1, novelty=0.3))
    np.testing.assert_allclose(moving.sum(axis=1), 1)
    distance = np.abs(moving - moving[0]).sum(axis=1) / 2
    assert 0 < distance[1] < 0.3
    assert distance[-1] > 0.7
    first_shown = (moving > 0).argmax(axis=0)[1:][moving[:, 1:].any(axis=0)]
    assert (np.diff(np.maximum.accumulate(first_shown)) >= 0).all()
    assert moving[0, -20:].sum() == 0
    assert moving[-1, -20:].sum() > 0
    # Skewed: a tenth of the items has far more than a tenth of the traffic.
    assert np.sort(moving[0])[::-1][:50].sum() > 0.3
    still = distributions(preset("tiny", turnover=0.0))
    np.testing.assert_allclose(still, np.repeat(still[:1], 30, axis=0), atol=1e-12)


def test_items_are_drawn_by_popularity():
    world = preset("tiny")
    expected = distributions(world)[7]
    drawn = popularity(world).draw(np.full(100_000, 7), Stream(5, 5).uniform(100_000))
    counts = np.bincount(drawn, minlength=world.items + 1)
    often = expected > 1e-4
    chi2 = ((counts - 1e5 * expected)[often] ** 2 / (1e5 * expected[often])).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())
    assert counts[expected == 0].sum() == 0


def test_category_tells_the_cluster_but_for_noise():
    world = preset("tiny", items=4000)
    items = item_tables(world)
    cluster = items.kind[1:] // world.qualities
    agree = (items.category[1:] == 1 + cluster % items.categories).mean()
    assert abs(agree - (1 - world.category_noise + world.category_noise / items.categories)) < 0.03
    assert items.kind[0] == items.category[0] == 0


def test_truth_file_holds_the_world_and_ordered_floors(tmp_path):
    world = preset("tiny", users=256)
    s = generate(world, tmp_path / "w")
    assert read_world(s.path) == world
    record = json.loads((s.path / "truth.json").read_text())
    assert record == {**record, **json.loads(json.dumps(floors(load(s.path)).to_json()))}
    assert 0 <= record["unseen_items"] < 0.1
    means = [floor["mean"]["bayes_ne"] for floor in record["floors"]]
    assert (np.diff(means) < 1e-3).all()  # more history helps in expectation; a sample may differ a little
    assert record["floors"][0]["mean"]["oracle_ne"] < means[-1] < means[0] < 1


def test_the_documented_floors_of_the_tiny_preset(tmp_path):
    found = floors(generate(preset("tiny"), tmp_path / "w", floor_requests=0)).truths
    table = [found[0].mean["item_ne"], *(f.mean["bayes_ne"] for f in found), found[0].mean["oracle_ne"]]
    np.testing.assert_allclose(table, [0.952, 0.952, 0.908, 0.853, 0.835, 0.835, 0.716], atol=6e-4)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"users": 0}, "users"),
        ({"types": 6}, "types"),
        ({"states": 1}, "states"),
        ({"persistence": 1.5}, "persistence"),
        ({"turnover": 1.0}, "turnover"),
        ({"items": 5}, "items"),
        ({"domains": 17}, "domains"),
        ({"days": 1}, "days"),
        ({"base": (0.0,)}, "base"),
        ({"base": (0.0, 0.0, float("nan"))}, "base"),
        ({"tasks": ("a", "a", "b")}, "tasks"),
        ({"cross": -1.0}, "cross"),
        ({"concentration": 0.0}, "concentration"),
        ({"seed": -1}, "seed"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_parameters_are_refused_by_name(changes, name):
    with pytest.raises(UserError, match=name):
        preset("tiny", **changes)


def test_unknown_preset_and_impossible_shard_are_refused(tmp_path):
    with pytest.raises(UserError, match="tiny"):
        preset("huge")
    with pytest.raises(UserError, match="1 blocks"):
        generate(SMALL, tmp_path / "w", shards=2)
    with pytest.raises(UserError, match="0 workers"):
        generate(SMALL, tmp_path / "w", workers=0)
    assert not list(tmp_path.iterdir())


def test_worlds_round_trip_through_json():
    for world in PRESETS.values():
        assert World.from_json(json.loads(json.dumps(world.to_json()))) == world
