"""What a golden file asks for, and how far a result may be from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]

MODEL = ("model",)  # in place of backends: what a model takes on this machine by itself


class Rule(NamedTuple):
    """The largest error allowed: absolute, over each recorded number itself, or over the largest of its array."""

    tolerance: float
    over: Literal["", "of itself", "of the largest entry"]

    def error(self, got: np.ndarray, want: np.ndarray) -> float:
        error, size = np.abs(np.asarray(got, np.float64) - want), np.abs(np.asarray(want, np.float64))
        if self.over:
            scale = size if self.over == "of itself" else size.max(initial=0)
            error = np.where(scale > 0, error / np.where(scale > 0, scale, 1), error)
        return float(error.max(initial=0))


OUTPUT = Rule(2e-5, "")
GRADIENT = Rule(1e-4, "of the largest entry")
LOSS_STEP = Rule(1e-4, "of itself")  # the loss before each step of a training run
TRAINED = Rule(1e-4, "of the largest entry")  # parameters after the last step


class Wanted(NamedTuple):
    """A recorded array and the rule it is held to."""

    array: np.ndarray
    rule: Rule


@dataclass(frozen=True)
class Case:
    """What a golden file asks for.

    Attributes:
      run: computes the outputs and gradients with a backend, by name; NotImplementedError if it cannot serve the call.
      outputs, gradients: what was recorded, by the same names.
      backends: those that the file is held against; empty for every backend of attention.
    """

    run: Callable[[str], Arrays]
    outputs: Mapping[str, Wanted]
    gradients: Mapping[str, Wanted]
    backends: tuple[str, ...] = ()


def wanted(arrays: Arrays, rule: Rule) -> dict[str, Wanted]:
    """The arrays, all held to one rule."""
    return {name: Wanted(array, rule) for name, array in arrays.items()}
