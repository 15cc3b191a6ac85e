"""``genrec sparsity``: what Stochastic Length removes, beside the tables of its paper, and on a dataset's own lengths.

Sparsity is 1 - mean(kept length) / N over the histories of at most N events (arXiv 2402.17152, appendix F.2; tables 3,
14 and 15 for histories of 30, 60 and 90 days). The paper does not print its lengths. Its row alpha = 2, which keeps
everything, gives the mean of min(n, N) for four N, and so the share of users beyond each of them, if the share falls in
straight lines between (:func:`share_beyond`). That row is matched by construction; the other sixteen cells of a table
are predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linprog

from genrec_jax.data import rows as row_tables
from genrec_jax.data.passes import Passes
from genrec_jax.data.rows import RowTable
from genrec_jax.data.sequences import Sequences, load
from genrec_jax.data.splits import kept_users, split_last
from genrec_jax.data.stochastic_length import StochasticLength

LENGTHS = (1024, 2048, 4096, 8192)
ALPHAS = (1.6, 1.7, 1.8, 1.9, 2.0)
# Sparsity in per cent: rows by alpha, columns by N.
PAPER = {
    30: np.array(
        [
            [71.5, 76.1, 80.5, 84.4],
            [56.1, 63.6, 69.8, 75.6],
            [40.2, 45.3, 54.1, 66.4],
            [17.2, 21.0, 36.3, 64.1],
            [3.1, 6.6, 29.1, 64.1],
        ]
    ),
    60: np.array(
        [
            [71.5, 75.8, 79.4, 83.8],
            [57.3, 60.6, 67.3, 74.5],
            [37.5, 42.6, 51.9, 62.6],
            [15.0, 17.7, 29.6, 57.8],
            [1.2, 2.5, 18.9, 57.6],
        ]
    ),
    90: np.array(
        [
            [68.0, 74.6, 78.6, 83.5],
            [56.3, 61.2, 67.5, 74.3],
            [38.9, 42.0, 50.4, 61.0],
            [16.2, 17.3, 27.2, 54.3],
            [0.9, 1.6, 13.5, 54.0],
        ]
    ),
}
_USERS = 100_000


def share_beyond(sparsity: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, share of users with longer histories), the corners of a falling line, from the row alpha = 2.

    The mean of min(n, N) is the area below the line up to N. Between two N the line is straight; beyond the last but
    one it falls to zero where the remaining area is used up.
    """
    means = [n * (1 - s / 100) for n, s in zip(LENGTHS, sparsity, strict=True)]
    lengths, shares = [0.0], [1.0]
    areas = np.diff([0.0, *means])
    for length, area in zip(LENGTHS[:-1], areas[:-1], strict=True):
        shares.append(2 * area / (length - lengths[-1]) - shares[-1])
        lengths.append(length)
    lengths.append(lengths[-1] + 2 * areas[-1] / shares[-1])
    return np.array(lengths), np.array([*shares, 0.0])


def user_lengths(sparsity: Sequence[float], users: int = _USERS) -> np.ndarray:
    """[users] int64: history lengths at evenly spaced quantiles of :func:`share_beyond`."""
    lengths, shares = share_beyond(sparsity)
    beyond = (np.arange(users) + 0.5) / users
    return np.round(np.interp(beyond, shares[::-1], lengths[::-1])).astype(np.int64)


def drawn_sparsity(lengths: np.ndarray, longest: int, alpha: float) -> float:
    """Per cent of N that a pass leaves empty when the pipeline thins one history per user, the N newest events."""
    kept = np.minimum(lengths, longest)
    stop = np.cumsum(kept + 1) - 1
    rows = RowTable(np.arange(len(kept), dtype=np.int32), stop - kept, stop, stop, stop + 1, supervised=True)
    return 100 * (1 - StochasticLength(alpha, longest, "uniform", 0).lengths(rows, 0).mean() / longest)


def drawn_table(lengths: np.ndarray) -> np.ndarray:
    """As the tables of the paper: rows by alpha, columns by N."""
    return np.array([[drawn_sparsity(lengths, n, alpha) for n in LENGTHS] for alpha in ALPHAS])


