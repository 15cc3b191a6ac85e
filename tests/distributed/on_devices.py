"""Trains on 8 devices and on one: prints, as JSON, how far the runs come apart. Run as a program on 8 devices.

    python -m tests.distributed.on_devices FOLDER [--all]

With --all also the meshes that are left to be run by hand; the suite has each axis, alone or with others, without them.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences
from genrec_jax.distributed import tables
from genrec_jax.distributed.collectives import KINDS
from genrec_jax.distributed.estimates import estimated_plans
from genrec_jax.distributed.mesh import along, make_mesh, parse_mesh, placed, share_of
from genrec_jax.distributed.plan import PROGRAMS, Plan, plans_on
from genrec_jax.distributed.tensor import axis_of
from genrec_jax.distributed.topology import parse_topology
from genrec_jax.nn import embedding
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer, make_row_rule
from genrec_jax.train.step import init_state, make_step
from tests.data.helpers import random_dataset
from tests.train.helpers import trial_of

STEPS = 50


def trained(sequences: Sequences, trial: Trial, params: Any, mesh: Any) -> tuple[list[float], list[Any], float]:
    """The losses of 50 steps in 8 pieces, the parameters after them, and the share of the state on the first device."""
    stream = TrainStream(sequences, trial.data, trial.model.rows, 16, seed=0)
    model = abstract_model(trial, sequences.schema, Popularity(stream.target_counts()))
    optimizer, rule = make_optimizer(trial.train, STEPS), make_row_rule(trial.train, STEPS)
    state = init_state(jax.tree.map(jnp.asarray, params), optimizer, 0, rule)
    if mesh is not None:
        state = jax.device_put(state, placed(mesh, state))
    step, losses = make_step(model, optimizer, 8, rule, mesh), []
    for _ in range(STEPS):
        state, metrics = step(state, next(stream))
        losses.append(float(metrics["loss"]))
    stream.close()
    arrays = jax.tree.leaves(state)
    held = sum(x.addressable_shards[0].data.nbytes for x in arrays) / sum(x.nbytes for x in arrays)
    return losses, [_moved(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state.params)], held


def _moved(path: tuple[Any, ...], x: jax.Array) -> np.ndarray:
    """A parameter, but for biases of a softmax's keys: it does not see what all keys have in common, so that their
    derivative is 0 but for rounding, of which AdamW makes whole steps."""
    here, name = np.array(x), jax.tree_util.keystr(path)
    if name.endswith("['project']['bias']"):
        width = len(here) // 3
        here[width : 2 * width] = 0
    return here


MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4")
CONTEXTS = ("data=2,context=4", "fsdp=4,context=2")
TENSORS = ("data=2,model=4", "fsdp=4,model=2")
RETRIEVAL = {"data.candidates": 1, "model.negatives": 4}
# (model, settings, meshes): dropout and negatives are drawn, tables by the row and whole. Rows do not divide evenly
# into the chunks of a context.
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("dlrm", {"train.embedding_optimizer": "rowwise_adagrad"}, (*MESHES, "data=4,context=2")),
    ("hstu", {"model.heads": 4}, (*MESHES, *CONTEXTS, *TENSORS, "data=2,context=2,model=2")),
    ("dirl", {"model.heads": 4}, (*MESHES, "data=2,fsdp=2,context=2", "data=2,fsdp=2,model=2")),
    ("hstu_retrieval", {"model.heads": 2, **RETRIEVAL}, MESHES),
    ("sasrec", {"model.heads": 4, **RETRIEVAL}, ("data=2,context=4", "data=2,context=2,model=2")),
    ("transformer", {"model.heads": 2}, ("data=4,context=2", "data=4,model=2")),
]


BY_HAND = {
    *("dlrm fsdp=8", "dlrm data=4,context=2", "dirl data=8", "dirl fsdp=8"),
    *("hstu fsdp=8", *(f"hstu {mesh}" for mesh in (*CONTEXTS, *TENSORS))),
    *("hstu_retrieval data=8", "hstu_retrieval fsdp=8"),
}
# As above, with tables that count as large; in a box there is room for so many rows, or as many as usual.
LENT: list[tuple[str, dict[str, Any], tuple[str, ...], int]] = [
    ("dlrm", {"train.embedding_optimizer": "rowwise_adamw"}, ("data=8", "data=2,fsdp=4"), 0),
    ("hstu", {"model.heads": 2, "train.embedding_optimizer": "rowwise_adagrad"}, ("data=2,context=2,model=2",), 2),
    (
        "hstu_retrieval",
        {**CASES[3][1], "train.embedding_optimizer": "rowwise_adagrad"},
        ("fsdp=8",),
        0,
    ),
]


def blank(trial: Trial, schema: Schema) -> Any:
    """Arrays of the parameters' shapes and dtypes."""
    shapes = jax.eval_shape(lambda: init_params(trial, schema))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def planned(mesh: Mesh, trial: Trial, schema: Schema) -> tuple[dict[str, float], Plan]:
    """Bytes of the collectives of what is compiled for a mesh, by kind, and of what is estimated for as many GPUs; and
    the plan of the compiled training step."""
    compiled = plans_on(mesh, trial, schema, parse_topology("v5e:2x4"), 10)
    estimated = estimated_plans(trial, schema, parse_topology("h100:8"), dict(mesh.shape), 10)
    found = {}
    for by, plans in (("", compiled), ("estimated ", estimated)):
        for program, plan in zip(PROGRAMS, plans, strict=True):
            for kind in KINDS:
                payload = sum(one.payload for one in plan.collectives if one.kind == kind)
                found[by + "scoring " * (program == "scoring") + kind] = payload
    differing = sum(estimated[0].state.values()) - sum(compiled[0].state.values())
    return found | {"estimated state": differing}, compiled[0]


