"""Globo.com news clicks (Moreira et al., "CHAMELEON", 2018): a log of clicks with their context, without labels."""

from pathlib import Path

from genrec_jax.data.log import parse_mapping
from genrec_jax.data.raw import RawDataset

_CONTEXT = ("environment", "deviceGroup", "os", "country", "region", "referrer_type")


def clicks(folder: Path) -> RawDataset | None:
    """``clicks.parquet`` with user_id, click_article_id, click_timestamp (ms) and click_* context; else None."""
    log = folder / "clicks.parquet"
    if not log.is_file():
        return None
    mapping = parse_mapping(
        user="user_id",
        item="click_article_id",
        time="click_timestamp",
        time_unit="ms",
        event_features=[f"{name}=click_{name}" for name in _CONTEXT],
    )
    return RawDataset("globo", (log,), mapping)
