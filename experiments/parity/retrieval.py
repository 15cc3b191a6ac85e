"""Golden files of the public retrieval code: one batch through HSTU or SASRec."""

from pathlib import Path

import jax
import numpy as np

from experiments.parity import fields
from experiments.parity.case import GRADIENT, MODEL, OUTPUT, Arrays, Case, wanted
from experiments.parity.next_item import INPUTS, Rows, abstract_model, check_rows, given, is_sasrec, mean_loss, meta_of
from genrec_jax import interop


def read(file: Path, arrays: Arrays) -> Case:
    """in/ids, in/timestamps, in/lengths, in/negative_ids and parameters; out/encoder, out/loss and gradients."""
    fields.require(file, arrays, ("meta", *INPUTS, "out/encoder", "out/loss"))
    meta = meta_of(file, arrays)
    model = abstract_model(file, meta)
    users, places = len(arrays["in/lengths"]), meta["padded_len"]
    lengths = fields.integers(file, arrays, "in/lengths")
    rows = Rows(
        fields.integers(file, arrays, "in/ids", (users, places)),
        fields.integers(file, arrays, "in/timestamps", (users, places)),
        lengths,
        fields.integers(file, arrays, "in/negative_ids", (int(lengths.sum()), meta["num_negatives"])),
    )
    check_rows(file, meta, rows)
    batch, negatives, encoded = given(rows, target_encoded=is_sasrec(file, meta))
    outputs = {
        "out/encoder": fields.floats(file, arrays, "out/encoder", (users, places, meta["D"])),
        "out/loss": fields.floats(file, arrays, "out/loss", ()),
    }
    state = interop.from_reference(model, fields.under(arrays, "param"), f"{file}: param")
    gradients = fields.under(arrays, "grad")
    interop.from_reference(model, gradients, f"{file}: grad")  # checks names and shapes
    step = jax.jit(jax.value_and_grad(mean_loss(model), has_aux=True))

    def run(backend: str) -> Arrays:
        (value, states), grads = step(state, batch, negatives)
        out = {"out/encoder": np.where(encoded[..., None], states, 0), "out/loss": np.asarray(value)}
        return out | interop.to_reference(model, grads)

    return Case(run, wanted(outputs, OUTPUT), wanted(gradients, GRADIENT), MODEL)
