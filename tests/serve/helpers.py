"""Scorers of tiny models, and the requests that a Batch holds."""

import functools

import numpy as np
from flax import nnx

from genrec_jax.batch import Shape
from genrec_jax.serve import Events, Request, Scorer
from genrec_jax.serve.programs import Programs
from genrec_jax.serve.scorer import Shapes
from tests.models.gr_helpers import RANKERS, SCHEMA, initialised, jit

HISTORY = 40


@functools.cache
def model_of(name):
    """(model, its parameters as a pure tree, the jitted logits of a Batch)."""
    model = initialised(RANKERS[name], Shape(HISTORY, 1))
    graph, state = nnx.split(model)
    score = jit(lambda state, batch: nnx.merge(graph, state)(batch))
    return model, nnx.to_pure_dict(nnx.state(model, nnx.Param)), lambda batch: np.asarray(score(state, batch))


@functools.cache
def programs_of(name, kind):
    """Shared by all tests: compiled once."""
    return Programs(model_of(name)[0], kind)


def scorer_of(name, *, kind="float32", microbatch=4, lanes=3, cache_bytes=1 << 24, smallest=HISTORY):
    """One capacity, unless ``smallest`` is less: fewer programs to compile."""
    model, params, _ = model_of(name)
    shapes = Shapes(HISTORY, microbatch, lanes, model.layout.per_event, model.layout.context, smallest)
    return Scorer(programs_of(name, kind), params, SCHEMA, shapes, cache_bytes=cache_bytes)


def requests_of(batch, shown_together=None):
    """The requests of a Batch, row by row and segment by segment, each of a user of its own."""
    h, c = batch.history, batch.candidates
    found = []
    for row in range(len(h.item)):
        for segment in range(1, batch.user.shape[1] + 1):
            past, shown = h.segment[row] == segment, c.segment[row] == segment
            if not shown.any():
                continue
            ids = np.arange(1, past.sum() + 1) if shown_together is None else shown_together[row][: past.sum()]
            events = Events(
                h.item[row, past],
                h.time[row, past],
                h.labels[row, past],
                np.asarray(ids, np.int64),
                {name: x[row, past] for name, x in h.features.items()},
            )
            found.append(
                Request(
                    item=c.item[row, shown],
                    features={name: x[row, shown] for name, x in c.features.items()},
                    time=int(c.time[row, shown][0]),
                    context={name: x[row, segment - 1] for name, x in batch.context.features.items()},
                    events=events,
                    user=f"row {row}, segment {segment}",
                )
            )
    return found
