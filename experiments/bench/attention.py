"""Times HSTU attention on this machine: the XLA backend against the dense reference, packed against padded rows.

Forward and backward pass with one float32 head width, plan included. The contestants of a line run in turns in one
process, so that a busy machine slows them alike; the ratio is the median of the rounds' ratios.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.bench.retrieval_step import SCHEMA, make_batch
from genrec_jax.config import default_trial, override
from genrec_jax.train.estimate import abstract_model, init_params
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.step import init_state, make_step
from kernels_pallas.hstu_attention import TIME_BUCKETS, Tokens, hstu_attention, jagged_tokens, padded_tokens, plan

HEADS, WIDTH = 2, 32
LENGTHS = (512, 1024, 2048, 4096)
MEMORY_LENGTHS = (4096, 16384)
TRAINED = ("hstu_retrieval", "hstu", "dirl")
DENSE_PAIRS = 2**24  # rows · T²; above it the reference's squares leave no room for the neighbours of a shared machine
REPEATS = 5

Step = Callable[[], Any]


def seconds_of_events(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """int32 times along the last axis whose gaps spread from seconds to months."""
    gaps = np.exp(3 * np.random.default_rng(seed).normal(size=shape) + 4).clip(max=1e6)
    return jnp.asarray((gaps.cumsum(axis=-1) % 2**31).astype(np.int32))


def make_pass(tokens: Tokens, longest: int, backend: str, biased: bool) -> tuple[Step, int]:
    """(one compiled forward and backward pass, its temporary bytes); ``longest``: divisor and reach of the tables."""
    batch, length = tokens.segment.shape
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, batch, length, HEADS, WIDTH))
    sizes = {"position": 2 * longest - 1, "time": TIME_BUCKETS} if biased else {}
    tables = {name: 0.1 * jax.random.normal(jax.random.key(1), (size,)) for name, size in sizes.items()}

    def run(tokens: Tokens, cotangent: jax.Array, *inputs: Any) -> Any:
        pairs = plan(
            tokens,
            positions=longest if biased else 0,
            buckets=TIME_BUCKETS if biased else 0,
            implementation=backend,
        )

        def call(q: jax.Array, k: jax.Array, v: jax.Array, tables: dict[str, jax.Array]) -> jax.Array:
            position, seconds = tables.get("position"), tables.get("time")
            return hstu_attention(q, k, v, pairs, max_len=longest, position_bias=position, time_bias=seconds)

        out, pull = jax.vjp(call, *inputs)
        return out, pull(cotangent)

    arguments = (tokens, cotangent, q, k, v, tables)
    compiled = jax.jit(run).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    return functools.partial(compiled, *arguments), memory.temp_size_in_bytes


def full_rows(batch: int, length: int) -> Tokens:
    return padded_tokens(jnp.full(batch, length, jnp.int32), length, timestamps=seconds_of_events((batch, length)))


def in_turns(steps: dict[str, Step], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each step in each of ``repeats`` rounds; the round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def versus(steps: dict[str, Step]) -> tuple[float, float, float]:
    """Median seconds of the two steps, and the median over rounds of first over second."""
    slow, fast = in_turns(steps).values()
    return statistics.median(slow), statistics.median(fast), statistics.median(s / f for s, f in zip(slow, fast))


def against_reference() -> Iterator[dict[str, Any]]:
    """One row of the table per number of rows, length and bias."""
    for batch in (1, 4):
        for length in LENGTHS:
            if batch * length**2 > DENSE_PAIRS:
                continue
            for biased in (False, True):
                built = {b: make_pass(full_rows(batch, length), length, b, biased) for b in ("reference", "xla")}
                reference, xla, ratio = versus({name: step for name, (step, _) in built.items()})
                yield {
                    "batch": batch,
                    "length": length,
                    "biased": biased,
                    "reference_ms": 1e3 * reference,
                    "xla_ms": 1e3 * xla,
                    "ratio": ratio,
                    "reference_mib": built["reference"][1] / 2**20,
                    "xla_mib": built["xla"][1] / 2**20,
                }


def packed_against_padded(sequences: int = 64, mean: int = 256) -> dict[str, float]:
    """Sequences of geometric lengths, both biases, in one packed row and in one padded row each."""
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / mean, sequences), 4 * mean)
    longest, total = int(lengths.max()), int(lengths.sum())
    times = seconds_of_events((sequences, longest))
    flat = jnp.concatenate([times[b, :n] for b, n in enumerate(lengths)])
    offsets = jnp.asarray(np.concatenate([[0], lengths.cumsum()]), jnp.int32)
    packed = jagged_tokens(offsets, total, timestamps=flat)
    padded = padded_tokens(jnp.asarray(lengths, jnp.int32), longest, timestamps=times)
    built = {
        "padded": make_pass(padded, longest, "xla", True),
        "packed": make_pass(packed, longest, "xla", True),
    }
    slow, fast, ratio = versus({name: step for name, (step, _) in built.items()})
    return {
        "tokens": total,
        "longest": longest,
        "padded_ms": 1e3 * slow,
        "packed_ms": 1e3 * fast,
        "ratio": ratio,
        "padded_mib": built["padded"][1] / 2**20,
        "packed_mib": built["packed"][1] / 2**20,
    }


def _peak_bytes() -> int:
    """High-water mark of resident memory; unlike `getrusage` it forgets what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _measure(what: Callable[..., dict[str, float]], arguments: tuple[Any, ...], results: Any) -> None:
    results.put(what(*arguments))


