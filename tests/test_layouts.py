import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax import layouts
from genrec_jax.batch import Shape
from genrec_jax.layouts import CONTEXT_HISTORY_CANDIDATES, INTERLEAVED, ITEMS
from kernels_pallas.hstu_attention import visible
from tests.models.gr_helpers import change, random_batch

SHAPE = Shape(history=5, candidates=2, segments=2)


def two_segments():
    """One row: segment 1 has 2 events, segment 2 has 1; times chosen by hand."""
    batch = random_batch(SHAPE, [[2, 1]])
    batch = change(batch, "history", time=np.array([[10, 20, 7, 99, 99]], np.int32))
    return change(batch, "candidates", time=np.array([[30, 30, 9, 9]], np.int32))


def test_positions_restart_at_each_segment():
    segment = jnp.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 4, 5, 5, 5, 5]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 0, 1, 2, 3]]
    assert layouts.segment_positions(segment).tolist() == expected
    assert layouts.last_events(segment, 5).tolist() == [[2, 4, 0, 0, 0], [0, 0, 1, 2, 6]]


def test_interleaved_tokens_by_hand():
    tokens = INTERLEAVED.tokens(two_segments())
    real = np.asarray(tokens.segment[0]) > 0
    assert tokens.segment[0].tolist() == [1, 2, *[1, 1, 1, 1, 2, 2], 0, 0, 0, 0, *[1, 1, 2, 2]]
    assert np.asarray(tokens.order[0])[real].tolist() == [0, 0, *[1, 2, 3, 4, 1, 2], *[5, 5, 3, 3]]
    assert np.asarray(tokens.key_time[0])[real].tolist() == [10, 7, 10, 10, 20, 20, 7, 7, 30, 30, 9, 9]
    assert tokens.query_time is tokens.key_time
    assert tokens.segment.shape[1] == INTERLEAVED.row_tokens(SHAPE)


def test_candidate_tokens_by_hand():
    tokens = CONTEXT_HISTORY_CANDIDATES.tokens(two_segments())
    real = np.asarray(tokens.segment[0]) > 0
    assert tokens.segment[0].tolist() == [1, 2, 1, 1, 2, 0, 0, 1, 1, 2, 2]
    assert np.asarray(tokens.order[0])[real].tolist() == [0, 0, 1, 2, 1, 3, 3, 2, 2]
    assert tokens.segment.shape[1] == CONTEXT_HISTORY_CANDIDATES.row_tokens(SHAPE)


def test_a_segment_without_history_starts_at_its_candidates():
    batch = change(random_batch(SHAPE, [[0, 1]]), "candidates", time=np.array([[30, 30, 9, 9]], np.int32))
    tokens = CONTEXT_HISTORY_CANDIDATES.tokens(batch)
    assert tokens.segment[0, :2].tolist() == [1, 2]
    assert tokens.key_time[0, 0] == 30
    assert tokens.order[0, -4:].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("layout", [INTERLEAVED, CONTEXT_HISTORY_CANDIDATES])
def test_smaller_order_means_smaller_index_and_longest_is_reached(layout):
    shape = Shape(history=6, candidates=2, segments=3)
    tokens = layout.tokens(random_batch(shape, [[1, 3, 2], [0, 6, 0], [2, 0, 0]]))
    for segment, order in zip(np.asarray(tokens.segment), np.asarray(tokens.order)):
        for s in range(1, 4):
            assert (np.diff(order[segment == s]) >= 0).all()
    assert int(tokens.order.max()) + 1 == layout.longest(6)


def requests_of_two():
    """One row, one segment: events 0 | 1 2 | 3 of three requests, the last of them going on in the candidates."""
    batch = random_batch(Shape(history=5, candidates=2), [[4]])
    batch = change(batch, "history", before=np.array([[0, 1, 1, 3, 0]], np.int32))
    return change(batch, "candidates", before=np.array([[3, 3]], np.int32))


def test_events_shown_together_do_not_see_each_other():
    tokens = INTERLEAVED.tokens(requests_of_two())
    names = ["u", "i0", "a0", "i1", "a1", "i2", "a2", "i3", "a3", "-", "-", "c3", "c4"]
    seen = np.asarray(visible(tokens)[0])
    sees = {q: {k for k, there in zip(names, row) if there} for q, row in zip(names, seen)}
    first, second = {"u", "i0", "a0"}, {"i1", "a1", "i2", "a2"}
    assert sees["i1"] == first | {"i1"}
    assert sees["a1"] == first | {"i1", "a1"}  # i2 has a smaller order, but stands later in the row
    assert sees["i2"] == first | {"i2"}  # in particular not a1: the label of an item shown beside it
    assert sees["a2"] == first | {"i1", "i2", "a2"}
    assert sees["i3"] == first | second | {"i3"}
    assert sees["c3"] == first | second | {"c3"}  # its request began with event 3
    assert sees["c4"] == first | second | {"c4"}
    assert not sees["-"]


@pytest.mark.parametrize("layout", [INTERLEAVED, CONTEXT_HISTORY_CANDIDATES, ITEMS])
@pytest.mark.parametrize("segments", [1, 3])
def test_pairs_are_those_the_mask_shows(layout, segments):
    shape = Shape(history=6, candidates=2, segments=segments)
    batch = random_batch(shape, [[6 // segments] * segments])
    tokens = layout.tokens(batch) if layout.candidates else layouts.next_item(batch).tokens
    assert tokens.segment.shape[1] == layout.row_tokens(shape)
    assert int(visible(tokens).sum()) == layout.pairs(shape)


def test_join_and_split_are_inverse():
    context, candidates = jnp.full((2, 3, 4), -1.0), jnp.full((2, 6, 4), -2.0)
    items, actions = jnp.arange(40.0).reshape(2, 5, 4), jnp.full((2, 5, 4), 7.0)
    x = layouts.join(context, [items, actions], candidates)
    first, last = layouts.split(x, 3, 5, 2)
    assert (first == items).all()
    assert (last == candidates).all()
    assert (x[:, 4:13:2] == 7).all()


def test_next_item_by_hand():
    batch = two_segments()
    batch = change(batch, "history", item=np.array([[3, 4, 5, 8, 8]], np.int32))
    batch = change(batch, "candidates", item=np.array([[6, 2, 9, 2]], np.int32))
    rows = layouts.next_item(batch)
    assert rows.target.tolist() == [[4, 6, 9, 0, 0]]
    assert rows.position[0, :3].tolist() == [0, 1, 0]
    assert rows.tokens.query_time[0, :3].tolist() == [20, 30, 9]
    assert rows.tokens.key_time[0, :3].tolist() == [10, 20, 7]


def test_the_last_item_without_a_candidate_has_no_target():
    batch = change(two_segments(), "candidates", segment=np.array([[0, 0, 2, 2]], np.int32))
    rows = layouts.next_item(batch)
    assert rows.target[0, 1] == 0
    assert rows.target[0, 2] == batch.candidates.item[0, 2]
    assert rows.tokens.query_time[0, 1] == 20
