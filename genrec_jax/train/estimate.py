"""What a trial will cost, known before it runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch, Candidates, Context, Filled, History, Shape
from genrec_jax.config import Trial
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.data.sequences import load
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import Build, Ranker, Retriever
from genrec_jax.models.registry import Model
from genrec_jax.nn.cost import Cost
from genrec_jax.nn.embedding import tables
from genrec_jax.retrieval_loss import Popularity
from genrec_jax.train.hardware import matmul_peak
from genrec_jax.train.rows import is_rows

# Only for the expected time of a dry run: what a step costs besides its products, and the share of the machine's matmul
# rate these reach. Measured over the comparison's ladder on a CPU, where shares lie between 0.14 and 0.6 by family.
_STEP_SECONDS = 0.003
_TYPICAL_UTILISATION = 0.25


@dataclasses.dataclass(frozen=True)
class Account:
    """A trial's entry on the compute axis; every count is for the whole run unless its name says otherwise.

    steps, rows, targets: trained. flops_per_target: training FLOPs (3 x forward) per supervised target.
    flops_per_candidate: forward FLOPs per scored candidate, the loss left out, when a ranker scores a request of K
    candidates, or a retriever every item of the corpus for one user. train_flops: 3 x forward FLOPs of every row
    trained, its loss and padding included, but for rows that packing leaves empty. active_params: dense parameters plus
    the embedding scalars that a trained row reads, at most as many as the tables hold. memory_bytes: parameters,
    gradients, the optimiser's moments and one batch's activations.
    """

    steps: int
    rows: int
    targets: int
    flops_per_target: float
    flops_per_candidate: float
    train_flops: float
    dense_params: int
    embedding_params: int
    active_params: int
    activation_bytes: float
    memory_bytes: float

    def after(self, steps: int) -> "Account":
        """The account of a run that ended after ``steps`` steps."""
        share = steps / self.steps
        return dataclasses.replace(
            self,
            steps=steps,
            rows=round(self.rows * share),
            targets=round(self.targets * share),
            train_flops=self.train_flops * share,
        )


def abstract_model(trial: Trial, schema: Schema, popularity: Popularity | None = None) -> Model:
    """The trial's model with shapes in place of parameters: it states its cost, and runs once parameters are bound.

    ``popularity``: of the training targets, which a loss may need.
    Raises UserError for a ranker on a dataset without labels, and for items that share more rows than they are.
    """
    if trial.model.goal == "ranking" and not schema.tasks:
        raise UserError(
            f"model {trial.model.name!r} ranks by labels and the dataset has none: import it with --label, or use "
            "hstu_retrieval or sasrec"
        )
    if trial.model.item_rows >= schema.items:
        raise UserError(
            f"configuration key 'model.item_rows' ({trial.model.item_rows}) must be less than the dataset's items "
            f"({schema.items}), or 0 for a row per item"
        )
    return nnx.eval_shape(lambda: _build(trial, schema, nnx.Rngs(0), popularity))


def abstract_batch(schema: Schema, shape: Shape, rows: int) -> Batch:
    """The shapes of a batch of so many ``rows``, [rows, ...]; see `genrec_jax.batch`."""

    def array(width: int, *more: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, width, *more), dtype)

    def features(kinds: tuple[Feature, ...], width: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {f.name: array(width, *([f.width] if f.width > 1 else [])) for f in kinds}

    def events(width: int) -> dict[str, Any]:
        whole = {name: array(width) for name in ("item", "time", "segment", "before")}
        labels = array(width, len(schema.tasks), dtype=jnp.uint8)
        return whole | {"labels": labels, "features": features(schema.item_features, width)}

    past, slots = shape.history, shape.slots
    return Batch(
        user=array(shape.segments),
        context=Context(features(schema.context_features, shape.segments)),
        history=History(**events(past), supervised=array(past, dtype=jnp.bool_)),
        candidates=Candidates(**events(slots)),
    )


def init_params(trial: Trial, schema: Schema) -> Any:
    """The trial's initial parameters, a pure tree."""
    return make_init(trial, schema)(trial.seed)


def make_init(trial: Trial, schema: Schema) -> Callable[[int], Any]:
    """From a seed to the initial parameters. The seed is an argument of the compiled program, not part of it."""

    def init(key: jax.Array) -> Any:
        params = nnx.to_pure_dict(nnx.state(_build(trial, schema, nnx.Rngs(key)), nnx.Param))
        return jax.tree_util.tree_map_with_path(kept, params)

    def kept(path: tuple, value: jax.Array) -> jax.Array:
        return value.astype(trial.train.embedding_precision) if is_rows(path) else value

    compiled = jax.jit(init)
    return lambda seed: compiled(jax.random.key(seed))


