"""What a model must know of a dataset: vocabularies, features and tasks, never rows."""

import dataclasses
from typing import Literal

Level = Literal["user", "item", "event"]


@dataclasses.dataclass(frozen=True)
class Feature:
    """A categorical side feature with ids ``1..vocab-1``; id 0 means unknown or padding.

    ``width`` is the number of ids per user, item or event: 1, or the padded length of a multi-valued feature
    (a movie's genres). ``level`` says which table the ids hang on: a user's or an event's features describe the
    request, an item's describe history events and candidates alike.
    """

    name: str
    vocab: int
    width: int
    level: Level


@dataclasses.dataclass(frozen=True)
class Schema:
    """Vocabulary sizes of a dataset. ``items`` counts item ids including 0 (padding)."""

    items: int
    tasks: tuple[str, ...]
    features: tuple[Feature, ...] = ()

    @property
    def context_features(self) -> tuple[Feature, ...]:
        """Features of the request: the user's own and the event's."""
        return tuple(f for f in self.features if f.level != "item")

    @property
    def item_features(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.level == "item")

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict) -> "Schema":
        features = tuple(Feature(**f) for f in record["features"])
        return cls(items=record["items"], tasks=tuple(record["tasks"]), features=features)
