"""What golden files of retrieval and of its training share: the model, its rows and its loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.parity import fields
from experiments.parity.case import Arrays
from genrec_jax.batch import Batch, Candidates, Context, History, Shape
from genrec_jax.data.schema import Schema
from genrec_jax.errors import UserError
from genrec_jax.layouts import next_item
from genrec_jax.models.base import Build
from genrec_jax.models.hstu_retrieval import HSTURetrieval, HSTURetrievalConfig
from genrec_jax.models.retrieval import RESERVED, NextItemRetriever
from genrec_jax.models.sasrec import SASRec, SASRecConfig

INPUTS = ("in/ids", "in/timestamps", "in/lengths", "in/negative_ids")
SIZES = ("D", "blocks", "heads", "padded_len", "num_items", "num_negatives")


class Rows(NamedTuple):
    """A batch as its golden file has it.

    ids, timestamps: [B, n], the target at index ``length``, then zeros. lengths: [B]. negatives: [sum of lengths, R],
    those of the first user's positions first.
    """

    ids: np.ndarray
    timestamps: np.ndarray
    lengths: np.ndarray
    negatives: np.ndarray


class Given(NamedTuple):
    """The same for the model. negatives: [B, n, R]. encoded: bool [B, n], the places that the public code encodes."""

    batch: Batch
    negatives: np.ndarray
    encoded: np.ndarray


def abstract_model(file: Path, meta: dict[str, Any]) -> NextItemRetriever:
    """The model that ``meta`` describes, with shapes in place of arrays."""
    size = {name: fields.size(file, meta, name) for name in SIZES}
    if size["padded_len"] <= RESERVED:
        raise UserError(f"{file}: meta's padded_len must exceed {RESERVED}, it is {size['padded_len']}")
    temperature = fields.number(file, meta, "temperature")
    if temperature <= 0:
        raise UserError(f"{file}: meta's temperature must be positive, it is {temperature}")
    shared: dict[str, Any] = {
        "width": size["D"],
        "depth": size["blocks"],
        "heads": size["heads"],
        "dropout": 0.0,
        "negatives": size["num_negatives"],
        "temperature": temperature,
    }
    shape = Shape(size["padded_len"] - RESERVED, 1)
    build = Build(Schema(items=size["num_items"] + 1, tasks=()), shape, jnp.dtype("float32"))
    if is_sasrec(file, meta):
        if size["D"] % size["heads"]:
            raise UserError(f"{file}: meta's D ({size['D']}) must be a multiple of its heads ({size['heads']})")
        plain = SASRecConfig(**shared)
        return nnx.eval_shape(lambda: SASRec(plain, build, rngs=nnx.Rngs(0)))
    heads: dict[str, Any] = {"qk_width": fields.size(file, meta, "dqk"), "v_width": fields.size(file, meta, "dv")}
    config = HSTURetrievalConfig(**shared, **heads)
    return nnx.eval_shape(lambda: HSTURetrieval(config, build, rngs=nnx.Rngs(0)))


def is_sasrec(file: Path, meta: dict[str, Any]) -> bool:
    """Which model ``meta`` is about; the other one is HSTU."""
    kind = str(meta["kind"]).split("_")[0]
    if kind not in ("hstu", "sasrec"):
        raise UserError(f"{file}: meta's kind must begin with hstu or sasrec, it is {meta['kind']!r}")
    return kind == "sasrec"


def check_rows(file: Path, meta: dict[str, Any], rows: Rows) -> None:
    """Refuses ids and lengths that cannot be."""
    places, ends = np.arange(rows.ids.shape[1]), rows.lengths[:, None]
    if (rows.lengths < 0).any() or (rows.lengths >= rows.ids.shape[1]).any():
        raise UserError(f"{file}: in/lengths must leave a place for the target in {rows.ids.shape[1]} places")
    items = meta["num_items"]
    if not np.where(places <= ends, (rows.ids >= 1) & (rows.ids <= items), rows.ids == 0).all():
        raise UserError(f"{file}: in/ids must be items from 1 to {items} up to the target, and 0 after it")
    if len(rows.negatives) < rows.lengths.sum():
        raise UserError(f"{file}: in/negative_ids must have a row for each of {rows.lengths.sum()} positions")
    if (rows.negatives < 1).any() or (rows.negatives > items).any():
        raise UserError(f"{file}: in/negative_ids must be items from 1 to {items}")
    if (rows.timestamps < 0).any() or (rows.timestamps >= 2**31).any():
        raise UserError(f"{file}: in/timestamps must be seconds below 2**31")


def given(rows: Rows, *, target_encoded: bool) -> Given:
    """The rows as a batch. The public code runs SASRec over the target too (``target_encoded``), HSTU over the history
    alone; the target is a candidate then."""
    batch, n = rows.ids.shape
    ids, times = rows.ids.astype(np.int32), rows.timestamps.astype(np.int32)
    encoded = np.arange(n) < rows.lengths[:, None] + target_encoded
    segment = encoded.astype(np.int32)
    end = (np.arange(batch), rows.lengths)
    labels, shown = np.zeros((batch, n, 0), np.uint8), np.full((batch, 1), int(not target_encoded), np.int32)
    history = History(ids * segment, times * segment, labels, segment, encoded, np.zeros_like(ids), {})
    candidates = Candidates(ids[end][:, None], times[end][:, None], labels[:, :1], shown, np.zeros_like(shown), {})
    negatives = np.zeros((batch, n, rows.negatives.shape[1]), np.int32)
    negatives[np.arange(n) < rows.lengths[:, None]] = rows.negatives[: rows.lengths.sum()]
    return Given(Batch(np.arange(batch, dtype=np.int32)[:, None], Context({}), history, candidates), negatives, encoded)


def mean_loss(model: NextItemRetriever) -> Callable[[nnx.State, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """(parameters, batch, negatives) -> the mean loss over all positions, and the states [B, n, D]."""
    graph = nnx.graphdef(model)

    def loss(state: nnx.State, batch: Batch, negatives: jax.Array) -> tuple[jax.Array, jax.Array]:
        ours, rows = nnx.merge(graph, state), next_item(batch)
        states = ours.states(batch, rows, None)
        total, count = ours.sampled_loss(states, rows.target, negatives)
        return total / count, states

    return loss


def meta_of(file: Path, arrays: Arrays) -> dict[str, Any]:
    return fields.meta(file, arrays, ("kind", *SIZES, "temperature"))
