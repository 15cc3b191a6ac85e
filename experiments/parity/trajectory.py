"""Golden files of training: AdamW on a retrieval model, step by step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.parity import fields
from experiments.parity.case import LOSS_STEP, MODEL, TRAINED, Arrays, Case, wanted
from experiments.parity.next_item import INPUTS, Rows, abstract_model, check_rows, given, is_sasrec, mean_loss, meta_of
from genrec_jax import interop
from genrec_jax.batch import Batch
from genrec_jax.errors import UserError


def read(file: Path, arrays: Arrays) -> Case:
    """A batch per step under in/ and the first parameters; the loss before each step and the last parameters.

    Weight decay is decoupled and falls on every parameter, biases and tables included.
    """
    fields.require(file, arrays, ("meta", *INPUTS, "out/losses"))
    meta = meta_of(file, arrays) | fields.meta(file, arrays, ("steps", "lr", "betas", "eps", "weight_decay"))
    optimizer = _optimizer(file, meta)
    model = abstract_model(file, meta)
    batches = _batches(file, arrays, meta, target_encoded=is_sasrec(file, meta))
    losses = fields.floats(file, arrays, "out/losses", (len(batches),))
    start = interop.from_reference(model, fields.under(arrays, "param"), f"{file}: param")
    final = fields.under(arrays, "final")
    interop.from_reference(model, final, f"{file}: final")  # checks names and shapes
    mean = mean_loss(model)

    @jax.jit
    def step(
        state: nnx.State, moments: optax.OptState, batch: Batch, negatives: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        (loss, _), grads = jax.value_and_grad(mean, has_aux=True)(state, batch, negatives)
        updates, moments = optimizer.update(grads, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    def run(backend: str) -> Arrays:
        state, moments, found = start, optimizer.init(start), []
        for batch, negatives in batches:
            state, moments, loss = step(state, moments, batch, negatives)
            found.append(loss)
        return {"out/losses": np.asarray(jnp.stack(found)), **interop.to_reference(model, state)}

    return Case(run, wanted({"out/losses": losses}, LOSS_STEP), wanted(final, TRAINED), MODEL)


def _optimizer(file: Path, meta: dict) -> optax.GradientTransformation:
    """The AdamW that ``meta`` describes, at a constant rate and without clipping."""
    if meta.get("optimizer", "adamw") != "adamw":
        raise UserError(f"{file}: meta's optimizer must be adamw, it is {meta['optimizer']!r}")
    betas = meta["betas"]
    if not isinstance(betas, list) or len(betas) != 2:
        raise UserError(f"{file}: meta's betas must be two numbers, they are {betas!r}")
    named = {"b1": betas[0], "b2": betas[1]}
    b1, b2 = (fields.number(file, named, name) for name in named)
    rate, eps, decay = (fields.number(file, meta, name) for name in ("lr", "eps", "weight_decay"))
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)


def _batches(file: Path, arrays: Arrays, meta: dict, *, target_encoded: bool) -> list[tuple[Batch, np.ndarray]]:
    """The batch and the negatives of each step."""
    steps = fields.size(file, meta, "steps")
    lengths, negatives = arrays["in/lengths"], arrays["in/negative_ids"]
    if lengths.ndim != 2 or negatives.ndim != 3:
        raise UserError(f"{file}: in/lengths must be [steps, B] and in/negative_ids [steps, positions, R]")
    users, places = lengths.shape[1], meta["padded_len"]
    shapes = {
        "in/ids": (steps, users, places),
        "in/timestamps": (steps, users, places),
        "in/lengths": (steps, users),
        "in/negative_ids": (steps, negatives.shape[1], meta["num_negatives"]),
    }
    found = [fields.integers(file, arrays, name, shape) for name, shape in shapes.items()]
    rows = [Rows(*(array[i] for array in found)) for i in range(steps)]
    for row in rows:
        check_rows(file, meta, row)
    return [given(row, target_encoded=target_encoded)[:2] for row in rows]
