"""The noise of an evaluation: by hand, against redrawn users, and paired between two models."""

import numpy as np
import pytest

from genrec_jax import metrics
from genrec_jax.noise import UserSums, clustered_error, difference, user_draws


def influence(logits, labels, users):
    """Of one task."""
    return UserSums.of(("like",), np.asarray(logits)[:, None], labels[:, None], users).influence()[:, 0]


def test_error_of_ne_by_hand():
    """Two users of 2 and 1 rows at logit 0: every loss is log 2, so NE deviates through the base rate alone.

    p = 1/3, H = log 3 - 2/3 log 2, H' = log 2, NE = log 2 / H. Of the positives, user 5 has 0 of an expected 2/3 and
    user 9 has 1 of 1/3: influence -+ NE / H * log 2 * 2/3 / 3, and with two users the error is twice that.
    """
    users, labels = np.array([5, 9, 5]), np.array([0, 1, 0])
    entropy = np.log(3) - 2 / 3 * np.log(2)
    expected = np.log(2) ** 2 / entropy**2 * 2 / 9
    found = influence(np.zeros(3), labels, users)
    assert found == pytest.approx([expected, -expected], rel=1e-12)
    assert clustered_error(found) == pytest.approx(2 * expected, rel=1e-12)
    # Without the user's losses being equal: each of two users one row, p = 1/2, where H' = 0 and H = log 2.
    losses = np.log([4.0, 2.0])  # of logits -log 3 with a positive and 0 with a negative
    error = clustered_error(influence(-np.log([3.0, 1.0]), np.array([1, 0]), np.array([1, 2])))
    assert error == pytest.approx((losses[0] - losses[1]) / 2 / np.log(2), rel=1e-12)


