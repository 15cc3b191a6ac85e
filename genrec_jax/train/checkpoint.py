"""Orbax behind three functions: the state of a trial together with the position of its input stream."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from genrec_jax.distributed.host import DEVICE, at_host, on_host
from genrec_jax.errors import UserError
from genrec_jax.train.record import write_json
from genrec_jax.train.step import State

_log = logging.getLogger(__name__)
_SIZES = "sizes.json"
_DROPPED = "dropped"
_KEPT = 2  # newest checkpoints: the newest may turn out to be damaged


class Checkpoints:
    """Keeps the two newest checkpoints of a trial, and the one with the largest score (the latest of equals).

    They are written while training goes on. One that was interrupted is ignored on the next start; in place of one that
    cannot be read, or holds other numbers than were saved, the one before it is used, with a warning.
    """

    def __init__(self, folder: Path):
        keep: Any = ocp.checkpoint_managers
        policy = keep.AnyPreservationPolicy([keep.LatestN(_KEPT), keep.BestN(get_metric_fn=_score, n=1)])
        self._folder = folder
        self._saves = False
        # A checkpoint goes by its name at once: file by file it would for a while look like one that is damaged.
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_score, todelete_subdir=_DROPPED)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: State, record: dict[str, Any], score: float = -math.inf) -> None:
        """``record``: JSON-able companions (input position, seconds spent). Returns before it is on the disk, but the
        state may be given away."""
        self._finish()
        self._clear()
        self._saves = True
        kept = {"record": record, "sums": _sums(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), record=ocp.args.JsonSave(kept))
        self._manager.save(step, args=args, metrics={"score": score})

    def restore(self, like: State, *, best: bool = False) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, record) of the newest checkpoint that can be read, or of the best; None if there is none.

        ``like`` gives shapes, types and where on the devices the arrays go. Raises UserError if there are checkpoints
        and none of them can be read, or not the best.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best:
            steps = [step for step in steps if step == self._manager.best_step()]
        for step in steps:
            try:
                return step, *self._read(step, like)
            except Exception as error:  # whatever a reader of damaged files may raise
                reason = str(error).strip().partition("\n")[0][:200]
                if step == steps[-1]:
                    raise UserError(f"{self._folder}: checkpoint {step} cannot be read: {reason}") from error
                _log.warning(
                    "%s: checkpoint %d cannot be read, the one before it is used: %s", self._folder, step, reason
                )
        return None

    def drop_after(self, step: int) -> None:
        """Removes later checkpoints, for a run that goes on from an earlier one."""
        self._clear()
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def _finish(self) -> None:
        """Waits until what was saved is on the disk, and writes down which files these are: of one that is cut short
        Orbax would complain from many threads at once."""
        self._manager.wait_until_finished()
        if jax.process_index():
            return
        known = _noted(self._folder)
        here = [path for path in self._folder.iterdir() if path.name.isdigit()]
        found = {path.name: known.get(path.name) or _sizes(path) for path in here}
        if found != known:
            write_json(self._folder / _SIZES, found)

    def _clear(self) -> None:
        """Removes what was dropped, also by a process that was killed: Orbax would not put another in its place."""
        if not jax.process_index():
            shutil.rmtree(self._folder / _DROPPED, ignore_errors=True)

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        noted, here = _noted(self._folder).get(str(step), {}), _sizes(self._folder / str(step))
        for file, size in noted.items():
            if here.get(file) != size:
                raise ValueError(f"{file} has {here.get(file, 'no')} bytes, not {size}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        state, kept = State(**restored["state"]), restored["record"]
        if _sums(state) != kept["sums"]:
            raise ValueError("it holds other numbers than were saved")
        return state, dict(kept["record"])

    def close(self) -> None:
        self._finish()
        if self._saves:  # who only reads leaves the folder to whoever trains in it
            self._clear()
        self._manager.close()


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _noted(folder: Path) -> dict[str, dict[str, int]]:
    """The sizes of files by checkpoint, as noted; a kill may have come before that."""
    path = folder / _SIZES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _tree(state: State) -> dict[str, Any]:
    return {"params": state.params, "opt": state.opt, "step": state.step, "key": state.key}


def _sums(state: State) -> list[int]:
    """Of each array, its bits added up as integers: the same however the array is divided over devices."""
    return [int(x) for x in _bit_sums(jax.tree.leaves(state))]


@jax.jit
def _bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    def total(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        return jnp.sum(bits, dtype=jnp.uint32)

    return [at_host(total, DEVICE)(x) if on_host(x) else total(x) for x in arrays]
