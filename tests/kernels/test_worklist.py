"""Work lists against the mask they summarise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.hstu_attention import Tokens, jagged_tokens, padded_tokens, visible
from kernels_pallas.hstu_attention.tokens import attributes
from kernels_pallas.hstu_attention.worklist import tile_kinds, work_list
from tests.kernels.attention_cases import cases

BLOCK_Q, BLOCK_K = 8, 16


def tiles_of(mask, block_q=BLOCK_Q, block_k=BLOCK_K):
    """[B, nq, nk] bools: the tile holds a visible pair; every pair of it (inside the row) is visible."""
    b, t, n = mask.shape
    short = ((0, 0), (0, -t % block_q), (0, -n % block_k))
    blocks = (b, -(-t // block_q), block_q, -(-n // block_k), block_k)
    return np.pad(mask, short).reshape(blocks).any((2, 4)), np.pad(mask, short).reshape(blocks).all((2, 4))


def tokens_of(case):
    return jagged_tokens(jnp.asarray(case.offsets), case.total, **case.mask_options())


@pytest.mark.parametrize("case", cases(16), ids=lambda case: case.name)
def test_no_visible_pair_is_missed_and_no_hidden_one_counted_as_visible(case):
    tokens = tokens_of(case)
    some, full = tile_kinds(*attributes(tokens), BLOCK_Q, BLOCK_K)
    holds, filled = tiles_of(np.asarray(visible(tokens)))
    assert not (holds & ~np.asarray(some)).any()
    np.testing.assert_array_equal(full, filled)


def test_a_causal_sequence_lists_the_lower_half_alone():
    some, full = tile_kinds(*attributes(padded_tokens(jnp.array([64, 40]), 64)), 16, 16)
    triangle = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(some[0], triangle)
    np.testing.assert_array_equal(full[0], np.tril(triangle, -1))
    # The shorter one ends inside the third block, whose rows are not all real.
    np.testing.assert_array_equal(some[1], np.tril(np.ones((4, 4), bool)) & (np.arange(4) < 3)[:, None])
    np.testing.assert_array_equal(full[1], np.tril(triangle, -1) & (np.arange(4) < 2)[:, None])


def test_candidates_skip_from_the_history_to_themselves():
    tokens = padded_tokens(jnp.array([96]), 96, num_targets=jnp.array([64]))
    some, full = tile_kinds(*attributes(tokens), 16, 16)
    want = np.zeros((6, 6), bool)
    want[:, :2] = True
    want[0, 1] = False
    want |= np.eye(6, dtype=bool)
    np.testing.assert_array_equal(some[0], want)
    np.testing.assert_array_equal(full[0, 2:, :2], True)


def test_a_window_and_packed_sequences_leave_a_band():
    tokens = jagged_tokens(jnp.array([0, 64, 128]), 128, window=16)
    some, _ = tile_kinds(*attributes(tokens), 16, 16)
    i, j = np.arange(8)[:, None], np.arange(8)[None]
    np.testing.assert_array_equal(some[0], (j <= i) & (j >= i - 1) & (i // 4 == j // 4))


@pytest.mark.parametrize("by", ["query", "key"])
@pytest.mark.parametrize("case", cases(16), ids=lambda case: case.name)
def test_the_list_is_the_tiles_in_order(case, by):
    queries, keys = attributes(tokens_of(case))
    some, full = (np.asarray(x)[0] for x in tile_kinds(queries, keys, BLOCK_Q, BLOCK_K))
    found = jax.jit(lambda q, k: work_list(q, k, BLOCK_Q, BLOCK_K, by=by))(queries, keys)
    count = int(found.size)
    listed = list(zip(found.query[:count].tolist(), found.key[:count].tolist()))
    assert not np.asarray(found.row).any()
    want = {(q, k) for q, k in zip(*np.nonzero(some))}
    # Blocks with nothing to do are listed once more, so that their output is written.
    alone = 1 if by == "key" else 0
    groups = [tile[alone] for tile in listed]
    assert sorted(set(groups)) == list(range(some.shape[alone]))
    extra = set(listed) - want
    assert set(listed) >= want
    assert all(groups.count(tile[alone]) == 1 for tile in extra)
    assert listed == sorted(listed, key=lambda tile: (tile[alone], tile[1 - alone]))
    assert [bool(f) for f in found.full[:count]] == [bool(full[tile]) for tile in listed]
    changes = [a != b for a, b in itertools.pairwise(groups)]
    assert found.first[:count].tolist() == [True, *changes]
    assert found.last[:count].tolist() == [*changes, True]
    # What follows the last tile repeats it.
    assert set(zip(found.query[count:].tolist(), found.key[count:].tolist())) <= {listed[-1]}


def test_rows_do_not_mix():
    tokens = padded_tokens(jnp.array([0, 33, 16]), 40)
    found = work_list(*attributes(tokens), 16, 16)
    count = int(found.size)
    listed = list(zip(found.row[:count].tolist(), found.query[:count].tolist(), found.key[:count].tolist()))
    first = [(0, q, 0) for q in range(3)]
    second = [(1, q, k) for q in range(3) for k in range(q + 1)]
    third = [(2, 0, 0), (2, 1, 0), (2, 2, 0)]
    assert listed == first + second + third


def test_tiles_of_interleaved_requests():
    """Orders that fall along the row (two items of one request, then their actions) are summarised right."""
    order = jnp.arange(64, dtype=jnp.int32)
    order = 4 * (order // 4) + order % 2
    zeros = jnp.zeros_like(order)
    tokens = Tokens(zeros[None] + 1, order[None], zeros[None], zeros[None])
    some, full = tile_kinds(*attributes(tokens), BLOCK_Q, BLOCK_K)
    holds, filled = tiles_of(np.asarray(visible(tokens)))
    assert not (holds & ~np.asarray(some)).any()
    np.testing.assert_array_equal(full, filled)
