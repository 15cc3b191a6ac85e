"""The command: reads the files, runs every backend on each, and says how far they are."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Column, Table

from experiments.parity import attention, ranking, retrieval, trajectory
from experiments.parity.case import MODEL, Arrays, Case, Rule, Wanted
from genrec_jax.errors import UserError
from genrec_jax.interop.files import read_npz
from kernels_pallas.hstu_attention import BACKENDS


class Kind(NamedTuple):
    """A kind of golden file: what tells it apart, and its reader."""

    holds: frozenset[str]
    read: Callable[[Path, Arrays], Case]


KINDS = {
    "attention": Kind(frozenset({"q", "k", "v", "seq_offsets"}), attention.read),
    "retrieval": Kind(frozenset({"in/ids", "out/encoder"}), retrieval.read),
    "ranking": Kind(frozenset({"x", "dx", "seq_offsets"}), ranking.read),
    "trajectory": Kind(frozenset({"in/ids", "out/losses"}), trajectory.read),
}


class Error(NamedTuple):
    """How far one array is from the recorded one, as its rule measures it."""

    name: str
    size: float
    rule: Rule

    @property
    def bad(self) -> bool:
        return not self.size <= self.rule.tolerance  # so that NaN is bad


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
    found = [check(file, case, backend) for file, case in cases.items() for backend in case.backends or BACKENDS]
    table = _table(found)
    console = Console(highlight=False, soft_wrap=True)
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)  # names are never cut
    console.print(table)
    missing = {one.backend: one.reason for one in found if one.reason}
    for backend, reason in missing.items():
        console.print(f"{backend} did not run on every file: {reason}", markup=False)
    bad = [(one, error) for one in found for error in one.bad]
    for one, error in bad:
        over = f" {error.rule.over}" if error.rule.over else ""
        console.print(
            f"{one.file.name}: {error.name} of {one.backend} is off by {error.size:.2e}{over}, "
            f"more than {error.rule.tolerance:.0e}",
            markup=False,
        )
    return 1 if bad else 0


def read_case(file: Path) -> Case:
    """The case in a golden file. Raises UserError if it cannot be read, is of no known kind, or lacks something."""
    arrays = read_npz(file)
    word = file.name.split("_")[0]
    fitting = (kind for kind in KINDS.values() if kind.holds <= set(arrays))
    kind = KINDS[word] if word in KINDS else next(fitting, None)
    if kind is None:
        raise UserError(f"{file} is no golden file of a known kind; there is: {', '.join(KINDS)}")
    return kind.read(file, arrays)


def check(file: Path, case: Case, backend: str) -> Checked:
    """Runs one backend on one case."""
    try:
        # Models multiply in full float32: a GPU's default is TensorFloat-32. Attention's kernels choose by themselves.
        with _on_this_machine(backend), jax.default_matmul_precision("highest" if case.backends == MODEL else None):
            got = case.run(backend)
    except (NotImplementedError, ImportError) as reason:
        return Checked(file, backend, reason=str(reason))
    return Checked(file, backend, _errors(got, case.outputs), _errors(got, case.gradients))


def _errors(got: Arrays, part: Mapping[str, Wanted]) -> tuple[Error, ...]:
    return tuple(Error(name, rule.error(got[name], array), rule) for name, (array, rule) in part.items())


def _on_this_machine(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Without a TPU its kernels are interpreted."""
    if backend != "mosaic_tpu" or jax.default_backend() == "tpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.force_tpu_interpret_mode()


def _table(found: Sequence[Checked]) -> Table:
    """A row per file and backend, and the worst of each backend over all files at the end."""
    table = Table(*(Column(n, no_wrap=True) for n in ("file", "backend", "", "output", "gradient")), box=None)
    for one in found:
        table.add_row(one.file.name, *_row(one.backend, [one]))
    table.add_section()
    for backend in dict.fromkeys(one.backend for one in found):
        table.add_row("worst", *_row(backend, [one for one in found if one.backend == backend]))
    return table


def _row(backend: str, found: Sequence[Checked]) -> tuple[str, str, str, str]:
    """The cells of one backend: the verdict, and its worst output and gradient error."""
    if all(one.reason for one in found):
        return backend, "cannot run", "", ""
    outputs, gradients = ([e for one in found for e in getattr(one, part)] for part in ("outputs", "gradients"))
    verdict = "FAILS" if any(one.bad for one in found) else "passes"
    return backend, verdict, _worst(outputs), _worst(gradients)


def _worst(errors: Sequence[Error]) -> str:
    worst = max(errors, key=lambda error: (error.bad, error.size), default=None)
    return "" if worst is None else f"{worst.size:.1e} {worst.name}"
