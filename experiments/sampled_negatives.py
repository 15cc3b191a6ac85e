"""A log of clicks as impressions: with every click, items that others had just clicked and this user had not.

    python -m experiments.sampled_negatives DATA --out OUT --negatives 3 --users 0.09

A log of clicks alone does not say what else was shown, so no ranker can be trained on it. As is done in the evaluation
of news recommenders (Moreira et al., "CHAMELEON", DLRS 2018), the items of the last clicks of all users, as often as
they were clicked, stand in for what was shown: popularity alone tells little. The task is ``click``; a click and its
negatives are one request, in random order, and later requests have all of them in their history.

The past must not give the label away. So what the user clicked before is neither shown nor clicked again (a second
click is left out), and what the user will click later may well be shown: otherwise a thing once shown in vain would be
known never to be clicked.

Every item of a request has the features of the click (where it came from, on what device). ``--without`` leaves out
those that a server would not know yet, or whose worth is to be told by their absence.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from genrec_jax.data.catalog import load_any
from genrec_jax.data.schema import Schema
from genrec_jax.data.sequences import Sequences, load, save
from genrec_jax.data.splits import kept_users
from genrec_jax.errors import UserError

_ROUNDS = 100  # of drawing again what may not stand beside a click


def sample_negatives(
    sequences: Sequences,
    out: Path,
    *,
    negatives: int = 3,
    recent: int = 5000,
    users: float = 1.0,
    seed: int = 0,
    without: Sequence[str] = (),
) -> Sequences:
    """Writes the dataset: for each click of a share ``users`` of the users, ``negatives`` distinct items from among
    the ``recent`` clicks of all users before it, none of which the user has clicked by then. Features named in
    ``without`` are left out; the draw does not depend on them.

    Left out: the first ``recent`` clicks of the log, which have too few before them; a user's second click on an item;
    clicks whose recent items are the user's own but for a few. Raises UserError for a dataset with labels or requests,
    for numbers that make no sense, for a feature that is not there, and if no click is left.
    """
    if sequences.schema.tasks or sequences.request is not None:
        raise UserError(f"dataset {sequences.name!r} has labels or requests: what was shown is known")
    if negatives < 1 or recent < negatives or not 0 < users <= 1:
        raise UserError("--negatives must be 1 at least, --recent no less than that, --users a share in (0, 1]")
    known = [feature.name for feature in sequences.schema.features]
    if unknown := [name for name in without if name not in known]:
        raise UserError(
            f"dataset {sequences.name!r} has no feature {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    features = tuple(feature for feature in sequences.schema.features if feature.name not in without)
    kept = kept_users(sequences.users, users)
    owner = np.repeat(np.arange(sequences.users), np.diff(sequences.offsets))
    item = np.asarray(sequences.item).astype(np.int64)
    order = np.argsort(np.asarray(sequences.time), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    clicked = _Clicked(owner[order], item[order])
    clicks = np.flatnonzero(kept[owner] & (place >= recent) & ~clicked(owner, item, place - 1))
    rng = np.random.default_rng(seed)
    drawn, good = _draw(rng, item[order], place[clicks], owner[clicks], clicked, negatives, recent)
    clicks, shown = clicks[good], np.concatenate([item[clicks][:, None], drawn], axis=1)[good]
    if not len(clicks):
        raise UserError(f"dataset {sequences.name!r}: no click has {negatives} other items among the {recent} before")

    shuffled = np.argsort(rng.random(shown.shape), axis=1)
    several = np.repeat(clicks, negatives + 1)
    active = np.unique(owner[clicks])
    counts = np.bincount(owner[clicks], minlength=sequences.users)[active] * (negatives + 1)
    rows: dict[str, Any] = {"user": active, "item": slice(None), "event": several}
    return save(
        out,
        name=f"{sequences.name}, sampled negatives",
        schema=Schema(sequences.schema.items, ("click",), features),
        origin=sequences.origin,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item=np.take_along_axis(shown, shuffled, axis=1).ravel(),
        time=np.asarray(sequences.time)[several],
        labels=(shuffled == 0).reshape(-1, 1),
        request=np.repeat(np.arange(len(clicks)), negatives + 1),
        features={f.name: np.asarray(sequences.features[f.name])[rows[f.level]] for f in features},
        source={
            "from": sequences.digest,
            "clicks": len(clicks),
            "notes": [
                f"What was shown beside a click is not known: the items of {negatives} of the last {recent:,} clicks "
                "stand in for it, none of them clicked by the same user before."
            ],
            **{"negatives": negatives, "recent": recent, "users": users, "seed": seed},
            **({"without": sorted(without)} if without else {}),
        },
    )


class _Clicked:
    """Who had clicked what by when; made of the users and items of all clicks in the order of time."""

    def __init__(self, user: np.ndarray, item: np.ndarray):
        self._items = int(item.max(initial=0)) + 1
        self._pairs, self._first = np.unique(user * self._items + item, return_index=True)

    def __call__(self, user: np.ndarray, item: np.ndarray, by: np.ndarray) -> np.ndarray:
        """Whether each user had clicked the item at place ``by`` of the order or before: bool, broadcast."""
        pairs = user * self._items + item
        found = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        return (self._pairs[found] == pairs) & (self._first[found] <= by)


def _draw(
    rng: np.random.Generator,
    by_time: np.ndarray,
    place: np.ndarray,
    user: np.ndarray,
    clicked: _Clicked,
    negatives: int,
    recent: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Items [clicks, negatives] for the clicks at ``place`` in the order of time, and which rows of them are complete.

    What the user has clicked, and what stands in the row already, is drawn again.
    """
    drawn = np.zeros((len(place), negatives), np.int64)
    bad = np.ones_like(drawn, bool)
    for _ in range(_ROUNDS):
        row, column = np.nonzero(bad)
        if not len(row):
            break
        drawn[row, column] = by_time[place[row] - 1 - rng.integers(0, recent, len(row))]
        rows = np.unique(row)
        found = drawn[rows]
        twice = np.tril(found[:, :, None] == found[:, None, :], -1).any(axis=2)
        bad[rows] = twice | clicked(user[rows][:, None], found, place[rows][:, None])
    return drawn, ~bad.any(axis=1)


def main(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    negatives: int = 3,
    recent: int = 5000,
    users: float = 1.0,
    seed: int = 0,
    without: tuple[str, ...] = (),
) -> int:
    """Write the clicks of DATA (a dataset folder, or that of a known raw dataset) with sampled negatives to OUT.

    Args:
        data: A dataset without labels.
        out: Folder of the new dataset.
        negatives: Items beside each click.
        recent: Clicks of all users before it that they are drawn from.
        users: Share of the users whose clicks are written.
        seed: Of the draw.
        without: Features to leave out.
    """
    try:
        clicks = load(load_any(data))
        made = sample_negatives(
            clicks, out, negatives=negatives, recent=recent, users=users, seed=seed, without=without
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made.name}: {made.events:,} impressions of {made.users:,} users in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