def in_fresh_process(what: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """``what(*arguments)`` in a process of its own, whose high-water mark of memory is its alone."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(what, arguments, results))
    process.start()
    found: dict[str, float] = results.get()
    process.join()
    return found


def attention_memory(length: int) -> dict[str, float]:
    """Temporary memory of one biased row, and by how much running it raised the process's peak; both in MiB."""
    step, temporary = make_pass(full_rows(1, length), length, "xla", True)
    before = _peak_bytes()
    start = time.perf_counter()
    jax.block_until_ready(step())
    return {
        "temporary_mib": temporary / 2**20,
        "rise_mib": (_peak_bytes() - before) / 2**20,
        "peak_mib": _peak_bytes() / 2**20,
        "seconds": time.perf_counter() - start,
    }


def training_step(model: str, history: int) -> dict[str, float]:
    """A step of a model (2 layers, width 64, 2 heads) on one row of ``history`` events; a ranker has one task."""
    schema = dataclasses.replace(SCHEMA, tasks=() if model == "hstu_retrieval" else ("click",))
    values = {
        "data.history": history,
        "data.candidates": 1,
        "model.width": 64,
        "model.depth": 2,
        "model.heads": 2,
        "train.batch_rows": 1,
    }
    trial = override(default_trial(model), values)
    optimizer = make_optimizer(trial.train, 1000)
    state = init_state(init_params(trial, schema), optimizer, 0)
    advance = make_step(abstract_model(trial, schema), optimizer)
    batch = make_batch(jax.random.key(1), rows=1, length=history, tasks=len(schema.tasks))
    times = []
    for round_ in range(4):  # the first round compiles
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(advance(state, batch))
        if round_:
            times.append(time.perf_counter() - start)
    if not np.isfinite(metrics["loss"]):
        raise FloatingPointError(f"loss {metrics['loss']}")
    return {"seconds": statistics.median(times), "peak_mib": _peak_bytes() / 2**20}


@dataclasses.dataclass
class Found:
    """What has been measured so far; memory by length, training by model and length."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    packed: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    training: dict[tuple[str, int], dict[str, float]] = dataclasses.field(default_factory=dict)


def run(found: Found) -> Iterator[str]:
    """Measures into ``found``, and yields one line per measurement."""
    for row in against_reference():
        found.rows.append(row)
        yield (
            f"B={row['batch']} N={row['length']} {'both biases' if row['biased'] else 'no bias'}: {row['ratio']:.1f}x "
            f"the reference ({row['xla_ms']:.1f} against {row['reference_ms']:.1f} ms), "
            f"temporaries {row['xla_mib']:.0f} against {row['reference_mib']:.0f} MiB"
        )
    packed = found.packed = packed_against_padded()
    yield (
        f"64 sequences, {packed['tokens']:,.0f} tokens, longest {packed['longest']:.0f}, both biases: packed "
        f"{packed['ratio']:.1f}x the padded rows ({packed['packed_ms']:.0f} against {packed['padded_ms']:.0f} ms), "
        f"temporaries {packed['packed_mib']:.0f} against {packed['padded_mib']:.0f} MiB"
    )
    for length in MEMORY_LENGTHS:
        found.memory[length] = row = in_fresh_process(attention_memory, length)
        yield (
            f"N={length:,}, both biases, own process: temporaries {row['temporary_mib']:.0f} MiB, "
            f"resident memory up by {row['rise_mib']:.0f} MiB to {row['peak_mib']:.0f} MiB, {row['seconds']:.1f} s"
        )
    for model, length in itertools.product(TRAINED, MEMORY_LENGTHS):
        found.training[model, length] = row = in_fresh_process(training_step, model, length)
        yield (
            f"training step of {model}, 2 layers, width 64, one history of {length:,} events: {row['seconds']:.1f} s, "
            f"peak {row['peak_mib'] / 1024:.2f} GiB resident"
        )


def draw(found: Found, path: Path) -> None:
    """Time and temporary memory of one row against its length."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for biased, style in ((False, "--"), (True, "-")):
        rows = [row for row in found.rows if row["batch"] == 1 and row["biased"] == biased]
        for backend, colour in (("reference", "tab:gray"), ("xla", "tab:blue")):
            label = f"{backend}, {'both biases' if biased else 'no bias'}"
            for panel, unit in zip(panels, ("ms", "mib")):
                lengths, values = [row["length"] for row in rows], [row[f"{backend}_{unit}"] for row in rows]
                if backend == "xla" and unit == "mib" and biased:
                    extra = [n for n in found.memory if n > lengths[-1]]
                    lengths, values = lengths + extra, values + [found.memory[n]["temporary_mib"] for n in extra]
                panel.plot(lengths, values, style, marker="o", markersize=3, color=colour, label=label)
    for panel, title in zip(panels, ("milliseconds, forward + backward", "MiB of temporaries")):
        panel.set(title=title, xlabel="tokens in the row", xscale="log", yscale="log")
        ticks = sorted({*LENGTHS, *MEMORY_LENGTHS} if panel is panels[1] else LENGTHS)
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    everything = Found()
    for line in run(everything):
        print(line, flush=True)
    draw(everything, Path(sys.argv[1]))
