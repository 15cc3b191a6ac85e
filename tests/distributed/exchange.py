"""Exchanges rows of a table between 8 devices: prints, as JSON, how far from a count in float64. Run as a program."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genrec_jax.distributed.mesh import make_mesh, parse_mesh, rows_of
from genrec_jax.distributed.tables import borrow, give_back, lent_on, move_lent
from genrec_jax.nn import embedding
from genrec_jax.train.rows import RowRule
from genrec_jax.train.rows import rows_of as table_of

ROWS, WIDTH, ASKED, DEVICES = 512, 5, 32, 8  # an even share of what one asks for is 4 rows, a box has room for 16
PLACE = ("items",)
RULE = RowRule("rowwise_adamw", lambda step: 0.1, 0.2, 0.8, 0.9)


def cases() -> dict[str, np.ndarray]:
    """The rows that devices ask for, [DEVICES, ASKED]."""
    draw = np.random.default_rng(0)
    uniform = draw.integers(1, ROWS, (DEVICES, ASKED))
    crowded = 64 * 3 + draw.integers(0, 64, (DEVICES, ASKED))
    padded = np.where(draw.random((DEVICES, ASKED)) < 0.5, 0, uniform)
    idle = uniform.copy()
    idle[2] = 0
    one_crowds = uniform.copy()
    one_crowds[5] = np.arange(64, 128, 2)
    return {
        "uniform": uniform,
        "one block": crowded,
        "one row": np.full((DEVICES, ASKED), 77),
        "padded": padded,
        "one asks for padding alone": idle,
        "one asks for half a block": one_crowds,
    }


def compiled(mesh: Any) -> Any:
    """(parameters, state, asked, gradients of the rows at hand) -> what `exchanged` looks at."""

    @jax.jit
    def step(params: Any, state: Any, asked: jax.Array, grads: jax.Array) -> Any:
        assert lent_on(mesh, params, [PLACE]) == [PLACE]
        at_hand, lent = borrow(mesh, params, {PLACE: asked})
        rows, ids = table_of(at_hand, PLACE), lent[PLACE].ids
        back, returned = give_back(mesh, {"items": {"rows_table": grads}}, lent)
        norm = jnp.linalg.norm(table_of(back, PLACE))
        updates = jax.tree.map(lambda x: 0.5 * x, back)
        number, key = jnp.full((), 3), jax.random.key(0)
        new, states = move_lent(mesh, RULE, params, state, lent, returned, updates, number, key)
        return rows, ids, lent[PLACE].rounds, norm, new[PLACE], states["items"]

    return step


def exchanged(mesh: Any, step: Any, asked: np.ndarray) -> dict[str, float]:
    """The largest errors of rows lent, their gradient's norm, and the rows and their state after a step."""
    draw = np.random.default_rng(1)
    table, mean = draw.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    square = draw.random(ROWS).astype(np.float32)
    grads = draw.normal(size=(DEVICES, ASKED, WIDTH)).astype(np.float32)
    divided = jax.sharding.NamedSharding(mesh, rows_of(mesh))
    state = {"items": jax.device_put({"square": square, "mean": mean}, divided)}
    params = {"items": {"rows_table": jax.device_put(table, divided)}}
    rows, ids, rounds, norm, new, states = step(params, state, jax.device_put(asked, divided), grads.reshape(-1, WIDTH))
    rows, ids = (np.asarray(x).reshape(DEVICES, ASKED, *x.shape[1:]) for x in (rows, ids))
    here, wanted = ids < ROWS, np.zeros((ROWS, WIDTH))
    for own, mine, given in zip(ids, here, grads, strict=True):
        np.add.at(wanted, own[mine], given[mine].astype(np.float64))
    read = np.unique(asked)
    own = {"square": square[read].astype(np.float64), "mean": mean[read].astype(np.float64)}
    moved, after = RULE.move(table[read].astype(np.float64), 0.5 * wanted[read], own, np.float64(3))
    expected = {"rows": table.astype(np.float64), "square": square.astype(np.float64), "mean": mean.astype(np.float64)}
    expected["rows"][read] = moved
    for name in after:
        expected[name][read] = after[name]
    found = {name: float(np.abs(np.asarray(x) - expected[name]).max()) for name, x in {"rows": new, **states}.items()}
    return found | {
        "rounds": int(rounds),
        "lent": float(np.abs(rows[here] - table[ids[here]]).max()),
        "complete": all(set(a) == set(b[m]) for a, b, m in zip(asked, ids, here, strict=True)),
        "norm": float(abs(norm / np.linalg.norm(wanted) - 1)),
    }


def main() -> dict[str, dict[str, float]]:
    embedding.LARGE = ROWS
    found = {}
    for name in ("data=8", "data=2,fsdp=4"):
        mesh = make_mesh(parse_mesh(name))
        step = compiled(mesh)
        found |= {f"{case}, {name}": exchanged(mesh, step, asked) for case, asked in cases().items()}
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
