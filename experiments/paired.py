"""The families of a study at the top of their ladders, held against one another on the users they share.

All trials of a ranking study are evaluated on the same impressions, and each keeps what every user added to its NE
(``users.npz``). So the noise of a difference between two families is known from the records: most of what one draw of
users does to a NE it does to all of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.folder import trial_folder
from genrec_jax.noise import Difference, UserSums, difference
from genrec_jax.train.places import Place
from genrec_jax.train.record import read_users

Row = Mapping[str, Any]
_BASE = "dlrm"
_SAME = 1.05  # FLOPs that differ by less are not two rungs


@dataclass(frozen=True)
class Top:
    """A family's configuration nearest to the largest compute that all families reached, one trial per seed."""

    study: str
    family: str
    label: str
    train_flops: float
    trials: tuple[str, ...]


@dataclass(frozen=True)
class Apart:
    """Two families of a study at their tops; NE averaged over seeds, ``users`` evaluated."""

    base: Top
    new: Top
    base_ne: float
    new_ne: float
    users: int
    apart: Difference


def families_apart(out: Place, rows: Sequence[Row]) -> list[Apart]:
    """Every family against DLRM, or against the first by name where that is not among them.

    ``rows``: the results table of OUT. Families of one study, dataset and set of impressions are compared, where the
    finished trials at their tops hold what is needed; without two such families there is nothing to say.
    """
    found = []
    for group in tops(rows):
        known = [top for top in group if users_of(out, top.trials)]
        base = next((top for top in known if top.family == _BASE), known[0] if known else None)
        found += [_apart(out, base, new) for new in known if base is not None and new is not base]
    return found


def tops(rows: Sequence[Row]) -> list[list[Top]]:
    """The families of each study along compute, by name, at the largest compute that all of them reached; each set of
    impressions by itself.

    A family with several configurations of that compute has no top: no one of them stands for it.
    """
    return [_tops(study, part) for study, part in _sections(rows)]


def users_of(out: Place, trials: Sequence[str]) -> list[UserSums]:
    """What the users of each trial added to its NE; nothing if one of them has no such record."""
    found = [read_users(trial_folder(out, name) / "users.npz") for name in trials]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else []


def remarks(found: Sequence[Apart]) -> list[str]:
    """One paragraph per study and dataset: how far apart its families are, and how much of that is noise."""
    groups: dict[Top, list[Apart]] = {}
    for one in found:
        groups.setdefault(one.base, []).append(one)
    return [_paragraph(group) for group in groups.values()]


def plus_minus(apart: Difference) -> str:
    """A difference with its paired standard error."""
    return f"{apart.value:+.4f} ± {apart.error:.4f}"


def _apart(out: Place, base: Top, new: Top) -> Apart:
    own, other = users_of(out, base.trials), users_of(out, new.trials)
    base_ne, new_ne = (float(np.mean([one.mean_ne() for one in side])) for side in (own, other))
    return Apart(base, new, base_ne, new_ne, len(own[0].users), difference(own, other))


def _sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(study, its finished trials) of one set of impressions; of studies along compute alone."""
    parts: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        if row["axis"] == "train_flops" and row["status"] == "done" and row.get("eval_set"):
            parts.setdefault((row["study"], row["eval_set"]), []).append(row)
    for (study, _), part in parts.items():
        yield study, part


def _tops(study: str, rows: Sequence[Row]) -> list[Top]:
    families: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        families.setdefault(row["family"], {}).setdefault(row["label"], []).append(row)
    ladders = {
        family: [_top(study, family, label, own) for label, own in found.items()] for family, found in families.items()
    }
    reached = min((max(one.train_flops for one in ladder) for ladder in ladders.values()), default=0.0)
    found = []
    for family in sorted(ladders):
        by_distance = sorted(ladders[family], key=lambda one: abs(math.log(one.train_flops / reached)))
        near = [one for one in ladders[family] if 1 / _SAME < one.train_flops / by_distance[0].train_flops < _SAME]
        found += near if len(near) == 1 else []
    return found


def _top(study: str, family: str, label: str, rows: Sequence[Row]) -> Top:
    flops = float(np.mean([row["train_flops"] for row in rows]))
    return Top(study, family, label, flops, tuple(sorted({row["trial"] for row in rows})))


def _paragraph(group: Sequence[Apart]) -> str:
    first = group[0]
    flops = [top.train_flops for one in group for top in (one.base, one.new)]
    seeds = {len(top.trials) for one in group for top in (one.base, one.new)}
    most = f"up to {max(seeds)} seeds" if len(seeds) > 1 else f"{max(seeds)} seed{'s' * (max(seeds) > 1)}"
    said = [
        f"{one.new.family} {plus_minus(one.apart)} (95 % {one.apart.low:+.4f} to {one.apart.high:+.4f})"
        for one in group
    ]
    unpaired = [one.apart.unpaired for one in group]
    width = f"{min(unpaired):.4f}" if len(unpaired) == 1 else f"{min(unpaired):.4f} to {max(unpaired):.4f}"
    return (
        f"At the largest compute that all families reached ({min(flops):.1e} to {max(flops):.1e} FLOPs), NE against "
        f"{first.base.family}'s {first.base_ne:.4f}: {', '.join(said)}. The errors are those of the draw of the "
        f"{first.users:,} evaluation users, who are the same for both (paired; with users of its own for each family "
        f"they would be {width}); families are averaged over {most}, whose noise comes on top."
    )