def least_error(table: np.ndarray, columns: Sequence[int] = range(len(LENGTHS))) -> float:
    """How close the rule can come to a table's columns at all: the smallest largest error in points of sparsity.

    Over all distributions of lengths up to 8,192 (in steps of 16), by linear programming.
    """
    grid = np.arange(0, LENGTHS[-1] + 1, 16)
    cells = [(alpha, LENGTHS[j]) for alpha in ALPHAS for j in columns]
    rules = [StochasticLength(alpha, longest, "uniform", 0) for alpha, longest in cells]
    sparsity = np.array([100 * (1 - rule.expected(np.minimum(grid, rule.longest)) / rule.longest) for rule in rules])
    wanted = table[:, list(columns)].ravel()
    slack = -np.ones((len(cells), 1))
    found = linprog(
        np.append(np.zeros(len(grid)), 1.0),
        A_ub=np.block([[sparsity, slack], [-sparsity, slack]]),
        b_ub=np.concatenate([wanted, -wanted]),
        A_eq=np.append(np.ones(len(grid)), 0.0)[None],
        b_eq=[1.0],
    )
    return float(found.fun)


@dataclass(frozen=True)
class Thinned:
    """A dataset's training histories under one rule: tokens kept of those before, packed rows, sum of squared lengths.

    All are shares of what alpha = 2 gives with the same packing.
    """

    alpha: float
    longest: int
    tokens: float
    rows: float
    pairs: float


def thinned(sequences: Sequences, longest: int, segments: int = 32) -> list[Thinned]:
    """One line per alpha for next-item rows (one per user, its ``longest`` newest events), by their first pass."""
    from genrec_jax.config import DataConfig

    everyone = kept_users(sequences.users, 1.0)
    table = row_tables.next_item_rows(sequences, split_last(sequences), "train", longest, everyone)
    rules = {alpha: DataConfig(history=longest, segments=segments, stochastic_length=alpha) for alpha in ALPHAS}
    tallies = {alpha: Passes("users", table, rule, 1, 0)[0].tally for alpha, rule in rules.items()}
    base = tallies[2.0]
    return [
        Thinned(alpha, longest, t.events / base.events, t.rows / base.rows, t.squares / base.squares)
        for alpha, t in tallies.items()
    ]


def sparsity_command(out: Path, data: Path | None) -> None:
    """Prints the tables as Markdown and draws ``OUT/stochastic_length.svg``."""
    drawn = {days: drawn_table(user_lengths(table[-1])) for days, table in PAPER.items()}
    for days, table in PAPER.items():
        print(f"\n{days} days of history: sparsity of the lab (of the paper), per cent\n")
        print("| alpha | " + " | ".join(f"N = {n:,}" for n in LENGTHS) + " |\n|---|---|---|---|---|")
        for alpha, mine, theirs in zip(ALPHAS, drawn[days], table, strict=True):
            print(f"| {alpha} | " + " | ".join(f"{a:.1f} ({b:.1f})" for a, b in zip(mine, theirs, strict=True)) + " |")
        alone = ", ".join(f"{least_error(table, [j]):.1f}" for j in range(len(LENGTHS)))
        print(
            f"\nlargest difference {np.abs(drawn[days] - table).max():.1f} points; the closest that any lengths can "
            f"come: {least_error(table):.1f}, and to one column alone: {alone}"
        )
    if data is not None:
        from genrec_jax.data.catalog import load_any

        sequences = load(load_any(data))
        print(f"\n{sequences.name}: per cent removed\n")
        print("| N | alpha | events | packed rows | squared lengths |\n|---|---|---|---|---|")
        for longest in (200, 512, 2048):
            for one in thinned(sequences, longest):
                shares = " | ".join(f"{100 * (1 - x):.1f}" for x in (one.tokens, one.rows, one.pairs))
                print(f"| {longest:,} | {one.alpha} | {shares} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "stochastic_length.svg").write_text(figure(drawn[30], PAPER[30]), encoding="utf-8")


def figure(drawn: np.ndarray, paper: np.ndarray) -> str:
    """SVG: sparsity against alpha, one line per N from the lab, the paper's cells as points."""
    from scaling.style import COLOURS, MARKERS, new_axes, render, styled

    @styled
    def draw() -> str:
        page, axes = new_axes(5.2, 3.6)
        for j, longest in enumerate(LENGTHS):
            axes.plot(ALPHAS, drawn[:, j], color=COLOURS[j], label=f"N = {longest:,}")
            axes.plot(ALPHAS, paper[:, j], color=COLOURS[j], marker=MARKERS[j], linestyle="none")
        axes.set_xlabel("alpha")
        axes.set_ylabel("sparsity, %")
        axes.legend(title="lines: lab; points: paper", frameon=False)
        return render(page, "Sparsity of Stochastic Length by alpha and longest history")

    return draw()
