"""Stochastic Length: long histories are trained on as random subsequences (Zhai et al., arXiv 2402.17152, section 3.2).

With N the longest history and alpha in (1, 2], a history of n events (equation 4)

    is kept whole              if n <= N^(alpha/2), else with probability N^alpha / n^2;
    becomes N^(alpha/2) of its events, in their order, otherwise.

The expected cost of attention to a history then grows as N^alpha instead of N^2. Whether and how a row is thinned is a
hash of (seed, row, pass over the data): the same on every machine, other events in every pass.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from genrec_jax.data.rows import RowTable
from genrec_jax.data.splits import hash64

# How the events of a subsequence are chosen.
Subsequence = Literal["elapsed", "place", "uniform", "recent"]

_COIN, _CHOICE = np.uint64(1), np.uint64(2)  # what a row's hash is for


@dataclass(frozen=True)
class StochasticLength:
    """The rule for histories of at most ``longest`` (N) events.

    subsequence: L of n events are drawn without replacement, one after the other, with chances proportional to

    - "elapsed": 1 - f_i / sum_j f_j, f_i the seconds between event i and the history's last: the paper's
      feature-weighted selection (appendix F.1), its sum read as over the whole history. All n chances lie in
      [1 - 1/k, 1] when k events are about as old as the oldest, so on long histories this is close to "uniform";
    - "place": i, the event's place counted from the oldest, 1 to n: recency that is felt at any length;
    - "uniform": 1 (the paper's random selection);

    or are the last L: "recent" (the paper's greedy selection).
    """

    alpha: float
    longest: int
    subsequence: Subsequence
    seed: int

    @property
    def threshold(self) -> int:
        """L = floor(N^(alpha/2)): length of a subsequence, and the longest history that is always kept whole."""
        return int(self.longest ** (self.alpha / 2) + 1e-9)  # 1024^0.8 is 256, whatever the last bit says

    def whole(self, length: np.ndarray) -> np.ndarray:
        """Probability that a history of each length is kept whole; float64."""
        share = float(self.longest) ** self.alpha / np.maximum(length, 1).astype(np.float64) ** 2
        return np.where(length <= self.threshold, 1.0, np.minimum(share, 1.0))

    def expected(self, length: np.ndarray) -> np.ndarray:
        """Expected events kept of histories of each length; float64."""
        whole = self.whole(length)
        return whole * length + (1 - whole) * np.minimum(length, self.threshold)

    def lengths(self, rows: RowTable, epoch: int) -> np.ndarray:
        """Events that each row's history keeps in pass ``epoch``; int64, of the table's shape."""
        length = rows.history_length
        coin = uniform(hash64(rows.target_start, self._key(epoch) + _COIN))
        return np.where(coin < self.whole(length), length, self.threshold)

    def places(self, rows: RowTable, epoch: int, time: np.ndarray) -> np.ndarray:
        """Which events T thinned rows keep in pass ``epoch``: places [T, L] int64 from the oldest (0), ascending.

        rows: T rows, every history longer than L. time: of every event of the dataset.
        """
        length, kept = rows.history_length[:, None], self.threshold
        if self.subsequence == "recent":
            return length - kept + np.arange(kept)
        place = np.arange(int(length.max(initial=kept)))
        real = place < length
        event = np.where(real, rows.history_start[:, None] + place, rows.history_start[:, None])
        key = hash64(rows.target_start, self._key(epoch) + _CHOICE)
        # The L largest of log(u) / weight are draws without replacement (Efraimidis & Spirakis, IPL 97, 2006).
        score = np.log(uniform(hash64(event, key[:, None]))) / self._weights(place, event, length, time)
        score[~real] = -np.inf
        return np.sort(np.argpartition(-score, kept - 1, axis=1)[:, :kept], axis=1)

    def _weights(self, place: np.ndarray, event: np.ndarray, length: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Positive weights, broadcastable to ``event`` [T, n]; anything beyond a history's length."""
        if self.subsequence == "uniform":
            return np.ones(1)
        if self.subsequence == "place":
            return place + 1.0
        seconds = time.take(event).astype(np.float64)
        last = np.take_along_axis(seconds, length - 1, axis=1)
        elapsed = np.where(place < length, last - seconds, 0.0)
        share = elapsed / np.maximum(elapsed.sum(axis=1, keepdims=True), 1.0)
        return np.maximum(1.0 - share, 1e-9)  # a single old event takes the whole sum: its chance is 0

    def _key(self, epoch: int) -> np.ndarray:
        return hash64(np.array([epoch]), self.seed)


def uniform(bits: np.ndarray) -> np.ndarray:
    """uint64 hashes as numbers in (0, 1]."""
    return ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
