"""How one process takes the steps of a trial, or of several that share a compiled step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from genrec_jax.batch import Batch
from genrec_jax.train.optimizer import Scalars
from genrec_jax.train.step import Metrics, State, TrialStep, jitted


class Together(Protocol):
    """The states of trials, by their places. Those that a step has no batch for keep theirs."""

    def compile(self, batches: Mapping[int, Batch]) -> None:
        """For batches of these shapes; before the first step."""

    def advance(self, batches: Mapping[int, Batch]) -> None:
        """Takes a step of the trials that have a batch; the work may still be under way when it returns."""

    def metrics(self) -> Mapping[int, Mapping[str, float]]:
        """Of the last step, at least for the trials that took it."""

    def state(self, place: int) -> State:
        """Of one trial, until it takes another step."""

    def wait(self) -> None:
        """Until the last step is done."""


class InTurn:
    """One trial after another, as a CPU does best: what a trial works on stays in its caches, its state where it lies.

    ``where``: as of :func:`genrec_jax.train.step.jitted`.
    """

    def __init__(self, step: TrialStep, states: Sequence[State], scalars: Sequence[Scalars], where: Any = None):
        self._step, self._states, self._scalars = jitted(step, where), list(states), scalars
        self._last: dict[int, Metrics] = {}

    def compile(self, batches: Mapping[int, Batch]) -> None:
        place, batch = next(iter(batches.items()))
        self._step = self._step.lower(self._states[place], batch, self._scalars[place]).compile()

    def advance(self, batches: Mapping[int, Batch]) -> None:
        for place, batch in batches.items():
            self._states[place], self._last[place] = self._step(self._states[place], batch, self._scalars[place])

    def metrics(self) -> Mapping[int, Mapping[str, float]]:
        return {place: {name: float(x) for name, x in own.items()} for place, own in self._last.items()}

    def state(self, place: int) -> State:
        return self._states[place]

    def wait(self) -> None:
        jax.block_until_ready(self._states)


class AtOnce:
    """All in one step, as an accelerator does best, which a small trial alone leaves idle. The states of all are one
    tree, with a first axis of trials."""

    def __init__(self, step: TrialStep, states: Sequence[State], scalars: Sequence[Scalars]):
        self._states = jax.tree.map(lambda *x: jnp.stack(x), *states)
        self._scalars = jax.tree.map(lambda *x: np.stack(x), *scalars)
        self._step: Any = jax.jit(_at_once(step), donate_argnums=1)
        self._take = jax.jit(lambda states, place: jax.tree.map(lambda x: x[place], states))
        self._batches: list[Batch | None] = [None for _ in states]
        self._last: Metrics = {}

    def compile(self, batches: Mapping[int, Batch]) -> None:
        self._step = self._step.lower(*self._arguments(batches)).compile()

    def advance(self, batches: Mapping[int, Batch]) -> None:
        self._states, self._last = self._step(*self._arguments(batches))

    def _arguments(self, batches: Mapping[int, Batch]) -> tuple[np.ndarray, State, Batch, Scalars]:
        for place, batch in batches.items():
            self._batches[place] = batch
        some = next(iter(batches.values()))  # whose numbers those that are not at work leave unread
        batch = jax.tree.map(lambda *x: np.stack(x), *(some if own is None else own for own in self._batches))
        return np.isin(np.arange(len(self._batches)), list(batches)), self._states, batch, self._scalars

    def metrics(self) -> Mapping[int, Mapping[str, float]]:
        found = {name: np.asarray(x) for name, x in self._last.items()}
        return {place: {name: float(x[place]) for name, x in found.items()} for place in range(len(self._batches))}

    def state(self, place: int) -> State:
        state: State = self._take(self._states, place)
        return state

    def wait(self) -> None:
        jax.block_until_ready(self._states)


def _at_once(step: TrialStep) -> Callable[..., tuple[State, Metrics]]:
    """(at work [P] bool, states, batches, scalars) -> (states, metrics), all with a first axis of P trials.

    A trial that is not at work keeps its state, and its metrics are zero.
    """
    step = jax.jit(step)  # traced once, for its shapes and itself

    def one(at_work: jax.Array, *arguments: Any) -> tuple[State, Metrics]:
        _, shapes = jax.eval_shape(step, *arguments)
        idle = arguments[0], jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(at_work, lambda: step(*arguments), lambda: idle)

    return jax.vmap(one)