def _build(trial: Trial, schema: Schema, rngs: nnx.Rngs, popularity: Popularity | None = None) -> Model:
    build = Build(schema, trial.data.shape, jnp.dtype(trial.train.precision), popularity)
    return registry.build(trial.model, build, rngs=rngs)


def train_steps(trial: Trial, stream: TrainStream) -> int:
    batches = stream.passes.rows(trial.train.epochs) / trial.train.batch_rows
    return trial.train.steps or max(1, round(batches))


def account(trial: Trial, model: Model, stream: TrainStream) -> Account:
    """Adds up the blocks' own statements of cost.

    A row alone is charged at its static shape; packed rows have the pairs of the segments that are really packed.
    """
    steps = train_steps(trial, stream)
    rows = steps * trial.train.batch_rows
    tally = stream.passes.tally(rows)
    shape = trial.data.shape
    occupied = rows * (tally.occupied / tally.rows)
    if shape.segments > 1:
        means = (x / occupied for x in (tally.segments, tally.events, tally.squares))
        shape = dataclasses.replace(shape, filled=Filled(*means))
    row = model.cost(shape)
    targets = round(tally.targets)
    train_flops = 3.0 * row.flops * occupied
    return Account(
        steps=steps,
        rows=rows,
        targets=targets,
        flops_per_target=train_flops / max(targets, 1),
        flops_per_candidate=flops_per_candidate(trial, model),
        train_flops=train_flops,
        dense_params=row.dense_params,
        embedding_params=row.embedding_params,
        active_params=row.active_params,
        activation_bytes=row.activation_bytes * trial.train.batch_rows,
        memory_bytes=_memory(trial, model, row),
    )


def flops_per_candidate(trial: Trial, model: Model) -> float:
    """Forward FLOPs of scoring one of a ranker's K candidates, or one of a retriever's corpus."""
    flops = scoring_flops(model, Shape(trial.data.history, trial.data.candidates))
    return flops / (trial.data.candidates if isinstance(model, Ranker) else corpus(model)[0] - 1)


def scoring_flops(model: Model, shape: Shape) -> float:
    """Forward FLOPs of scoring a row's candidates, or the whole corpus for each of its segments.

    A retriever embeds a user once and takes a dot product per item. No training loss is in either.
    """
    cost = model.cost(shape)
    forward = cost.flops - cost.loss_flops
    if isinstance(model, Ranker):
        return forward
    rows, width = corpus(model)
    return forward + 2.0 * shape.segments * width * (rows - 1)


def corpus(model: Retriever) -> tuple[int, int]:
    """The shape of all items' vectors; row 0 is padding, not an item."""
    graph, params = nnx.split(model)
    rows, width = jax.eval_shape(lambda p: nnx.merge(graph, p).items(), params).shape
    return rows, width


def _memory(trial: Trial, model: Model, row: Cost) -> float:
    """In float32: AdamW keeps two moments; a row-wise rule one per row, rowwise_adamw one per entry beside it, and of
    gradients those of the rows at hand."""
    rule, batch_rows = trial.train.embedding_optimizer, trial.train.batch_rows
    held = 16.0 * row.dense_params + row.activation_bytes * batch_rows
    if rule == "adamw":
        return held + 16.0 * row.embedding_params
    at_hand = min(row.embedding_reads * batch_rows, row.embedding_params)
    per_entry = jnp.dtype(trial.train.embedding_precision).itemsize + (4.0 if rule == "rowwise_adamw" else 0.0)
    return held + per_entry * row.embedding_params + 4.0 * sum(t.vocab for t in tables(model).values()) + 8.0 * at_hand


def plan_account(trial: Trial) -> Account:
    """Counts a trial without allocating its parameters or touching a device.

    Raises UserError for a missing dataset or impossible shape.
    """
    sequences = load(trial.data.path)
    stream = TrainStream(sequences, trial.data, trial.model.rows, trial.train.batch_rows, seed=trial.seed)
    return account(trial, abstract_model(trial, sequences.schema), stream)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """For a dry run: training FLOPs, bytes, and expected seconds on this machine."""

    flops: float
    memory_bytes: float
    seconds: float


def estimate(trial: Trial) -> Estimate:
    """As :func:`plan_account`, with a rough time from the matmul rate that it measures on the default device."""
    counts = plan_account(trial)
    products = counts.train_flops / (_TYPICAL_UTILISATION * matmul_peak(trial.train.precision))
    seconds = counts.steps * _STEP_SECONDS + products
    return Estimate(counts.train_flops, counts.memory_bytes, seconds)
