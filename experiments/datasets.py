"""``genrec data``: a column mapping from flags or a file, a raw dataset known by its file names, a world's settings."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genrec_jax.data.catalog import recognise
from genrec_jax.data.importer import import_log
from genrec_jax.data.log import LogMapping, parse_mapping, read_mapping
from genrec_jax.data.synthetic.world import World, preset
from genrec_jax.errors import UserError

# Settings that hold several values have a flag that is repeated, in the singular.
_FLAGS = {
    "labels": "label",
    "user_features": "user-feature",
    "item_features": "item-feature",
    "event_features": "event-feature",
    "time_unit": "time-unit",
    "promise_sorted": "promise-sorted",
}


def import_command(
    files: Sequence[Path],
    out: Path,
    given: Mapping[str, Any],
    *,
    mapping_file: Path | None,
    workers: int,
    memory_mib: int,
    quiet: bool,
) -> None:
    """Imports ``files`` into ``out``. ``given``: the arguments of ``parse_mapping`` that the user gave, no others."""
    if memory_mib < 1:
        raise UserError(f"--memory-mib must be 1 at least, not {memory_mib}")
    how: dict[str, Any] = {"workers": workers, "memory": memory_mib << 20, "quiet": quiet}
    raw = recognise(files[0]) if len(files) == 1 and files[0].is_dir() else None
    if raw is None:
        import_log(files, _mapping(given, mapping_file), out, **how)
        return
    flag = "--mapping" if mapping_file is not None else next(map(_flag, given), None)
    if flag is not None:
        raise UserError(f"{files[0]} is {raw.name}, whose columns are known: leave out {flag}, or name its log file")
    import_log(raw.files, raw.mapping, out, name=raw.name, notes=raw.notes, **how)


def _mapping(given: Mapping[str, Any], mapping_file: Path | None) -> LogMapping:
    if mapping_file is not None:
        if given:
            flag = _flag(next(iter(given)))
            raise UserError(f"--mapping {mapping_file} and {flag} both say what the columns are; give one of the two")
        return read_mapping(mapping_file)
    for name in ("user", "item", "time"):
        if name not in given:
            raise UserError(f"--{name} is missing: name the log's {name} column, or give --mapping FILE.toml")
    return parse_mapping(**given)


def _flag(name: str) -> str:
    return f"--{_FLAGS.get(name, name)}"


def sized_world(name: str, seed: int, settings: Sequence[str], events: int | None) -> World:
    """The named world with ``settings`` (as of :func:`world_changes`), and users for about that many ``events``."""
    world = preset(name, seed=seed, **world_changes(settings))
    if events is None:
        return world
    if events < 1:
        raise UserError(f"--events must be 1 at least, not {events}")
    if any(setting.partition("=")[0].strip() == "users" for setting in settings):
        raise UserError("--events and --set users=... both say how large the world is; give one of the two")
    return dataclasses.replace(world, users=-(-events // (world.requests * world.candidates)))


def world_changes(settings: Sequence[str]) -> dict[str, Any]:
    """``["users=1000", "tasks=click,like"]`` as parameters of a World, each of its field's type.

    Raises UserError naming the setting that cannot be read.
    """
    hints = typing.get_type_hints(World)
    known = [field.name for field in dataclasses.fields(World) if field.name != "seed"]  # --seed is a flag of its own
    changes = {}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UserError(f"--set {setting!r} is not of the form key=value")
        if key not in known:
            raise UserError(f"unknown parameter {key!r} of a synthetic world; --set knows: {', '.join(known)}")
        changes[key] = _value(value, hints[key], setting)
    return changes


def _value(text: str, hint: Any, setting: str) -> Any:
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(_value(part.strip(), kind, setting) for part in text.split(",") if part.strip())
    try:
        return hint(text)
    except ValueError:
        raise UserError(f"--set {setting!r}: the value must be of type {hint.__name__}") from None
