"""``genrec parity``: golden vectors recorded from a public implementation, against every backend this machine can run.

A kind of file is a reader, which turns the file's arrays into a `Case`; to check another kind, write its reader and
list it in `KINDS`. The first word of a file's name says its kind (``attention_causal.npz``), else what it holds does.
"""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from genrec_jax.errors import UserError
from kernels_pallas.hstu_attention import BACKENDS, hstu_attention

OUTPUT_TOLERANCE = 2e-5  # largest absolute error
GRADIENT_TOLERANCE = 1e-4  # largest error over the largest entry

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What a golden file asks for.

    Attributes:
      run: computes the outputs and gradients with a backend, by name; NotImplementedError if it cannot serve the call.
      outputs, gradients: what was recorded, by the same names.
    """

    run: Callable[[str], Arrays]
    outputs: Arrays
    gradients: Arrays


class Error(NamedTuple):
    """How far one array is from the recorded one; ``size`` is absolute for outputs, relative for gradients."""

    name: str
    size: float
    tolerance: float

    @property
    def bad(self) -> bool:
        return not self.size <= self.tolerance  # so that NaN is bad


@dataclass(frozen=True)
class Checked:
    """One backend on one file: its errors, or why it cannot run here."""

    file: Path
    backend: str
    outputs: tuple[Error, ...] = ()
    gradients: tuple[Error, ...] = ()
    reason: str = ""

    @property
    def bad(self) -> list[Error]:
        return [error for error in (*self.outputs, *self.gradients) if error.bad]


def parity_command(files: Sequence[Path]) -> int:
    """Prints the worst errors of each backend on each file; the exit code, 1 when one is past its tolerance."""
    if not files:
        raise UserError("name at least one golden file")
    cases = {file: read_case(file) for file in files}
    found = [check(file, case, backend) for file, case in cases.items() for backend in BACKENDS]
    table = _table(found)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, width=console.measure(table).maximum)
    missing = {one.backend: one.reason for one in found if one.reason}
    for backend, reason in missing.items():
        console.print(f"{backend} did not run on every file: {reason}", markup=False)
    bad = [(one, error) for one in found for error in one.bad]
    for one, error in bad:
        what = "" if error in one.outputs else " of the largest entry"
        console.print(
            f"{one.file.name}: {error.name} of {one.backend} is off by {error.size:.2e}{what}, "
            f"more than {error.tolerance:.0e}",
            markup=False,
        )
    return 1 if bad else 0


def read_case(file: Path) -> Case:
    """The case in a golden file. Raises UserError if it cannot be read, is of no known kind, or lacks something."""
    try:
        with file.open("rb") as opened, np.load(opened) as data:
            arrays = {name: data[name] for name in data.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} is not a readable npz file") from error
    word = file.name.split("_")[0]
    fitting = (kind for kind in KINDS.values() if kind.holds <= set(arrays))
    kind = KINDS[word] if word in KINDS else next(fitting, None)
    if kind is None:
        raise UserError(f"{file} is no golden file of a known kind; there is: {', '.join(KINDS)}")
    return kind.read(file, arrays)


def check(file: Path, case: Case, backend: str) -> Checked:
    """Runs one backend on one case."""
    try:
        with _on_this_machine(backend):
            got = case.run(backend)
    except (NotImplementedError, ImportError) as reason:
        return Checked(file, backend, reason=str(reason))
    outputs = [Error(n, _distance(got[n], want), OUTPUT_TOLERANCE) for n, want in case.outputs.items()]
    gradients = [
        Error(n, _distance(got[n], want, relative=True), GRADIENT_TOLERANCE) for n, want in case.gradients.items()
    ]
    return Checked(file, backend, tuple(outputs), tuple(gradients))


def _on_this_machine(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Without a TPU its kernels are interpreted."""
    if backend != "mosaic_tpu" or jax.default_backend() == "tpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.force_tpu_interpret_mode()


def _distance(got: np.ndarray, want: np.ndarray, *, relative: bool = False) -> float:
    """The largest error, or its ratio to the largest entry of ``want``."""
    error = np.abs(np.asarray(got, np.float64) - want).max(initial=0)
    scale = np.abs(want).max(initial=0) if relative else 1.0
    return float(error / scale if scale else error)


def _table(found: Sequence[Checked]) -> Table:
    """A row per file and backend, and the worst of each backend over all files at the end."""
    table = Table(*(Column(n, no_wrap=True) for n in ("file", "backend", "output", "gradient", "")), box=None)
    for one in found:
        table.add_row(one.file.name, *_row(one.backend, [one]))
    table.add_section()
    for backend in dict.fromkeys(one.backend for one in found):
        table.add_row("worst", *_row(backend, [one for one in found if one.backend == backend]))
    return table


