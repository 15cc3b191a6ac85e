"""Log and side files read in bounded chunks of rows: parquet, and text as columns of strings.

Text is read as blocks of whole lines, so that every complaint can name a line; nothing is inferred from text here.
``.csv`` and ``.tsv`` have a header and may quote values; ``.inter``, ``.item`` and ``.user`` are tab separated with
``name:type`` headers; ``.dat`` is ``::`` separated, latin-1 and has no header: its columns are named 1, 2, ...
"""

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from genrec_jax.errors import UserError

CHUNK_ROWS = 1 << 18
_LINE_BYTES = 64
_SHORT_LINE = 16  # bytes


class Position(NamedTuple):
    """A place in a file between two rows: byte (of text) and the number of the next row (of the line, for text);
    ``blank``: the number of a blank line before it, which must be the end of the file, or 0."""

    byte: int = 0
    next: int = 1
    blank: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one file; ``first`` is the number of the first row (of the line, for text).

    end: where the next chunk begins. size: the chunk's share of the file in bytes.
    """

    path: Path
    unit: str
    first: int
    columns: Mapping[str, pa.Array]
    rows: int
    end: Position
    size: int

    def where(self, row: int) -> str:
        """Names row ``row`` (0-based within the chunk) to the user: ``log.csv, line 7``."""
        return f"{self.path}, {self.unit} {self.first + row}"


@dataclasses.dataclass(frozen=True)
class _TextFormat:
    separator: bytes
    quoted: bool
    header: bool
    typed: bool = False
    encoding: str = "utf-8"


_RECBOLE = _TextFormat(b"\t", quoted=False, header=True, typed=True)
_TEXT_FORMATS = {
    ".csv": _TextFormat(b",", quoted=True, header=True),
    ".tsv": _TextFormat(b"\t", quoted=True, header=True),
    ".dat": _TextFormat(b"::", quoted=False, header=False, encoding="latin-1"),
    ".inter": _RECBOLE,
    ".item": _RECBOLE,
    ".user": _RECBOLE,
}
EXTENSIONS = (".parquet", *_TEXT_FORMATS)


@dataclasses.dataclass(frozen=True)
class LogFile:
    """An opened file: the kind of each column that will be read, and the number of rows where the format tells it.

    Kinds are ``integer``, ``float``, ``boolean``, ``text``, ``timestamp[unit]``, an Arrow type that no role accepts,
    or ``untyped`` for columns of text files.
    """

    path: Path
    kinds: Mapping[str, str]
    rows: int | None
    header: bool = True

    @property
    def most_rows(self) -> int:
        """The number of rows, or what a text file of its size can hardly hold more of."""
        return self.rows if self.rows is not None else self.path.stat().st_size // _SHORT_LINE + 1

    def chunks(self, chunk_rows: int = CHUNK_ROWS, start: Position | None = None) -> Iterator[Chunk]:
        """Chunks of ``chunk_rows`` rows (text: lines of 64 bytes) in file order, holding the columns of ``kinds``;
        from the ``end`` of an earlier chunk on, if ``start`` is given."""
        columns = list(self.kinds)
        if self.path.suffix == ".parquet":
            return _parquet_chunks(self.path, columns, chunk_rows, start or Position())
        return _text_chunks(self.path, _text_format(self.path, self.header), columns, chunk_rows, start)


def _text_format(path: Path, header: bool) -> _TextFormat:
    form = _TEXT_FORMATS[path.suffix]
    return form if header else dataclasses.replace(form, header=False)


def open_log(path: Path, columns: Mapping[str, str], *, header: bool = True) -> LogFile:
    """Checks that ``path`` is readable and has ``columns`` (name -> role); without ``header`` those of a text file are
    called 1, 2, ... Raises UserError naming file and column.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a log file")
    if path.suffix == ".parquet":
        schema, rows = _parquet_schema(path)
        _check_header(schema.names, columns, path)
        if not rows:  # before the types: the columns of an empty table often have none
            raise UserError(f"{path} has no rows")
        return LogFile(path, {column: _kind(schema.field(column).type) for column in columns}, rows)
    if path.suffix not in _TEXT_FORMATS:
        raise UserError(f"{path} has extension {path.suffix!r}; logs are read from {', '.join(EXTENSIONS)}")
    with path.open("rb") as file:
        names, _ = _header(file, _text_format(path, header), path)
    _check_header(names, columns, path)
    return LogFile(path, dict.fromkeys(columns, "untyped"), None, header)


def _check_header(header: Sequence[str], columns: Mapping[str, str], path: Path) -> None:
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path} has two columns named {name!r}")
    for column, role in columns.items():
        if column not in header:
            raise UserError(f"{path} has no column {column!r} (for {role}); its columns are {', '.join(header)}")


def _kind(kind: Any) -> str:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_timestamp(kind):
        return f"timestamp[{kind.unit}]"
    tests = {
        "integer": pa.types.is_integer,
        "float": pa.types.is_floating,
        "boolean": pa.types.is_boolean,
        "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t),
    }
    return next((name for name, test in tests.items() if test(kind)), str(kind))


def _parquet_schema(path: Path) -> tuple[Any, int]:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file (truncated?): {_one_line(error)}") from None


