"""``genrec train``: one trial in one folder, with a progress bar."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.folder import read_record, read_result
from experiments.lease import hold
from genrec_jax.config import Trial, default_trial, override, trial_from_json
from genrec_jax.data.catalog import load_any
from genrec_jax.data.sequences import digest_of
from genrec_jax.errors import UserError
from genrec_jax.train.mirror import at_hand
from genrec_jax.train.places import Place, as_folder


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """``["model.width=64"]`` as a mapping. Raises UserError for a setting without "="."""
    out = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting!r} is not of the form dotted.key=value")
        out[key.strip()] = value.strip()
    return out


def train_command(
    data: Path,
    model: str,
    settings: Sequence[str],
    out: Place,
    *,
    mesh: str | None,
    remat: bool,
    offload: str | None,
    distributed: str | None,
    quiet: bool,
) -> None:
    """Trains (or resumes) the trial and prints its result; of several processes one prints."""
    if distributed is not None:
        as_folder(out, "--out with --distributed")
    trial = override(default_trial(model), parse_settings(settings))
    folder = load_any(data, quiet=quiet)
    trial = override(trial, {"data.path": str(folder), "data.digest": digest_of(folder)})
    earlier = _earlier(trial, out)
    if earlier is not None:
        _show(earlier)
        return

    from genrec_jax.distributed.mesh import make_mesh, parse_mesh
    from genrec_jax.distributed.processes import join, leads, mesh_of_all, together
    from genrec_jax.train.cache import enable_compilation_cache
    from genrec_jax.train.loop import train
    from genrec_jax.train.memory import keep_freed_memory

    sizes = None if mesh is None else parse_mesh(mesh)
    if distributed is not None:
        join(distributed)
    devices = mesh_of_all(sizes) if distributed is not None else None if sizes is None else make_mesh(sizes)
    work = functools.partial(train, trial, mesh=devices, remat=remat, offload=offload is not None)
    enable_compilation_cache()
    keep_freed_memory()
    if not leads():
        with together(), at_hand(out) as folder:
            work(folder)
        return
    out.mkdir(parents=True, exist_ok=True)
    held = hold(out / "lease", wait=False)
    if held is None:
        raise UserError(f"another process trains in {out}; let it finish or choose another --out")
    with held, at_hand(out) as folder, _saying_how_to_go_on(), together():
        if quiet:
            result = work(folder, on_progress=lambda record: print(_line(record), flush=True))
        else:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns) as progress:
                bar = progress.add_task(model, total=None, rate="compiling")

                def show(record: dict[str, Any]) -> None:
                    told = f"loss {record['loss']:.4f}  {record['examples_per_second']:.0f} targets/s"
                    progress.update(bar, completed=record["step"], total=record["steps"], rate=told)

                result = work(folder, on_progress=show)
    _show(result)


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    from genrec_jax.train.stopping import Stopped

    try:
        yield
    except Stopped as stopped:
        print(f"stopped after step {stopped.step} of {stopped.steps}; run the same command again to go on", flush=True)
        raise


def _show(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    for key in ("status", "train_flops", "train_seconds", "ne", "auc", "gauc", "hr@10", "ndcg@10", "mrr"):
        if key in result:
            value = result[key]
            console.print(f"{key:>14}  {value:.6g}" if isinstance(value, float) else f"{key:>14}  {value}")


def _line(record: dict[str, Any]) -> str:
    rate = f"{record['examples_per_second']:.0f} targets/s"
    return f"step {record['step']}/{record['steps']} loss {record['loss']:.4f} {rate}"


def _earlier(trial: Trial, out: Place) -> dict[str, Any] | None:
    """The result that this very trial already has in ``out``, or None.

    Raises UserError if the folder belongs to another trial: mixing two would corrupt its record.
    """
    config = read_record(out / "config.json")
    if config is not None and trial_from_json(config).hash != trial.hash:
        raise UserError(f"{out / 'config.json'} belongs to a trial with another configuration; choose another --out")
    return read_result(out)
