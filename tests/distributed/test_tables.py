"""Large tables that devices lend each other rows of: the exchange against a count in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrec_jax.distributed.mesh import make_mesh, parse_mesh, placed
from genrec_jax.distributed.tables import room_for
from genrec_jax.nn import embedding
from genrec_jax.nn.embedding import by_id, from_ids, id_of, place_of, table_rows
from genrec_jax.train.rows import round_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exchanged() -> dict[str, dict[str, float]]:
    """What tests/distributed/exchange.py found on eight devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.distributed.exchange"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
@pytest.mark.parametrize(
    ("case", "rounds"),
    [
        ("uniform", 1),
        ("one block", 2),  # of 25 of a block's 64 rows on average, where a box has room for 16
        ("one row", 1),
        ("padded", 1),
        ("one asks for padding alone", 1),
        ("one asks for half a block", 4),  # every other row: two rounds would not do
    ],
)
def test_rows_are_lent_and_moved_as_counted(
    exchanged: dict[str, dict[str, float]], case: str, rounds: int, mesh: str
) -> None:
    """Every row that is asked for arrives as it is; the sums of gradients, each once, make their norm and the step."""
    found = exchanged[f"{case}, {mesh}"]
    assert found["complete"]
    assert found["rounds"] == rounds
    assert found["lent"] == 0
    assert found["norm"] < 1e-6
    assert max(found[name] for name in ("rows", "square", "mean")) < 2e-6


def test_boxes_have_room_for_an_even_share_and_more() -> None:
    assert room_for(64, 8, 1000) == 24  # 8 and 6 sqrt(8), in tiles of 8
    assert room_for(800, 8, 1000) == 160
    assert room_for(80000, 8, 10000) == 10000
    assert room_for(80000, 8, 100000) == 10600
    assert room_for(800, 8, 100) == 100  # no more than there is


def test_ids_are_dealt_out_over_a_large_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours lie in different blocks of any power of two up to `SPREAD`, each id in its place."""
    monkeypatch.setattr(embedding, "LARGE", 20)
    monkeypatch.setattr(embedding, "SPREAD", 8)
    assert (table_rows(19), table_rows(20), table_rows(24)) == (19, 24, 24)
    ids = jnp.arange(21)
    places = place_of(ids, 21)
    assert places[0] == 0
    assert sorted((places[:8] // 3).tolist()) == list(range(8))
    np.testing.assert_array_equal(id_of(places, 21), ids)
    rows = np.random.default_rng(0).normal(size=(21, 2))
    table = from_ids(rows)
    np.testing.assert_array_equal(table[np.asarray(places)], rows)
    np.testing.assert_array_equal(by_id(table, 21), rows)
    assert table.shape == (24, 2)
    assert np.count_nonzero(table) == np.count_nonzero(rows)
    small = rows[:19]
    assert by_id(small, 19) is small
    assert from_ids(small) is small


def test_a_row_is_rounded_alike_whatever_lies_beside_it() -> None:
    rows = jax.random.normal(jax.random.key(0), (40, 16))
    ids, key = jnp.arange(100, 140), jax.random.key(1)
    whole = round_rows(rows, ids, key)
    np.testing.assert_array_equal(round_rows(rows[7:20], ids[7:20], key), whole[7:20])
    assert len(np.unique(np.asarray(round_rows(jnp.full((40, 16), 1 + 2**-9), ids, key), np.float32))) == 2


def test_devices_draw_and_hold_their_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table drawn by two devices is that of one; neither ever holds more than its half and a block's draw."""
    monkeypatch.setattr(embedding, "LARGE", 2**12)
    monkeypatch.setattr(embedding, "_BLOCK", 2**12)

    def make() -> dict[str, jax.Array]:
        return {"rows_table": embedding._initial(jax.random.key(0), 2**17, 16, 1.0)}

    mesh = make_mesh(parse_mesh("data=2"))
    drawn = jax.jit(make, out_shardings=placed(mesh, jax.eval_shape(make))).lower().compile()
    table = drawn()["rows_table"]
    assert table.addressable_shards[0].data.shape == (2**16, 16)
    np.testing.assert_array_equal(table, make()["rows_table"])
    memory, half = drawn.memory_analysis(), 2**16 * 16 * 4
    assert memory.output_size_in_bytes < 1.01 * half
    assert memory.temp_size_in_bytes < 1.5 * half
