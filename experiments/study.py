"""What a study is: named points by budget, the metric it reads and the axis it draws them on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from experiments.ladders import LADDER, Ladder
from experiments.sweep import Point, Sweep
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.errors import UserError
from genrec_jax.train.places import Place

Budget = Literal["small", "medium", "large"]
Conclusion = Callable[[Place, Sequence[Mapping[str, Any]]], list[str]]


@dataclass(frozen=True)
class PlannedTrial:
    """A trial with its place in a study.

    axis: the study's x: the name under which ``axis_value`` is read, or, where ``axis_value`` is None, a column of the
    results table to read it from. cost: anything proportional to its run time (FLOPs); long trials start first, so that
    the workers finish together. recipe: the study's.
    """

    trial: Trial
    study: str
    family: str
    label: str
    axis: str
    axis_value: float | None = None
    cost: float | None = None
    recipe: str = ""

    @property
    def name(self) -> str:
        """How a person tells it from the other trials of its study."""
        return " ".join(part for part in (self.family, self.label, f"seed={self.trial.seed}") if part)


@dataclass(frozen=True)
class Study:
    """One question put to the lab.

    doc: the question and the expected answer. points: the sweep of each budget. metric: the column of the results table
    that answers it. axis: the x column. base: keys that every point shares. conclude: (folder of the study, its rows of
    the results table) -> what they say, in paragraphs. recipe: ``name@hash`` of the ladder whose
    rules its trials follow. by_ladder: the same study by another ladder; see :func:`on_ladder`.
    """

    name: str
    title: str
    doc: str
    points: Mapping[Budget, Sweep]
    metric: str
    axis: str
    base: Mapping[str, Any] = field(default_factory=dict)
    conclude: Conclusion | None = None
    recipe: str = ""
    by_ladder: Callable[[Ladder], "Study"] | None = None

    @property
    def question(self) -> str:
        """``doc`` without the commands that stand in it; an equation stays."""
        commands = ("    python -m ", "    genrec ", "    make ")
        return "\n\n".join(part for part in self.doc.split("\n\n") if not part.startswith(commands))

    def on(self, ladder: Ladder) -> "Study":
        """The study by another ladder. Raises UserError for a study that follows none."""
        if self.by_ladder is None:
            raise UserError(f"study {self.name!r} follows no ladder, so --ladder has no place there")
        return self.by_ladder(ladder)

    def with_settings(self, settings: Mapping[str, str]) -> "Study":
        """The study with ``settings`` (dotted keys) for all its points; its recipe's name says so.

        Raises UserError for a key that tells its points apart, and for those that name the dataset.
        """
        if not settings:
            return self
        apart = {key for sweep in self.points.values() for point in sweep for key in point.values}
        for key in settings:
            if key in ("data.path", "data.digest"):
                raise UserError(f"--set {key}=...: the dataset is named by --data")
            if key in apart:
                raise UserError(f"--set {key}=...: the points of study {self.name!r} set it themselves")
        said = f"with {', '.join(f'{key}={value}' for key, value in sorted(settings.items()))}"
        return replace(self, base={**self.base, **settings}, recipe=f"{self.recipe} {said}".strip())

    def trials(self, data_path: str, budget: Budget, digest: str = "") -> list[PlannedTrial]:
        """The resolved trials of a budget on a dataset folder whose content has the given digest.

        Raises UserError for an unknown budget or key, for a key set twice, and for two points of the same name.
        """
        if budget not in self.points:
            known = ", ".join(b for b in get_args(Budget) if b in self.points)
            raise UserError(f"study {self.name!r} has no budget {budget!r}; it has: {known}")
        shared = {**self.base, "data.path": data_path, "data.digest": digest}
        planned = [self._plan(point, shared) for point in self.points[budget]]
        seen: set[str] = set()
        for one in planned:
            if one.name in seen:
                raise UserError(f"two points of study {self.name!r} are called {one.name!r}")
            seen.add(one.name)
        return planned

    def _plan(self, point: Point, shared: dict[str, Any]) -> PlannedTrial:
        if point.model is None:
            raise UserError(f"point {point.label!r} of study {self.name!r} names no model")
        for key in sorted(shared.keys() & point.values):
            raise UserError(f"study {self.name!r} sets {key!r} for all its points and again for {point.label!r}")
        trial = override(default_trial(point.model), {**shared, **point.values})
        family = point.family or point.model
        return PlannedTrial(trial, self.name, family, point.label, self.axis, point.axis_value, recipe=self.recipe)


def chosen(planned: list[PlannedTrial], only: Sequence[str]) -> list[PlannedTrial]:
    """The trials whose names have, of each of ``only``, one of its words, which commas part; all without.

    Raises UserError for a word that is in no name, and where no trial has what is asked for.
    """
    asked = [[word.strip() for word in text.split(",")] for text in only]
    words = {word for one in planned for word in one.name.split()}
    for word in (word for alternatives in asked for word in alternatives):
        if word not in words:
            said = f"--only {word}: no trial has this in its name; there is: {', '.join(sorted(words))}"
            raise UserError(said)
    found = [one for one in planned if all(set(one.name.split()) & set(alternatives) for alternatives in asked)]
    if not found:
        raise UserError(f"no trial has {' and '.join(only)} in its name")
    return found


def on_ladder(build: Callable[[Ladder], Study]) -> Study:
    """The study that ``build`` makes of the default ladder; by :meth:`Study.on` of another."""
    return replace(build(LADDER), by_ladder=build)
