"""MovieLens (Harper and Konstan, ACM TiiS 5(4), 2015): which columns of its folders are what.

Tasks: ``like`` is rating >= 4, ``love`` is rating == 5. Users have gender, age and occupation, movies their genres; the
item vocabulary is the whole catalogue, in its file's order, rated or not.
"""

from pathlib import Path

from genrec_jax.data.log import FeatureColumn, LogMapping, SideTable, parse_label
from genrec_jax.data.raw import RawDataset

_NOTES = (
    "A third of the ratings (33.5 %) are known only as 1 to 3, so neither like nor love; a 4 or a 5 is always known.",
    "30 % of the timestamps are interpolated between exact neighbours; the order of a user's events is exact.",
)


def ml_1m(folder: Path) -> RawDataset | None:
    """The 1M release: ``users.dat``, ``movies.dat`` and ``ratings.dat``, or the same ratings as ``ratings.parquet``.

    In ``ratings.parquet`` (user_id, movie_id, timestamp, like, rating, time_rank) a rating may be missing where it is
    known not to be a like; ``time_rank`` orders equal times. Returns None if ``folder`` is neither.
    """
    users = (FeatureColumn("gender", "2"), FeatureColumn("age", "3"), FeatureColumn("occupation", "4"))
    tables = (
        SideTable("user", folder / "users.dat", "1", users),
        SideTable("item", folder / "movies.dat", "1", (FeatureColumn("genres", "3", "|"),)),
    )
    parquet, original = folder / "ratings.parquet", folder / "ratings.dat"
    if not all(table.file.is_file() for table in tables):
        return None
    if parquet.is_file():
        labels = (parse_label("like=like"), parse_label("love=rating==5"))
        mapping = LogMapping("user_id", "movie_id", "timestamp", labels, order="time_rank", tables=tables)
        return RawDataset("ml-1m", (parquet,), mapping, _NOTES)
    if original.is_file():
        labels = (parse_label("like=3>=4"), parse_label("love=3==5"))
        return RawDataset("ml-1m", (original,), LogMapping("1", "2", "4", labels, tables=tables))
    return None


def ml_100k(folder: Path) -> RawDataset | None:
    """The 100K release as RecBole's atomic files ``ml-100k.inter``, ``.item`` and ``.user``; else None."""
    log, items, users = (folder / f"ml-100k.{kind}" for kind in ("inter", "item", "user"))
    if not (log.is_file() and items.is_file() and users.is_file()):
        return None
    traits = tuple(FeatureColumn(name, name) for name in ("gender", "age", "occupation"))
    tables = (
        SideTable("user", users, "user_id", traits),
        SideTable("item", items, "item_id", (FeatureColumn("genres", "class", " "),)),
    )
    labels = (parse_label("like=rating>=4"), parse_label("love=rating==5"))
    return RawDataset("ml-100k", (log,), LogMapping("user_id", "item_id", "timestamp", labels, tables=tables))


def ml_20m(folder: Path) -> RawDataset | None:
    """The releases since 2015 (20M, 25M, 32M, latest): ``ratings.csv`` and ``movies.csv``; named as the folder is."""
    ratings, movies = folder / "ratings.csv", folder / "movies.csv"
    if not (ratings.is_file() and movies.is_file()):
        return None
    tables = (SideTable("item", movies, "movieId", (FeatureColumn("genres", "genres", "|"),)),)
    labels = (parse_label("like=rating>=4"), parse_label("love=rating==5"))
    mapping = LogMapping("userId", "movieId", "timestamp", labels, tables=tables)
    return RawDataset(folder.resolve().name, (ratings,), mapping)
