"""Coordinate check: does anything in a model grow or vanish with its width while it learns?

    python -m experiments.coordinate_check DATA --out docs/mup

Trains every generative ranker for a few steps at widths of 32 to 1,024, by the standard parametrisation and by muP, and
writes how far its tokens, the products of its queries and keys, the output of each block and its logits have moved
(coordinates.csv), with a figure. Under muP every line is level (Yang et al., "Tensor Programs V", 2022, appendix D.1),
but for the products in one head that grows with the model, which fall (docs/mup.md).
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from genrec_jax.batch import Batch
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.catalog import load_any
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import load
from genrec_jax.errors import UserError
from genrec_jax.layouts import join
from genrec_jax.models.sequence import SequenceRanker
from genrec_jax.models.transformer import Transformer
from genrec_jax.nn.hstu import HSTUBlock
from genrec_jax.nn.sasrec import SASRecBlock
from genrec_jax.train.estimate import abstract_model, make_init
from genrec_jax.train.optimizer import make_optimizer, scalars
from genrec_jax.train.step import State, bind, init_state, trial_step
from kernels_pallas.hstu_attention import TIME_BUCKETS, heads_apart, plan

WIDTHS = (32, 64, 128, 256, 512, 1024)
BASE = 32
MODELS = ("hstu", "dirl", "transformer")
Heads = Literal["one head", "heads of 32"]
Parametrisation = Literal["standard", "muP"]
HEADS: tuple[Heads, ...] = get_args(Heads)
PARAMETRISATIONS: tuple[Parametrisation, ...] = get_args(Parametrisation)
# A constant rate, so that every step counts; large enough to move things in a few steps.
TRAINING = {"train.learning_rate": 0.01, "train.embedding_learning_rate": 0.02, "train.warmup": 0.0}
SIZES = {"model.depth": 2, "model.dropout": 0.0, "train.decay": "constant", "data.history": 32, "train.batch_rows": 8}


@dataclasses.dataclass(frozen=True)
class Movement:
    """What a quantity of a model moved by in ``steps`` steps: the root mean square over its entries."""

    model: str
    parametrisation: Parametrisation
    heads: Heads
    width: int
    seed: int
    quantity: str
    steps: int
    moved: float


def check_trial(model: str, width: int, parametrisation: Parametrisation, heads: Heads, seed: int) -> Trial:
    """The trial of a model at a width."""
    sizes = {"model.width": width, "model.heads": 1 if heads == "one head" else max(1, width // BASE), "seed": seed}
    base = {"model.base_width": BASE} if parametrisation == "muP" else {}
    return override(default_trial(model), {**SIZES, **TRAINING, **sizes, **base})


def quantities(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """What is watched of a ranker on a batch, by name; what padding holds is left out."""
    ranker: SequenceRanker = model.ranker if isinstance(model, Transformer) else model
    tokens = ranker.layout.tokens(batch)
    real = (tokens.segment > 0)[..., None]
    x = jnp.where(real, join(*ranker.prefix(batch), ranker.candidate_tokens(batch)), 0)
    longest = ranker.stack.longest
    pairs = plan(tokens, positions=longest, buckets=TIME_BUCKETS if longest else 0)
    found = {"tokens": x}
    for n, block in enumerate(ranker.stack.blocks, 1):
        assert not isinstance(block, SASRecBlock)
        if isinstance(block, HSTUBlock):
            _, _, *apart = block.projections(x)
            (q, k), scale = map(heads_apart, apart), block.alpha
        else:
            (q, k, _), scale = block.projections(x), block.scale
        both = real[:, None, :, 0, None] & real[:, None, None, :, 0]
        found[f"q.k of block {n}"] = jnp.where(both, scale * jnp.einsum("bthd,bshd->bhts", q, k), 0)
        x = jnp.where(real, block(x, pairs), 0)
        found[f"block {n}"] = x
    return found | {"logits": jnp.where(batch.candidates.segment[..., None] > 0, model(batch), 0)}


# A program of a few runs spends its time in the compiler.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def movements(trial: Trial, schema: Schema, batch: Batch, steps: int) -> dict[str, list[float]]:
    """By quantity, how far it has moved on a batch after each of the ``steps`` that train on that batch."""
    model, optimizer = abstract_model(trial, schema), make_optimizer(trial.train, steps)
    init, training = make_init(trial, schema), trial_step(model, trial.train, steps)

    def watched(params: Any) -> dict[str, jax.Array]:
        return quantities(bind(model, params), batch)

    @_jit
    def begun() -> tuple[State, dict[str, jax.Array]]:
        state = init_state(init(trial.seed), optimizer, trial.seed)
        return state, watched(state.params)

    @_jit
    def step(state: State, first: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        state, _ = training(state, batch, scalars(trial.train))
        return state, jax.tree.map(lambda now, was: jnp.sqrt(jnp.mean((now - was) ** 2)), watched(state.params), first)

    state, first = begun()
    found = []
    for _ in range(steps):
        state, moved = step(state, first)
        found.append(jax.device_get(moved))
    return {name: [float(each[name]) for each in found] for name in first}


def slopes(widths: Sequence[int], moved: Sequence[float]) -> float:
    """The power of the width by which a movement grows: the slope of its logarithm."""
    return float(np.polyfit(np.log(widths), np.log(moved), 1)[0])


def measured(data: Path, models: Sequence[str], widths: Sequence[int], steps: int, seed: int) -> Iterator[Movement]:
    """Every model at every width, in both parametrisations, with one head and with more of them."""
    sequences = load(load_any(data))
    for model, by in itertools.product(models, PARAMETRISATIONS):
        for heads in HEADS:
            for width in widths:
                trial = check_trial(model, width, by, heads, seed)
                with_data = override(trial, {"data.path": str(data)})
                stream = TrainStream(sequences, with_data.data, trial.model.rows, trial.train.batch_rows, seed=seed)
                batch = next(stream)
                stream.close()
                for name, values in movements(with_data, sequences.schema, batch, steps).items():
                    yield Movement(model, by, heads, width, seed, name, steps, values[-1])


def draw(rows: Sequence[Movement]) -> str:
    """SVG: a panel per model and parametrisation; a line per quantity and kind of heads."""
    from matplotlib.figure import Figure

    from scaling.style import COLOURS, SOFT, log_x, log_y, render, styled

    def drawn() -> str:
        models = list(dict.fromkeys(row.model for row in rows))
        figure = Figure(figsize=(7.2, 2.6 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), 2, sharex=True, sharey=True, squeeze=False)
        names = list(dict.fromkeys(row.quantity for row in rows))
        for (line, model), (column, by) in itertools.product(enumerate(models), enumerate(PARAMETRISATIONS)):
            axes = panels[line, column]
            axes.set_title(f"{model}, {by}")
            log_x(axes, min(row.width for row in rows) * 0.9, max(row.width for row in rows) * 1.1)
            log_y(axes, *(f(row.moved for row in rows) for f in (min, max)))
            for (n, name), (style, heads) in itertools.product(
                enumerate(names), (("-", "heads of 32"), ("--", "one head"))
            ):
                own = [r for r in rows if (r.model, r.parametrisation, r.heads, r.quantity) == (model, by, heads, name)]
                label = f"{name}, {heads}" if heads == "heads of 32" else None
                x, y = [r.width for r in own], [r.moved for r in own]
                axes.plot(
                    x, y, style, color=(*COLOURS, SOFT)[n % 8], marker="o", markersize=3, linewidth=1.2, label=label
                )
            axes.grid(True, linewidth=0.5, alpha=0.5)
        for axes in panels[-1]:
            axes.set_xlabel("width")
        for axes in panels[:, 0]:
            axes.set_ylabel(f"moved in {rows[0].steps} steps (r.m.s.)")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        short = [label.removesuffix(", heads of 32") for label in labels]
        figure.legend(handles, short, frameon=False, loc="outside lower center", ncols=4)
        return render(figure, "How far a model's quantities move in a few steps, by width")

    return styled(drawn)()


def write(rows: Sequence[Movement], out: Path) -> None:
    """``coordinates.csv`` and ``coordinates.svg`` in OUT."""
    from scaling.table import rows_to_csv

    out.mkdir(parents=True, exist_ok=True)
    records = [dataclasses.asdict(row) for row in rows]
    (out / "coordinates.csv").write_text(rows_to_csv(list(records[0]), records), encoding="utf-8")
    (out / "coordinates.svg").write_text(draw(rows), encoding="utf-8")


def summary(rows: Sequence[Movement]) -> Iterator[str]:
    """A line per model, parametrisation, heads and quantity: the power of the width by which it moves."""
    groups: dict[tuple[str, ...], list[Movement]] = {}
    for row in rows:
        groups.setdefault((row.model, row.parametrisation, row.heads, row.quantity), []).append(row)
    for key, own in groups.items():
        power = slopes([row.width for row in own], [row.moved for row in own])
        yield f"{key[0]:12} {key[1]:9} {key[2]:12} {key[3]:16} width^{power:+.2f}"


def main(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    models: tuple[str, ...] = MODELS,
    widths: tuple[int, ...] = WIDTHS,
    steps: int = 4,
    seed: int = 0,
) -> int:
    """Check MODELS at WIDTHS on DATA (a dataset folder, or that of a known raw dataset)."""
    try:
        rows = list(measured(data, models, widths, steps, seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(rows, out)
    print("\n".join(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
