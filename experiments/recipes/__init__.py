"""Published training recipes by name: one frozen TOML file each, complete to the last number, run by both protocols.

A file holds what the configuration tree of :mod:`genrec_jax.config` calls ``data``, ``model`` and ``train``, all of it
but what a run decides (:data:`LEFT_OPEN`), and the numbers its authors published.
"""

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from genrec_jax.config import Trial, default_trial, override
from genrec_jax.errors import UserError

Protocol = Literal["original", "honest"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
# Keys that a recipe does not fix: where the data lie, how the machine works, ranking's split, and the protocol's own.
LEFT_OPEN = frozenset(
    {"seed", "data.path", "data.digest", "data.workers", "data.split", "data.validation", "data.test", "data.protocol"}
    | {"train.select", "train.report_test", "train.steps"}
    | {"train.log_every", "train.checkpoint_every", "train.checkpoint_seconds"}
)
_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Recipe:
    """values: dotted keys of a trial. users, items: of the dataset the numbers were published on (users where known).
    published: the authors' test metrics."""

    name: str
    title: str
    dataset: str
    users: int | None
    items: int
    published: Mapping[str, float]
    model: str
    values: Mapping[str, Any]

    def is_of(self, data: Mapping[str, Any]) -> bool:
        """Whether a dataset with these ``users`` and ``items`` is as large as the published one."""
        return data["items"] == self.items and self.users in (None, data["users"])

    def trial(self, protocol: Protocol, seed: int, epochs: int | None = None, **more: Any) -> Trial:
        """The trial of one protocol and seed; ``epochs`` shortens it, evaluated as often. ``more``: dotted keys.

        original: trained on all but the last event, which is watched all along; the last epoch is reported. honest:
        trained on all but the last two, the last but one watched; the epoch that is best there is tested.
        """
        return override(default_trial(self.model), {**self.trial_values(protocol, epochs), "seed": seed, **more})

    def trial_values(self, protocol: Protocol, epochs: int | None = None) -> dict[str, Any]:
        """The dotted keys that :meth:`trial` sets, but for the seed."""
        values = {**self.values, "data.protocol": protocol}
        values["train.select"] = "last" if protocol == "original" else "best"
        if epochs is not None:
            every = self.values["train.epochs"] // self.values["train.validations"]
            values |= {"train.epochs": epochs, "train.validations": max(1, epochs // every)}
        return values


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def in_order(names: Iterable[str]) -> list[str]:
    """Each of the recipes once, the weakest first by what was published."""
    return sorted(set(names), key=lambda name: read(name).published["hr@10"])


def read(name: str) -> Recipe:
    """The recipe of a name. Raises UserError for an unknown one."""
    path = _FOLDER / f"{name}.toml"
    if name not in names():
        raise UserError(f"unknown recipe {name!r}; there is: {', '.join(names())}")
    record = tomllib.loads(path.read_text(encoding="utf-8"))
    sections = {key: dict(record.pop(key)) for key in ("data", "model", "train")}
    model = sections["model"].pop("name")
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return Recipe(name=name, users=record.pop("users", None), model=model, values=values, **record)