def sent(mesh: Mesh) -> dict[str, float]:
    """What is :func:`planned` for DLRM, beside the bytes of its parameters."""
    trial = override(default_trial("dlrm"), {"train.batch_rows": 16, "model.width": 64, "data.history": 8})
    schema = Schema(items=1024, tasks=("click",))
    found, plan = planned(mesh, trial, schema)
    arrays = jax.tree.leaves(blank(trial, schema))
    divided = sum(x.nbytes for x in arrays if "fsdp" in share_of(mesh, x.shape))
    held = {"held": plan.state["parameters"] + plan.state["tables"]}
    return found | held | {"divided": divided, "whole": sum(x.nbytes for x in arrays) - divided}


def exchanged(mesh: Mesh) -> dict[str, float]:
    """What is :func:`planned` for HSTU, and the sizes of a hand count; dtype float32."""
    settings = {"train.batch_rows": 16, "train.pieces": 2, "model.width": 64, "model.depth": 3, "model.heads": 4}
    trial = override(default_trial("hstu"), {**settings, "data.history": 21})
    schema = Schema(items=1024, tasks=("click",))
    model: Any = abstract_model(trial, schema)
    params = blank(trial, schema)
    bytes_of: dict[tuple[bool, bool], float] = dict.fromkeys(itertools.product((False, True), repeat=2), 0.0)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        spec = share_of(mesh, x.shape, path)
        bytes_of[along(spec, "model") is not None, axis_of(path) is not None] += x.nbytes
    return planned(mesh, trial, schema)[0] | {
        "tokens": model.layout.row_tokens(trial.data.shape),
        "blocks": sum(x.nbytes for x in jax.tree.leaves(params["stack"]["blocks"])),
        "biases": sum(x.nbytes for block in params["stack"]["blocks"].values() for x in block["bias"].values()),
        "taken": bytes_of[True, True],
        "gathered": bytes_of[True, False],
        "whole": bytes_of[False, False] + bytes_of[False, True],
    }


def lent(mesh: Mesh) -> dict[str, float]:
    """What is :func:`planned` for DLRM, whose table is large, has a row-wise rule and is in bfloat16; beside it the
    bytes of its other parameters and the table's width."""
    row_wise = {"train.embedding_optimizer": "rowwise_adagrad", "train.embedding_precision": "bfloat16"}
    settings = {"train.batch_rows": 16, "model.width": 64, "data.history": 24, "data.candidates": 8, **row_wise}
    trial, schema = override(default_trial("dlrm"), settings), Schema(items=1024, tasks=("click",))
    found, plan = planned(mesh, trial, schema)
    params = blank(trial, schema)
    (table,) = (x for x in jax.tree.leaves(params) if x.dtype == "bfloat16")
    others = sum(x.nbytes for x in jax.tree.leaves(params)) - table.nbytes
    return found | {"table": plan.state["tables"], "of": table.nbytes, "width": table.shape[1], "others": others}


def compared(sequences: Sequences, name: str, settings: dict[str, Any], meshes: tuple[str, ...]) -> dict[str, Any]:
    """How far each mesh comes apart from one device."""
    settings = {"train.learning_rate": 0.003, "train.embedding_learning_rate": 0.003, "model.width": 16, **settings}
    trial = trial_of(sequences, name, **{"train.batch_rows": 16, "train.steps": STEPS, **settings})
    initial = jax.tree.map(np.asarray, init_params(trial, sequences.schema))
    one, found = trained(sequences, trial, initial, None), {}
    spread = max(one[0]) - min(one[0])
    for mesh in meshes:
        many = trained(sequences, trial, initial, make_mesh(parse_mesh(mesh)))
        loss = max(abs(a - b) / abs(a) for a, b in zip(one[0], many[0], strict=True))
        params = max(float(np.abs(a - b).max()) for a, b in zip(one[1], many[1], strict=True))
        found[f"{name} {mesh}"] = {"loss": loss, "params": params, "spread": spread, "held": many[2]}
    return found


def main(folder: Path, *, every: bool) -> dict[str, dict[str, float]]:
    sequences, found = random_dataset(folder / "log", users=60), {}
    for mesh in MESHES:
        found[f"sent {mesh}"] = sent(make_mesh(parse_mesh(mesh)))
    for mesh in ("data=2,context=4", "data=2,model=4"):
        found[f"exchanged {mesh}"] = exchanged(make_mesh(parse_mesh(mesh)))
    for name, settings, meshes in CASES:
        chosen = tuple(mesh for mesh in meshes if every or f"{name} {mesh}" not in BY_HAND)
        found |= compared(sequences, name, settings, chosen)
    embedding.LARGE, embedding.SPREAD = 16, 8
    for mesh in ("data=8", "data=2,fsdp=4"):
        found[f"lent {mesh}"] = lent(make_mesh(parse_mesh(mesh)))
    room_for = tables.room_for
    for name, settings, meshes, room in LENT:
        tables.room_for = (lambda *_, room=room: room) if room else room_for
        found |= {f"large {mesh}": case for mesh, case in compared(sequences, name, settings, meshes).items()}
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), every=sys.argv[2:] == ["--all"])))
