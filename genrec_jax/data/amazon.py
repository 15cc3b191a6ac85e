"""Amazon product reviews 2014, 5-core (McAuley et al., SIGIR 2015): a log of purchases without labels."""

from pathlib import Path

from genrec_jax.data.log import LogMapping
from genrec_jax.data.raw import RawDataset


def beauty(folder: Path) -> RawDataset | None:
    """``reviews.parquet`` with user, item, timestamp (days, in seconds) and pos, which orders a day; else None."""
    reviews = folder / "reviews.parquet"
    if not reviews.is_file():
        return None
    return RawDataset("amazon-beauty", (reviews,), LogMapping("user", "item", "timestamp", order="pos"))
