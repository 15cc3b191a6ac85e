"""The maximal-update parametrisation: initial values and learning rates that carry over from one width to another.

Yang et al., "Tensor Programs V", 2022 (table 8, Adam); for depth, Dey et al., "CompleteP", 2025 (arXiv 2505.01618). A
model is held against its base, the same architecture at the base width: which sides of a matrix have grown says what
it is. docs/mup.md derives the rules, those of HSTU's attention and gate included.
"""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

Place = tuple[Any, ...]
Rates = dict[Place, float]  # factors of the learning rate, by a parameter's place in the model

_RATE = "rate"  # a parameter's metadata: it stays with the model, abstract or not


def parametrise(model: nnx.Module, base: nnx.Module, *, branch: float) -> None:
    """Scales the initial values of ``model`` and notes the rates of its parameters.

    base: the model at the base width, abstract. branch: factor of what every block adds to its input. With m the width
    over the base width,

    - a matrix that reads the width moves at 1 / m; if its outputs have not grown, it also starts at 1 / sqrt(m) of the
      usual deviation;
    - rows of tables, which start at 1 / sqrt(width) and are multiplied by sqrt(width) where they are read, move at
      1 / sqrt(m), so that what is read moves at 1;
    - all else (biases, scales, matrices that read features) is left alone;
    - the last map of a branch starts and moves at ``branch`` of that, which multiplies the branch.
    """
    small = dict(_parameters(base))
    for place, param in _parameters(model):
        start, rate = _of_width(place, param.shape, small[place].shape)
        if _ends_branch(place):
            start, rate = start * branch, rate * branch
        if start != 1.0:
            param[...] = start * param[...]
        param.set_metadata(**{_RATE: rate})


def rates(model: nnx.Module) -> Rates:
    """The factors of the learning rates that are not 1: none of a model in the standard parametrisation."""
    found = {place: param.get_metadata(_RATE, 1.0) for place, param in _parameters(model)}
    return {place: rate for place, rate in found.items() if rate != 1.0}


def _parameters(model: nnx.Module) -> Iterator[tuple[Place, nnx.Param[jax.Array]]]:
    for place, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Param):
            yield tuple(place), value


def _of_width(place: Place, shape: tuple[int, ...], small: tuple[int, ...]) -> tuple[float, float]:
    """(factor of the initial values, factor of the learning rate)."""
    if str(place[-1]).endswith("_table"):
        return 1.0, (small[-1] / shape[-1]) ** 0.5
    if place[-1] != "kernel" or shape[-2] == small[-2]:
        return 1.0, 1.0
    grown = shape[-2] / small[-2]
    return (1.0 if shape[-1] != small[-1] else grown**-0.5), 1 / grown


def _ends_branch(place: Place) -> bool:
    """Whether the parameter is of the map that ends a branch of a block."""
    return "blocks" in place and (place[-2] == "out" or place[-4:-1] == ("ffn", "layers", 1))