def _row(backend: str, found: Sequence[Checked]) -> tuple[str, str, str, str]:
    """The cells of one backend: its worst output and gradient error, and the verdict."""
    if all(one.reason for one in found):
        return backend, "", "", "cannot run"
    outputs, gradients = ([e for one in found for e in getattr(one, part)] for part in ("outputs", "gradients"))
    verdict = "FAILS" if any(one.bad for one in found) else "passes"
    return backend, _worst(outputs), _worst(gradients), verdict


def _worst(errors: Sequence[Error]) -> str:
    worst = max(errors, key=lambda error: (error.bad, error.size), default=None)
    return "" if worst is None else f"{worst.size:.1e} {worst.name}"


def _attention(file: Path, arrays: Arrays) -> Case:
    """Packed pointwise attention: q, k, v, seq_offsets, perhaps num_targets; out and dout, dq, dk, dv."""
    _require(file, arrays, ("meta", "q", "k", "v", "seq_offsets", "out", "dout", "dq", "dk", "dv"))
    meta = _meta(file, arrays, ("alpha", "divisor"))
    q, v = _floats(file, arrays, "q"), _floats(file, arrays, "v")
    if q.ndim != 3 or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise UserError(f"{file}: q and v must be [T, H, D], they are {list(q.shape)} and {list(v.shape)}")
    k, dq, dk = (_floats(file, arrays, name, q.shape) for name in ("k", "dq", "dk"))
    out, dout, dv = (_floats(file, arrays, name, v.shape) for name in ("out", "dout", "dv"))
    offsets = _integers(file, arrays, "seq_offsets")
    if offsets.size == 0 or offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(q):
        raise UserError(f"{file}: seq_offsets must rise from 0 to at most T = {len(q)}")
    targets = _integers(file, arrays, "num_targets") if "num_targets" in arrays else None
    if targets is not None and (targets.shape != (len(offsets) - 1,) or (targets < 0).any()):
        raise UserError(f"{file}: num_targets must hold a count for each of the {len(offsets) - 1} sequences")
    if not meta.get("causal", True):
        raise UserError(f"{file}: meta says causal is false, and there is only causal attention here")
    number = {
        name: _number(file, meta, name)
        for name in ("alpha", "divisor", "max_attn_len", "contextual_seq_len", "min_full_attn_seq_len")
    }
    if number["divisor"] <= 0:
        raise UserError(f"{file}: meta's divisor must be positive")
    options: dict[str, Any] = {
        "max_len": number["divisor"],
        "alpha": number["alpha"],
        "num_targets": None if targets is None else jnp.asarray(targets, jnp.int32),
        "window": int(number["max_attn_len"]),
        "context_len": int(number["contextual_seq_len"]),
        "full_len": int(number["min_full_attn_seq_len"]),
    }

    def run(backend: str) -> Arrays:
        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
            def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                given = jnp.asarray(offsets, jnp.int32)
                return hstu_attention(q, k, v, given, **options, implementation=backend)

            value, pull = jax.vjp(call, q, k, v)
            return value, *pull(dout)

        return dict(zip(("out", "dq", "dk", "dv"), map(np.asarray, both(*map(jnp.asarray, (q, k, v, dout))))))

    return Case(run, {"out": out}, {"dq": dq, "dk": dk, "dv": dv})


class Kind(NamedTuple):
    """A kind of golden file: what tells it apart, and its reader."""

    holds: frozenset[str]
    read: Callable[[Path, Arrays], Case]


KINDS = {"attention": Kind(frozenset({"q", "k", "v", "seq_offsets"}), _attention)}


def _require(file: Path, arrays: Arrays, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}")


def _meta(file: Path, arrays: Arrays, names: Sequence[str]) -> dict[str, Any]:
    """The JSON object in ``meta``, which must hold ``names``."""
    try:
        meta = json.loads(str(arrays["meta"]))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: meta is not JSON") from error
    if not isinstance(meta, dict):
        raise UserError(f"{file}: meta is not a JSON object")
    missing = [name for name in names if name not in meta]
    if missing:
        raise UserError(f"{file}: meta lacks {', '.join(missing)}")
    return meta


def _number(file: Path, meta: dict[str, Any], name: str) -> float:
    """A finite number of ``meta``, 0 where it has none; lengths must not be negative."""
    value = meta.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{file}: meta's {name} must be a number, it is {value!r}")
    if name.endswith("_len") and (value < 0 or value != int(value)):
        raise UserError(f"{file}: meta's {name} must be a length, it is {value!r}")
    return value


def _floats(file: Path, arrays: Arrays, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """An array of real numbers as float32."""
    array = arrays[name]
    if array.dtype.kind not in "fiu":
        raise UserError(f"{file}: {name} must hold numbers, it holds {array.dtype}")
    if shape is not None and array.shape != shape:
        raise UserError(f"{file}: {name} has shape {list(array.shape)}, expected {list(shape)}")
    return array.astype(np.float32)


def _integers(file: Path, arrays: Arrays, name: str) -> np.ndarray:
    array = arrays[name]
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserError(f"{file}: {name} must be a vector of whole numbers")
    return array.astype(np.int64)
