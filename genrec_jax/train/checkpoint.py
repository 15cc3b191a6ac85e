"""Orbax behind three functions: the state of a trial together with the position of its input stream."""

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from genrec_jax.train.step import State


class Checkpoints:
    """Keeps the newest complete checkpoint of a trial, and the one with the largest score (the latest of equals).

    An interrupted save is ignored on the next start.
    """

    def __init__(self, folder: Path):
        keep: Any = ocp.checkpoint_managers
        policy = keep.AnyPreservationPolicy([keep.LatestN(1), keep.BestN(get_metric_fn=_score, n=1)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=_score, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: State, record: dict[str, Any], score: float = -math.inf) -> None:
        """``record``: JSON-able companions (input position, seconds spent)."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=args, metrics={"score": score})

    def restore(self, like: State, *, best: bool = False) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, record) of the newest or the best checkpoint, or None. ``like`` gives shapes and types."""
        step = self._manager.best_step() if best else self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return step, State(**restored["state"]), dict(restored["record"])

    def close(self) -> None:
        self._manager.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _tree(state: State) -> dict[str, Any]:
    return {"params": state.params, "opt": state.opt, "step": state.step, "key": state.key}
