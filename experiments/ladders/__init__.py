"""The frozen ladders of the comparison studies: one TOML file each, with every rule by which a family's sizes train.

A rung is named s0, s1, ... A ladder is known by its name and by the hash of what its trials get from it: a study says
by which rules it was trained, and two studies whether these were the same.
"""

import dataclasses
import functools
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.sweep import Sweep, ladder, model
from genrec_jax.models import registry
from genrec_jax.models.sequence import SequenceConfig

_FOLDER = Path(__file__).parent
_PARTS = {"epochs": "train"}  # of a rung's keys; the others are the model's


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a family trains at every size.

    learning_rate: at width 32 and below; above, it falls with the width to the given power. Tables: twice that.
    batch_rows: per step. A window row carries up to 72 targets, a request row up to 8. base_width, base_depth: of muP
    (docs/mup.md), 0 for the standard parametrisation.
    """

    learning_rate: float
    power: float
    dropout: float
    batch_rows: int
    base_width: int = 0
    base_depth: int = 0

    def training(self, width: int) -> dict[str, Any]:
        """The keys it sets at a width; the learning rate is rounded so that configurations read well."""
        dense = float(f"{self.learning_rate * (32 / max(width, 32)) ** self.power:.3g}")
        bases = {"model.base_width": self.base_width, "model.base_depth": self.base_depth}
        return {
            "train.learning_rate": dense,
            "train.embedding_learning_rate": 2 * dense,
            "train.batch_rows": self.batch_rows,
            "model.dropout": self.dropout,
            **{key: value for key, value in bases.items() if value},
        }


@dataclasses.dataclass(frozen=True)
class Ladder:
    """base: the keys of all its trials. recipes: by family. sizes: the rungs of those families that have any, the keys
    that a rung sets beside its training."""

    name: str
    title: str
    base: Mapping[str, Any]
    recipes: Mapping[str, Recipe]
    sizes: Mapping[str, list[dict[str, Any]]]

    def training(self, family: str, width: int) -> dict[str, Any]:
        """The keys that the family's recipe sets at a width."""
        return self.recipes[family].training(width)

    def rungs(self, family: str, first: int, last: int, recipe: Recipe | None = None) -> Sweep:
        """Rungs s``first`` to s``last`` of a family, both included, trained by its recipe or by another."""
        found = recipe or self.recipes[family]
        sizes = {f"s{k}": self.sizes[family][k] for k in range(first, last + 1)}
        chosen = {name: {**values, **found.training(values["model.width"])} for name, values in sizes.items()}
        return model(family) * ladder(chosen)

    @property
    def mark(self) -> str:
        """``name@hash``, of all that it sets: for the record of a study."""
        rules = {family: dataclasses.asdict(recipe) for family, recipe in self.recipes.items()}
        sizes = {
            family: [{**x, **rules[family], **self.training(family, x["model.width"])} for x in found]
            for family, found in self.sizes.items()
        }
        text = json.dumps([dict(self.base), rules, sizes], sort_keys=True, separators=(",", ":"))
        return f"{self.name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def heads(width: int) -> int:
    """Heads about 64 wide, never narrower than 32: pointwise attention learns poorly with narrow ones."""
    return next(n for n in range(max(1, round(width / 64)), 0, -1) if width % n == 0)


@functools.cache
def read(name: str) -> Ladder:
    """The ladder of a name. One that ``extends`` another has its rungs, and the recipes that are not its own."""
    record = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    title = record.pop("title")
    if "extends" in record:
        other = read(record.pop("extends"))
        own = {family: Recipe(**recipe) for family, recipe in record.items()}
        return dataclasses.replace(other, name=name, title=title, recipes={**other.recipes, **own})
    base = {f"{part}.{key}": value for part in ("data", "train") for key, value in record.pop(part).items()}
    sizes = {
        family: [_sizes(family, rung) for rung in own.pop("rungs")] for family, own in record.items() if "rungs" in own
    }
    return Ladder(name, title, base, {family: Recipe(**own) for family, own in record.items()}, sizes)


def _sizes(family: str, rung: Mapping[str, Any]) -> dict[str, Any]:
    keys = {f"{_PARTS.get(key, 'model')}.{key}": value for key, value in rung.items()}
    if issubclass(registry.config_type(family), SequenceConfig):
        keys["model.heads"] = heads(rung["width"])
    return keys


LADDER = read("tuned")
