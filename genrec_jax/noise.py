"""The noise that a finite draw of evaluation users leaves in NE, and in the difference of two NEs on the same users.

All that NE needs of a user are sums over the user's impressions. So a record of these sums, a few numbers per user, can
be evaluated on any redrawing of users without scoring an impression again.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

DRAWS = 1000
_WEIGHTS = 1 << 22  # that are held at a time


@dataclasses.dataclass(frozen=True)
class UserSums:
    """What each of U users, ascending, adds to the NE of A tasks.

    users [U] int64; rows [U] int64: impressions; losses [U, A] float64: nats; positives [U, A] int64.
    """

    tasks: tuple[str, ...]
    users: np.ndarray
    rows: np.ndarray
    losses: np.ndarray
    positives: np.ndarray

    @classmethod
    def of(cls, tasks: Sequence[str], logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> Self:
        """Of R impressions: logits and labels [R, A], users [R]."""
        found, user, rows = np.unique(users, return_inverse=True, return_counts=True)

        def summed(columns: np.ndarray) -> np.ndarray:
            sums = [np.bincount(user, weights=column, minlength=len(found)) for column in columns.T]
            return np.stack(sums, axis=1) if sums else np.empty((len(found), 0))

        losses, positives = summed(row_losses(logits, labels)), summed(np.asarray(labels, np.float64))
        return cls(tuple(tasks), found.astype(np.int64), rows.astype(np.int64), losses, positives.astype(np.int64))

    @classmethod
    def pooled(cls, parts: Sequence["UserSums"]) -> "UserSums":
        """Of the impressions of all parts, which have the same tasks, together; a user may be in several."""
        users = np.concatenate([one.users for one in parts])
        found, user = np.unique(users, return_inverse=True)

        def summed(name: str) -> np.ndarray:
            columns = np.concatenate([getattr(one, name) for one in parts])
            total = np.zeros((len(found), *columns.shape[1:]), columns.dtype)
            np.add.at(total, user, columns)
            return total

        return cls(parts[0].tasks, found, summed("rows"), summed("losses"), summed("positives"))

    def ne(self, weights: np.ndarray | None = None) -> np.ndarray:
        """NE [A] by task, NaN where it is undefined; for ``weights`` [B, U], how often each user was drawn, [B, A]."""
        if weights is None:
            found: np.ndarray = self.ne(np.ones((1, len(self.users))))[0]
            return found
        loss, rate = self._means(weights)
        return loss / entropy(rate)

    def mean_ne(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The mean of :meth:`ne` over the tasks that define it on all users: a scalar, or [B]."""
        defined = self._defined
        if not defined.any():
            return np.full(() if weights is None else len(weights), math.nan)
        mean: np.ndarray = self.ne(weights)[..., defined].mean(axis=-1)
        return mean

    def influence(self) -> np.ndarray:
        """What each user adds to the deviation of NE from its expected value, to first order: [U, A].

        NE = (sum of L_u / n) / H(p) with p = sum of y_u / n, where user u has n_u of the n rows, the loss L_u and y_u
        positives. The delta method on the three sums gives, for user u,

            ((L_u - n_u L) / n - NE H'(p) (y_u - n_u p) / n) / H(p),  L the mean loss, H'(p) = log((1 - p) / p).

        The values of a task sum to zero; those of several may be averaged. NaN where NE is undefined.
        """
        (loss,), (rate,) = self._means(np.ones((1, len(self.users))))
        n, bits, rows = max(int(self.rows.sum()), 1), entropy(rate), self.rows[:, None]
        inside = np.where(np.isfinite(bits), rate, 0.5)
        slope = np.log((1 - inside) / inside)
        return (self.losses - rows * loss - loss / bits * slope * (self.positives - rows * rate)) / (n * bits)

    def mean_influence(self) -> np.ndarray:
        """Every user's influence [U] on :meth:`mean_ne`."""
        defined = self._defined
        if not defined.any():
            return np.full(len(self.users), math.nan)
        mean: np.ndarray = self.influence()[:, defined].mean(axis=1)
        return mean

    def same_rows(self, other: "UserSums") -> bool:
        """Whether both may be of the same impressions: the users, their rows and their labels agree."""
        fields = ("users", "rows", "positives")
        return self.tasks == other.tasks and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in fields
        )

    @property
    def _defined(self) -> np.ndarray:
        return np.isfinite(self.ne())

    def _means(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss and base rate, each [B, A]; a draw of nobody has a rate of zero."""
        drawn = weights.astype(np.float64)
        n = np.maximum(drawn @ self.rows, 1)[:, None]
        return drawn @ self.losses / n, drawn @ self.positives / n


@dataclasses.dataclass(frozen=True)
class Difference:
    """NE of one model minus another's on the same impressions, and how far other users might have moved it.

    error: its standard error, users being paired: what makes a user hard for both models cancels. unpaired: what it
    would be if each model had users of its own. low, high: 95 % interval, from redrawn users who are the same for both
    models. Neither knows of training seeds beyond the trials that were averaged.
    """

    value: float
    error: float
    unpaired: float
    low: float
    high: float


def difference(base: Sequence[UserSums], new: Sequence[UserSums], *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """The mean NE of the trials ``new`` minus that of ``base`` (each, for example, one trial per seed).

    The error is the delta method's, the interval holds the middle 95 % of ``draws`` user bootstraps; a draw in which a
    task has labels of one kind alone is left out. NaN where NE is undefined. Raises ValueError for other impressions.
    """
    if not all(base[0].same_rows(other) for other in (*base, *new)):
        raise ValueError("the trials were evaluated on different impressions")
    influence = [np.mean([one.mean_influence() for one in side], axis=0) for side in (base, new)]
    drawn = np.concatenate(
        [_mean_ne(new, weights) - _mean_ne(base, weights) for weights in user_draws(len(base[0].users), draws, seed)]
    )
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) > 1 else (math.nan, math.nan)
    return Difference(
        value=float(_mean_ne(new) - _mean_ne(base)),
        error=clustered_error(influence[1] - influence[0]),
        unpaired=math.hypot(*map(clustered_error, influence)),
        low=float(low),
        high=float(high),
    )


def user_draws(users: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is in each of ``draws`` bootstraps: blocks [b, U] that together have that many rows.

    Every count is Poisson with mean 1, the limit of drawing U of U users with replacement (Chamandy et al. 2012): NE
    is a ratio of sums, so that the number of users drawn does not matter.
    """
    rng = np.random.default_rng(seed)
    block = max(1, _WEIGHTS // max(users, 1))
    for start in range(0, draws, block):
        yield rng.poisson(1.0, (min(block, draws - start), users))


def _mean_ne(trials: Sequence[UserSums], weights: np.ndarray | None = None) -> np.ndarray:
    """Averaged over trials: a scalar, or [B] for ``weights`` [B, U]."""
    mean: np.ndarray = np.mean([one.mean_ne(weights) for one in trials], axis=0)
    return mean


def clustered_error(influence: np.ndarray) -> float:
    """Standard error of a metric from its users' influence [U], users being drawn independently and rows only with
    their user: sqrt(U / (U - 1) * sum of squares) (Liang & Zeger 1986, with the usual correction for few clusters).

    NaN for fewer than two users.
    """
    users = len(influence)
    return math.sqrt(users / (users - 1) * float(np.sum(influence**2))) if users > 1 else math.nan


def row_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Binary cross-entropy in nats of every logit against its label, float64."""
    x, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))


def entropy(rate: np.ndarray) -> np.ndarray:
    """In nats; NaN for a rate of 0 or 1, by which nothing can be divided."""
    inside = (rate > 0) & (rate < 1)
    p = np.where(inside, rate, 0.5)
    return np.where(inside, -(p * np.log(p) + (1 - p) * np.log(1 - p)), np.nan)