def _parquet_chunks(path: Path, columns: list[str], chunk_rows: int, start: Position) -> Iterator[Chunk]:
    first = start.next
    try:
        # Pages are read as they are needed: a file of one huge row group must not be held at once.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            row_bytes = path.stat().st_size / int(ends[-1])
            group = int(np.searchsorted(ends, first - 1, side="right"))
            skip = first - 1 - int(ends[group] - sizes[group]) if group < len(sizes) else 0
            groups = list(range(group, len(sizes)))
            for batch in file.iter_batches(chunk_rows, row_groups=groups, columns=columns, use_threads=False):
                skipped, skip = min(skip, batch.num_rows), max(skip - batch.num_rows, 0)
                rows = batch.num_rows - skipped
                if rows:
                    arrays = {name: _plain(batch.column(name).slice(skipped)) for name in columns}
                    size = int((first - 1 + rows) * row_bytes) - int((first - 1) * row_bytes)
                    yield Chunk(path, "row", first, arrays, rows, Position(next=first + rows), size)
                first += rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read after row {first - 1}: {_one_line(error)}") from None


def _plain(array: Any) -> Any:
    """Undoes dictionary encoding, and makes a missing value of an empty text, as it is in text files."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _kind(array.type) == "text":
        array = array.cast(pa.string())
        return pa.compute.if_else(pa.compute.equal(array, ""), pa.scalar(None, pa.string()), array)
    return array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _header(file: BinaryIO, form: _TextFormat, path: Path) -> tuple[list[str], int]:
    """Column names, and the number of the first data line, at which ``file`` is left."""
    line = file.readline()
    if not line.strip():
        raise UserError(f"{path} is empty" if not line else f"{path}, line 1 is blank")
    text = _decoded(line, form, path, 1).rstrip("\r\n").removeprefix("\ufeff")
    if not form.header:
        file.seek(0)
        return [str(i + 1) for i in range(text.count(form.separator.decode()) + 1)], 1
    separator = form.separator.decode()
    names = next(csv.reader([text], delimiter=separator)) if form.quoted else text.split(separator)
    return [name.partition(":")[0] if form.typed else name for name in names], 2


def _decoded(data: bytes, form: _TextFormat, path: Path, first: int) -> str:
    try:
        return data.decode(form.encoding)
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line} is not {form.encoding.upper()} text") from None


def _text_chunks(
    path: Path, form: _TextFormat, columns: list[str], chunk_rows: int, start: Position | None
) -> Iterator[Chunk]:
    with path.open("rb") as file:
        header, first = _header(file, form, path)
        blank = 0  # the number of a blank line that must be the file's end
        if start is not None:
            file.seek(start.byte)
            first, blank = start.next, start.blank
        begin = file.tell() if start is not None else 0
        # Blocks are measured in bytes: lines of any length must not make a chunk large.
        while lines := file.readlines(chunk_rows * _LINE_BYTES):
            count = len(lines)
            while lines and not lines[-1].strip():
                lines.pop()
            if lines and blank:
                raise UserError(f"{path}, line {blank} is blank")
            if len(lines) < count and not blank:
                blank = first + len(lines)
            if lines:
                table = _parse(lines, form, header, columns, path, first)
                arrays = {name: table.column(name).combine_chunks() for name in columns}
                end = Position(file.tell(), first + count, blank)
                yield Chunk(path, "line", first, arrays, len(lines), end, end.byte - begin)
                begin = end.byte
            first += count


def _parse(lines: list[bytes], form: _TextFormat, header: list[str], columns: list[str], path: Path, first: int) -> Any:
    """One block of whole lines as string columns; refuses ragged rows and values that hold a line break."""
    data = b"".join(lines)
    text = _decoded(data, form, path, first)  # Arrow's own check does not say which line
    separator = form.separator
    if len(separator) > 1:  # Arrow separates by one byte only
        data, separator = text.encode().replace(separator, b"\x1f"), b"\x1f"
    ragged: list[Any] = []

    def skip(row: Any) -> str:
        ragged.append(row)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            # One thread and one block: otherwise the handler is not told the line.
            pyarrow.csv.ReadOptions(column_names=header, use_threads=False, block_size=len(data) + 1),
            pyarrow.csv.ParseOptions(
                delimiter=separator.decode(),
                quote_char='"' if form.quoted else False,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
                check_utf8=False,
            ),
        )
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read after line {first - 1}: {_one_line(error)}") from None
    # An open quote swallows line ends, which also makes a ragged row far from the fault: look for it first.
    if table.num_rows + len(ragged) != len(lines):
        raise UserError(f"{path}, line {first + _broken(lines)} has an unclosed quote or a line break inside a value")
    for row in ragged:
        raise UserError(
            f"{path}, line {first + row.number - 1} has {row.actual_columns} fields instead of {row.expected_columns}"
        )
    return table


def _broken(lines: list[bytes]) -> int:
    """The first line that cannot be a row of its own: it leaves a quote open or holds a carriage return."""
    return next((i for i, line in enumerate(lines) if line.count(b'"') % 2 or b"\r" in line.rstrip(b"\r\n")), 0)
