"""Amazon product reviews 2014 (McAuley et al., SIGIR 2015): logs of purchases without labels."""

from pathlib import Path

from genrec_jax.data.log import LogMapping
from genrec_jax.data.raw import RawDataset


def beauty(folder: Path) -> RawDataset | None:
    """The 5-core of Beauty: ``reviews.parquet`` with user, item, timestamp (days, in seconds), and pos, which orders a
    day; else None."""
    reviews = folder / "reviews.parquet"
    if not reviews.is_file():
        return None
    return RawDataset("amazon-beauty", (reviews,), LogMapping("user", "item", "timestamp", order="pos"))


def books(folder: Path) -> RawDataset | None:
    """``ratings_Books.csv`` of the SNAP archive (user, item, rating, time, no header); else None.

    Left out is what HSTU's public code leaves out: events whose user or item has fewer than five, counted once on the
    whole log, then users who are left with fewer than five.
    """
    ratings = folder / "ratings_Books.csv"
    if not ratings.is_file():
        return None
    return RawDataset("amazon-books", (ratings,), LogMapping("1", "2", "4", min_events=5, header=False))
