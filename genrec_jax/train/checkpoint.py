"""Orbax behind three functions: the state of a trial together with the position of its input stream."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from genrec_jax.train.step import State


class Checkpoints:
    """Keeps the newest complete checkpoint of a trial; an interrupted save is ignored on the next start."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: State, record: dict[str, Any]) -> None:
        """``record``: JSON-able companions (input position, seconds spent)."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=args)

    def restore(self, like: State) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, record) of the newest checkpoint, or None. ``like`` gives shapes and types."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return step, State(**restored["state"]), dict(restored["record"])

    def close(self) -> None:
        self._manager.close()


def _tree(state: State) -> dict[str, Any]:
    return {"params": state.params, "opt": state.opt, "step": state.step, "key": state.key}