def test_error_of_ne_agrees_with_a_bootstrap_over_users():
    """Users of 1 to 30 rows, whose tastes move both tasks and are unknown to the model; it redraws whole users."""
    rng = np.random.default_rng(11)
    users = np.repeat(np.arange(400) * 3 + 1, rng.integers(1, 31, 400))
    taste = 2.0 * rng.normal(size=1300)[users, None]
    truth = taste * [1.0, 0.7] + rng.normal(size=(len(users), 2)) - [1.5, 0.3]
    labels = (rng.random(truth.shape) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
    logits = 0.8 * (truth - taste * [1.0, 0.7]) - 0.4
    order = rng.permutation(len(users))
    stream = metrics.RankingMetrics(("like", "long"))
    stream.add(logits[order], labels[order], np.ones(len(users), bool), users[order])
    result = stream.result()

    losses = np.log1p(np.exp(logits)) - logits * labels
    columns = np.concatenate([np.ones((len(users), 1)), losses, labels], axis=1)
    sums = np.stack([np.bincount(users, weights=column)[1::3] for column in columns.T], axis=1)  # [users, 5]
    drawn = rng.multinomial(400, np.full(400, 1 / 400), 4000) @ sums
    loss, rate = drawn[:, 1:3] / drawn[:, :1], drawn[:, 3:] / drawn[:, :1]
    ne = loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert [result["ne_error/like"], result["ne_error/long"]] == pytest.approx(ne.std(axis=0), rel=0.1)
    assert result["ne_error"] == pytest.approx(ne.mean(axis=1).std(), rel=0.1)
    # Neither rows drawn one by one nor independent tasks would do.
    by_rows = clustered_error(influence(logits[:, 0], labels[:, 0], np.arange(len(users))))
    assert result["ne_error/like"] > 1.2 * by_rows
    assert result["ne_error"] > 1.05 * np.hypot(result["ne_error/like"], result["ne_error/long"]) / 2


def test_error_of_ne_needs_two_users_and_a_defined_ne():
    one = metrics.RankingMetrics(("like",))
    one.add(np.zeros((2, 1)), np.array([[0], [1]]), np.ones(2, bool), np.array([3, 3]))
    assert "ne" in one.result()
    assert {"ne_error", "ne_error/like"}.isdisjoint(one.result())
    two = metrics.RankingMetrics(("like", "long"))
    two.add(np.zeros((2, 2)), np.array([[0, 1], [1, 1]]), np.ones(2, bool), np.array([3, 4]))
    result = two.result()
    assert "ne_error/long" not in result
    assert result["ne_error"] == result["ne_error/like"] == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(influence(np.zeros(2), np.ones(2), np.array([3, 4]))).all()


def simulated(models=2, users=500, seed=3):
    """Models of two tasks that share what they do not know of a user, and each err by themselves, on 1 to 30 rows."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users) * 2 + 5, rng.integers(1, 31, users))
    taste = 1.5 * rng.normal(size=3 * users)[user, None]
    truth = taste * [1.0, 0.6] + rng.normal(size=(len(user), 2)) - [1.2, 0.2]
    labels = (rng.random(truth.shape) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
    known = truth - taste * [1.0, 0.6]
    own = [known * scale + 0.3 * rng.normal(size=truth.shape) for scale in 0.9 - 0.3 * np.arange(models)]
    return [UserSums.of(("like", "long"), logits - 0.5, labels, user) for logits in own]


def test_sums_give_the_ne_of_the_rows_and_of_redrawn_rows():
    """Weights are counts: a user drawn twice is as if its rows were there twice."""
    users, labels = np.array([7, 3, 7, 5, 3]), np.array([[1, 0], [0, 0], [0, 0], [1, 0], [1, 0]])
    logits = np.linspace(-1.0, 1.4, 10).reshape(5, 2)
    sums = UserSums.of(("like", "long"), logits, labels, users)
    assert sums.users.tolist() == [3, 5, 7]
    assert sums.rows.tolist() == [2, 1, 2]
    assert sums.positives.tolist() == [[1, 0], [1, 0], [1, 0]]
    drawn = [0, 1, 2, 4, 1, 4]  # those of user 3 twice, of 5 not at all, of 7 once
    expected = metrics.normalised_entropy(logits[drawn, 0], labels[drawn, 0])
    found = sums.ne(np.array([[2, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]]))
    assert found[0, 0] == pytest.approx(expected, rel=1e-12)
    assert found[1, 0] == sums.ne()[0] == pytest.approx(metrics.normalised_entropy(logits[:, 0], labels[:, 0]))
    assert np.isnan(found[:, 1]).all()  # no positives, and so no NE
    assert np.isnan(found[2:]).all()  # of one positive alone, and of nobody
    assert sums.mean_ne() == sums.ne()[0]


def test_redrawn_users_agree_with_the_errors_to_first_order():
    """Single errors, and those of a paired difference, from a thousand bootstraps of users."""
    base, new = simulated()
    weights = np.concatenate(list(user_draws(len(base.users), 1000, seed=1)))
    assert weights.shape == (1000, 500)
    drawn = base.mean_ne(weights), new.mean_ne(weights)
    for one, values in zip((base, new), drawn, strict=True):
        assert values.std() == pytest.approx(clustered_error(one.mean_influence()), rel=0.07)
    apart = difference([base], [new], seed=1)
    assert apart.value == pytest.approx(float(new.mean_ne() - base.mean_ne()), rel=1e-12)
    assert apart.error == pytest.approx((drawn[1] - drawn[0]).std(), rel=0.07)
    assert (apart.low, apart.high) == pytest.approx(tuple(np.quantile(drawn[1] - drawn[0], [0.025, 0.975])), rel=1e-9)
    assert (apart.high - apart.low) / 2 == pytest.approx(1.96 * apart.error, rel=0.1)
    # What is hard of a user is hard for both models.
    assert apart.unpaired == pytest.approx(np.hypot(*(values.std() for values in drawn)), rel=0.07)
    assert apart.error < 0.6 * apart.unpaired


def test_the_error_of_a_difference_is_that_of_many_evaluations():
    """What the paired error is about: how differences vary when the users are others altogether."""
    values = [float(new.mean_ne() - base.mean_ne()) for base, new in (simulated(seed=s, users=300) for s in range(150))]
    errors = [difference(*[[one] for one in simulated(seed=s, users=300)], draws=2).error for s in range(0, 150, 30)]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_seeds_are_averaged_before_they_are_compared():
    one, two, other = simulated(models=3)
    apart = difference([one, two], [other])
    mean = (one.mean_influence() + two.mean_influence()) / 2
    assert apart.value == pytest.approx(float(other.mean_ne() - (one.mean_ne() + two.mean_ne()) / 2), rel=1e-12)
    assert apart.error == pytest.approx(clustered_error(other.mean_influence() - mean), rel=1e-12)
    same = difference([one, two], [two, one])
    assert (same.value, same.error, same.low, same.high) == pytest.approx((0, 0, 0, 0), abs=1e-12)
    assert same.unpaired > 0.001


def test_users_are_drawn_in_blocks_and_again_alike(monkeypatch):
    whole = np.concatenate(list(user_draws(6, 50, seed=4)))
    monkeypatch.setattr("genrec_jax.noise._WEIGHTS", 40)
    blocks = list(user_draws(6, 50, seed=4))
    assert [len(block) for block in blocks] == [6] * 8 + [2]
    assert np.array_equal(np.concatenate(blocks), whole)
    assert not np.array_equal(np.concatenate(list(user_draws(6, 50, seed=5))), whole)


@pytest.mark.parametrize("field", ["users", "rows", "positives"])
def test_other_impressions_are_not_compared(field):
    base, new = simulated()
    moved = {name: getattr(new, name) for name in ("tasks", "users", "rows", "losses", "positives")}
    moved[field] = moved[field] + 1
    with pytest.raises(ValueError, match="different impressions"):
        difference([base], [UserSums(**moved)])


def test_a_difference_without_a_ne_is_no_number():
    nobody = UserSums.of(("like",), np.zeros((2, 1)), np.ones((2, 1), int), np.array([3, 4]))
    apart = difference([nobody], [nobody])
    assert np.isnan([apart.value, apart.error, apart.unpaired, apart.low, apart.high]).all()


def test_pooled_sums_are_those_of_all_rows():
    rng = np.random.default_rng(5)
    users, labels, logits = rng.integers(0, 9, 60), rng.integers(0, 2, (60, 2)), rng.normal(size=(60, 2))
    parts = [
        UserSums.of(("like", "long"), logits[part], labels[part], users[part])
        for part in (slice(0, 7), slice(7, 40), slice(40, 60))
    ]
    found, expected = UserSums.pooled(parts), UserSums.of(("like", "long"), logits, labels, users)
    assert found.same_rows(expected)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    assert len(found.users) == 9
