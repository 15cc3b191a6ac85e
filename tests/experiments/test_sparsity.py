"""The sparsity tables: lengths recovered from their means, the bound by linear programming, the command's page."""

from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.sparsity import ALPHAS, LENGTHS, PAPER, drawn_table, least_error, share_beyond, thinned, user_lengths
from tests.data.helpers import dataset


@pytest.mark.parametrize("days", PAPER)
def test_lengths_have_the_means_they_were_made_from(days: int) -> None:
    """The row alpha = 2 is what the lengths are recovered from; every share beyond a length is between 0 and 1."""
    lengths, shares = share_beyond(PAPER[days][-1])
    assert (np.diff(lengths) > 0).all()
    assert (np.diff(shares) < 0).all()
    assert shares[0] == 1
    assert shares[-1] == 0
    np.testing.assert_allclose(drawn_table(user_lengths(PAPER[days][-1]))[-1], PAPER[days][-1], atol=0.01)


def test_share_beyond_by_hand() -> None:
    """Lengths even between 0 and 8192: the mean of min(n, N) is N - N^2 / 16384."""
    lengths, shares = share_beyond([100 * n / 16384 for n in LENGTHS])
    np.testing.assert_allclose(lengths, [0, 1024, 2048, 4096, 8192])
    np.testing.assert_allclose(shares, [1, 7 / 8, 3 / 4, 1 / 2, 0], atol=1e-12)


def test_least_error_is_nothing_for_a_table_the_rule_made() -> None:
    """Lengths on the bound's grid; a draw of 100,000 coins is off by a tenth of a point, a false cell by more."""
    table = drawn_table(np.repeat([512, 2000, 4096, 8000], 25_000))
    assert least_error(table) < 0.2
    table[0, 0] += 30
    assert least_error(table) > 5


def test_thinned_dataset_by_hand(tmp_path: Path) -> None:
    """Nobody has more than N^(1.6 / 2) events: nothing is removed at any alpha."""
    sequences = dataset(tmp_path / "d", [list(range(12)), list(range(9)), [1]])
    for one in thinned(sequences, 32):
        assert (one.tokens, one.rows, one.pairs) == (1, 1, 1)
    shorter = {one.alpha: one.tokens for one in thinned(sequences, 10)}  # histories of 9 and 6; thresholds 6 to 10
    assert list(shorter) == list(ALPHAS)
    assert shorter[1.6] in ((6 + 6) / 15, 1)
    assert shorter[2.0] == 1


def test_command_prints_tables_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sparsity", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.count("| 1.6 |") == 3
    assert "64.1 (64.1)" in said
    assert (tmp_path / "out/stochastic_length.svg").read_text(encoding="utf-8").count("N = ") >= 4
