"""What the columns of a log mean: the mapping a user writes on the command line or in a small TOML file.

Grammar of the short texts:

- label: ``NAME=COL`` (the column holds 0 and 1), ``NAME=COL>=X`` or ``NAME=COL==X`` (a missing value counts as 0);
- feature: ``NAME=COL``, or ``NAME=COL[SEP]`` where the column holds several categories joined by SEP (``genres=3[|]``).

The TOML file holds the fields of :func:`parse_mapping` by name, and one ``[[table]]`` per side table::

    user = "user_id"
    item = "movie_id"
    time = "timestamp"
    labels = ["like=rating>=4"]

    [[table]]
    level = "item"
    file = "movies.csv"        # relative to the TOML file
    key = "movie_id"
    features = ["genres=genres[|]"]
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from genrec_jax.data.schema import Level
from genrec_jax.errors import UserError

TimeUnit = Literal["s", "ms", "us", "ns"]
UNITS_PER_SECOND: Mapping[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_NAME = r"(?P<name>[A-Za-z_]\w*)"
_LABEL = re.compile(_NAME + r"=(?P<column>[^=<>]+?)(?:(?P<test>>=|==)(?P<value>-?\d+(?:\.\d+)?))?")
_FEATURE = re.compile(_NAME + r"=(?P<column>[^\[\]]+)(?:\[(?P<separator>.+)\])?")

# File names that the event columns of a dataset folder already use.
_RESERVED = frozenset({"item", "time", "labels", "request"})


@dataclasses.dataclass(frozen=True)
class Label:
    """Task ``name`` is 1 where ``column`` is 1, or where ``column test value`` holds (missing: 0)."""

    name: str
    column: str
    test: Literal[">=", "=="] | None = None
    value: float = 0.0


@dataclasses.dataclass(frozen=True)
class FeatureColumn:
    """Categorical feature ``name`` read from ``column``; with ``separator`` a value holds several categories."""

    name: str
    column: str
    separator: str | None = None


@dataclasses.dataclass(frozen=True)
class SideTable:
    """A file with one row per user or item, joined by its column ``key``.

    An item table is the catalogue: its rows, in file order, are the item vocabulary, events or not, and an event with
    an item outside it is refused. Users that a user table lacks get category 0 (unknown).
    """

    level: Literal["user", "item"]
    file: Path
    key: str
    features: tuple[FeatureColumn, ...]


@dataclasses.dataclass(frozen=True)
class LogMapping:
    """Which columns of a log are what. Make one with :func:`parse_mapping` or :func:`read_mapping`.

    Events are sorted by (user, time, ``order`` if given, file order). ``time_unit`` is the unit of a numeric time
    column; date-time columns carry their own. ``promise_sorted`` says that times never decrease within a user in file
    order, and has it checked. ``features`` are columns of the log itself; a user's or item's must not vary.
    ``min_events``: leave out events whose user or item has fewer in the whole log, counted once, and then users who are
    left with fewer; items stay in the vocabulary. ``header``: whether the first line of a CSV or TSV file names the
    columns; else they are called 1, 2, ...
    """

    user: str
    item: str
    time: str
    labels: tuple[Label, ...] = ()
    request: str | None = None
    order: str | None = None
    time_unit: TimeUnit = "s"
    features: tuple[tuple[Level, FeatureColumn], ...] = ()
    tables: tuple[SideTable, ...] = ()
    promise_sorted: bool = False
    min_events: int = 0
    header: bool = True

    def __post_init__(self) -> None:
        if self.min_events and (self.tables or any(level != "event" for level, _ in self.features)):
            raise UserError("rare users and items cannot be left out of a log with features of users or items")
        if self.time_unit not in get_args(TimeUnit):
            raise UserError(f"time unit {self.time_unit!r} is not one of s, ms, us, ns (it is never guessed)")
        _refuse_repeats([label.name for label in self.labels], "label")
        names = [feature.name for _, feature in self.features]
        _refuse_repeats(names + [feature.name for table in self.tables for feature in table.features], "feature")
        _refuse_repeats([table.level for table in self.tables], "side table of level")
        for level, feature in self.features:
            if level == "event" and feature.name in _RESERVED:
                raise UserError(f"an event feature cannot be named {feature.name!r}: that is a column of every dataset")
            if feature.separator is not None:
                raise UserError(f"feature {feature.name!r} has a separator; only side tables hold several categories")

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the log that are read, each with its first role (``user``, ``label like``, ...)."""
        roles = {"user": self.user, "item": self.item, "time": self.time, "request": self.request, "order": self.order}
        pairs = [(column, role) for role, column in roles.items() if column is not None]
        pairs += [(label.column, f"label {label.name}") for label in self.labels]
        pairs += [(feature.column, f"feature {feature.name}") for _, feature in self.features]
        columns: dict[str, str] = {}
        for column, role in pairs:
            columns.setdefault(column, role)
        return columns

    def to_json(self) -> dict[str, Any]:
        """The mapping as plain values, for provenance; side tables by file name alone."""
        record = dataclasses.asdict(self)
        for table in record["tables"]:
            table["file"] = table["file"].name
        return record


