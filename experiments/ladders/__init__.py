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
from genrec_jax.errors import UserError
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
        """The keys that the family's recipe sets at a width. Raises UserError for a family without one."""
        if family not in self.recipes:
            raise UserError(f"ladder {self.name!r} has no recipe for {family}")
        return self.recipes[family].training(width)

    def rungs(self, family: str, first: int, last: int, recipe: Recipe | None = None) -> Sweep:
        """Rungs s``first`` to s``last`` of a family, both included, trained by its recipe or by another.

        Raises UserError if the ladder has no such rungs.
        """
        if last >= len(self.sizes.get(family, [])):
            raise UserError(f"ladder {self.name!r} has no rung s{last} of {family}")
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


def names() -> list[str]:
    """The ladders that are kept here."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


@functools.cache
def read(name: str) -> Ladder:
    """The ladder of a name, or of a TOML file (``name`` ends in .toml). One that ``extends`` another has its rungs, and
    the recipes and the keys of [data] and [train] that are not its own.

    Raises UserError naming the file and the key for an unknown ladder and for a bad file.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"there is no ladder {name!r}; give one of {', '.join(names())}, or a file that ends in .toml")
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    title, parent = record.pop("title", path.stem), record.pop("extends", None)
    shared = {part: record.pop(part, None if parent is None else {}) for part in ("data", "train")}
    if not all(isinstance(keys, dict) for keys in shared.values()):
        raise UserError(
            f"{path}: a ladder has sections [data] and [train], or a key extends and what of them it changes"
        )
    base = {f"{part}.{key}": value for part, keys in shared.items() for key, value in keys.items()}
    sizes = {
        family: [_sizes(family, rung) for rung in own.pop("rungs")]
        for family, own in record.items()
        if _section(path, family, own) and "rungs" in own
    }
    recipes = {family: _recipe(path, family, own) for family, own in record.items()}
    if parent is not None:
        other = read(parent)
        base, recipes, sizes = {**other.base, **base}, {**other.recipes, **recipes}, {**other.sizes, **sizes}
    return Ladder(path.stem, title, base, recipes, sizes)


def _section(path: Path, family: str, own: Any) -> bool:
    """Refuses what is no section of a family's."""
    if family not in registry.names() or not isinstance(own, dict):
        raise UserError(f"{path}: {family!r} is neither a key of a ladder nor a model ({', '.join(registry.names())})")
    rungs = own.get("rungs", [])
    if not isinstance(rungs, list) or not all(isinstance(r, dict) and {"width", "depth"} <= r.keys() for r in rungs):
        raise UserError(f"{path}: [{family}] rungs must be a list of tables with a width and a depth")
    return True


def _recipe(path: Path, family: str, own: Mapping[str, Any]) -> Recipe:
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for key in own.keys() - fields.keys():
        raise UserError(f"{path}: [{family}] has an unknown key {key!r}; there is: {', '.join(fields)}, rungs")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and not isinstance(own.get(key), int | float):
            raise UserError(f"{path}: [{family}] must have a number {key!r}")
    return Recipe(**own)


def _sizes(family: str, rung: Mapping[str, Any]) -> dict[str, Any]:
    keys = {f"{_PARTS.get(key, 'model')}.{key}": value for key, value in rung.items()}
    if issubclass(registry.config_type(family), SequenceConfig):
        keys["model.heads"] = heads(rung["width"])
    return keys


LADDER = read("tuned")
