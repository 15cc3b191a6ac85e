"""``genrec data import``: a column mapping from flags or a file, or a raw dataset that is known by its file names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genrec_jax.data.catalog import recognise
from genrec_jax.data.importer import import_log
from genrec_jax.data.log import LogMapping, parse_mapping, read_mapping
from genrec_jax.errors import UserError


def import_command(
    files: Sequence[Path],
    out: Path,
    columns: Mapping[str, str | None],
    options: Mapping[str, Any],
    *,
    mapping_file: Path | None,
    quiet: bool,
) -> None:
    """Imports ``files`` into ``out``. ``columns``: user, item, time, request; ``options``: of ``parse_mapping``."""
    raw = recognise(files[0]) if len(files) == 1 and files[0].is_dir() else None
    named = [name for name, column in columns.items() if column is not None]
    if raw is not None and mapping_file is None and not named:
        import_log(raw.files, raw.mapping, out, name=raw.name, quiet=quiet)
        return
    import_log(files, _mapping(columns, named, options, mapping_file), out, quiet=quiet)


def _mapping(
    columns: Mapping[str, str | None], named: list[str], options: Mapping[str, Any], mapping_file: Path | None
) -> LogMapping:
    if mapping_file is not None:
        if named:
            raise UserError(f"--mapping {mapping_file} and --{named[0]} both name columns; give one of the two")
        return read_mapping(mapping_file)
    for name in ("user", "item", "time"):
        if columns[name] is None:
            raise UserError(f"--{name} is missing: name the log's {name} column, or give --mapping FILE.toml")
    return parse_mapping(**{name: columns[name] for name in named}, **options)  # type: ignore[arg-type]