def _refuse_repeats(names: list[Any], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{what} {name!r} is given more than once")


def parse_label(text: str) -> Label:
    """``NAME=COL``, ``NAME=COL>=X`` or ``NAME=COL==X``."""
    match = _LABEL.fullmatch(text)
    if match is None:
        raise UserError(f"label {text!r} is not NAME=COL, NAME=COL>=NUMBER or NAME=COL==NUMBER")
    test: Any = match["test"]
    return Label(match["name"], match["column"], test, float(match["value"] or 0))


def parse_feature(text: str) -> FeatureColumn:
    """``NAME=COL`` or ``NAME=COL[SEP]``."""
    match = _FEATURE.fullmatch(text)
    if match is None:
        raise UserError(f"feature {text!r} is not NAME=COL or NAME=COL[SEPARATOR]")
    return FeatureColumn(match["name"], match["column"], match["separator"])


def parse_mapping(
    *,
    user: str,
    item: str,
    time: str,
    labels: Iterable[str] = (),
    request: str | None = None,
    order: str | None = None,
    time_unit: str = "s",
    user_features: Iterable[str] = (),
    item_features: Iterable[str] = (),
    event_features: Iterable[str] = (),
    tables: Iterable[SideTable] = (),
    promise_sorted: bool = False,
) -> LogMapping:
    """A mapping from the short texts of the command line. Raises UserError on a text it cannot read."""
    levels: list[tuple[Level, Iterable[str]]] = [
        ("user", user_features),
        ("item", item_features),
        ("event", event_features),
    ]
    unit: Any = time_unit  # LogMapping checks it
    return LogMapping(
        user=user,
        item=item,
        time=time,
        labels=tuple(parse_label(text) for text in labels),
        request=request,
        order=order,
        time_unit=unit,
        features=tuple((level, parse_feature(text)) for level, texts in levels for text in texts),
        tables=tuple(tables),
        promise_sorted=promise_sorted,
    )


_TEXT, _TEXTS = "a text", "a list of texts"
_FIELDS = {
    "user": _TEXT,
    "item": _TEXT,
    "time": _TEXT,
    "labels": _TEXTS,
    "request": _TEXT,
    "order": _TEXT,
    "time_unit": _TEXT,
    "user_features": _TEXTS,
    "item_features": _TEXTS,
    "event_features": _TEXTS,
    "promise_sorted": "true or false",
}
_TABLE_FIELDS = {"level": _TEXT, "file": _TEXT, "key": _TEXT, "features": _TEXTS}


def read_mapping(path: str | Path) -> LogMapping:
    """Reads a mapping from a TOML file (module docstring). Raises UserError naming the file and the key at fault."""
    path = Path(path)
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not a readable TOML file: {error}") from None
    tables = record.pop("table", [])
    if not isinstance(tables, list):
        raise UserError(f"{path}: write side tables as [[table]]")
    _check_fields(record, _FIELDS, ("user", "item", "time"), path)
    try:
        return parse_mapping(**record, tables=[_table(table, path) for table in tables])
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def _table(record: Any, path: Path) -> SideTable:
    _check_fields(record, _TABLE_FIELDS, tuple(_TABLE_FIELDS), path)
    if record["level"] not in ("user", "item"):
        raise UserError(f"{path}: side table level {record['level']!r} is neither 'user' nor 'item'")
    features = tuple(parse_feature(text) for text in record["features"])
    return SideTable(record["level"], path.parent / record["file"], record["key"], features)


def _check_fields(record: Any, fields: Mapping[str, str], required: tuple[str, ...], path: Path) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{path}: write side tables as [[table]]")
    for key, value in record.items():
        if key not in fields:
            raise UserError(f"{path}: unknown key {key!r} (known: {', '.join(fields)})")
        right = {
            _TEXT: isinstance(value, str),
            _TEXTS: isinstance(value, list) and all(isinstance(v, str) for v in value),
            "true or false": isinstance(value, bool),
        }
        if not right[fields[key]]:
            raise UserError(f"{path}: key {key!r} must be {fields[key]}")
    for key in required:
        if key not in record:
            raise UserError(f"{path}: key {key!r} is missing")
