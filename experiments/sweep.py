"""A small algebra of sweeps: a study's points are a product, a zip or a concatenation of shorter lists.

    (model("hstu") + model("dlrm")) * param("model.depth", [1, 2, 4], axis=True) * param("seed", [0, 1])
    model("hstu", **{"model.width": 64}) * zipped(param("model.depth", [1, 2]), param("seed", [3, 4]))
    model("din") + model("dcn", family="DCN v2") * ladder({"S": {"model.width": 32}, "M": {"model.width": 64}})

Two factors never set the same thing: a key, the axis or the model given twice is refused, not silently overridden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genrec_jax.errors import UserError


@dataclass(frozen=True)
class Point:
    """One trial to be: ``values`` override dotted keys, ``axis_value`` is its place on the study's x axis.

    label: what tells it from its siblings ("" for seeds). model: architecture by registry name. family: the curve it
    lies on (default: the model).
    """

    label: str = ""
    axis_value: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    family: str | None = None

    def merged(self, other: "Point") -> "Point":
        """Both points at once. Raises UserError if they disagree on who sets what."""
        for twice in sorted(self.values.keys() & other.values):
            raise UserError(f"the sweep sets {twice!r} twice")
        if self.model is not None and other.model is not None:
            raise UserError(f"the sweep names two models for one point: {self.model!r} and {other.model!r}")
        if self.axis_value is not None and other.axis_value is not None:
            raise UserError(f"the sweep has two axes: {self.label!r} and {other.label!r} both set the axis value")
        return Point(
            label=" ".join(part for part in (self.label, other.label) if part),
            axis_value=other.axis_value if self.axis_value is None else self.axis_value,
            values={**self.values, **other.values},
            model=self.model or other.model,
            family=self.family or other.family,
        )


@dataclass(frozen=True)
class Sweep:
    """A list of points; ``a * b`` is every pair merged, ``a + b`` one list after the other."""

    points: tuple[Point, ...]

    def __mul__(self, other: "Sweep") -> "Sweep":
        return Sweep(tuple(a.merged(b) for a in self.points for b in other.points))

    def __add__(self, other: "Sweep") -> "Sweep":
        return Sweep(self.points + other.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def param(key: str, values: Sequence[Any], *, axis: bool = False) -> Sweep:
    """One point per value of a dotted key; ``axis`` makes the values the study's x. Seeds stay out of the label.

    Raises UserError for an axis of anything but numbers: a law has no place for words.
    """
    name = key.rpartition(".")[2]
    for value in values:
        if axis and not isinstance(value, int | float):
            raise UserError(f"the axis {key!r} must have numbers as values, not {value!r}")
    return Sweep(
        tuple(
            Point(
                label="" if key == "seed" else f"{name}={_text(value)}",
                axis_value=value if axis else None,
                values={key: value},
            )
            for value in values
        )
    )


def model(name: str, *, family: Any = None, **values: Any) -> Sweep:
    """One architecture with dotted keys it always has, ``**{"model.width": 64}``; ``family`` (text) names its curve."""
    return Sweep((Point(model=name, values=values, family=family or name),))


def ladder(rungs: Mapping[str, Mapping[str, Any]]) -> Sweep:
    """Named points, smallest first by convention."""
    return Sweep(tuple(Point(label=name, values=dict(values)) for name, values in rungs.items()))


def zipped(first: Sweep, *others: Sweep) -> Sweep:
    """The sweeps walked in step: the k-th points of all of them merged."""
    points = list(first.points)
    for other in others:
        if len(other) != len(points):
            raise UserError(f"zipped sweeps have {len(points)} and {len(other)} points")
        points = [a.merged(b) for a, b in zip(points, other.points)]
    return Sweep(tuple(points))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
