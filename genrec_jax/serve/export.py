"""A scorer as one file: StableHLO of its functions (`jax.export`), parameters and catalogue, in a zip archive.

``scorer.json`` (sizes, schema, names), ``parameters.npz`` (leaves by number), ``features.npz`` (by item), and
``programs/NAME``, one serialised function for each size.
"""

import dataclasses
import functools
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from genrec_jax.batch import Batch
from genrec_jax.data.schema import Schema
from genrec_jax.errors import UserError
from genrec_jax.serve.catalogue import Catalogue
from genrec_jax.serve.events import rows
from genrec_jax.serve.programs import CacheType, Layers, Programs, empty_layers

if TYPE_CHECKING:
    from genrec_jax.serve.scorer import Scorer

FORMAT = 1
_EVERYWHERE = ("cpu", "cuda", "tpu")

_Function = tuple[str, Callable[..., Any], tuple[Any, ...]]


def export(scorer: "Scorer", path: Path) -> None:
    """Writes beside ``path`` and renames: the file is whole or as it was. Raises UserError for a scorer that was loaded
    itself."""
    programs, shapes = scorer.compiled, scorer.shapes
    if not isinstance(programs, Programs):
        raise UserError("a scorer that was loaded from a file cannot be exported again: copy the file")
    record = {
        "format": FORMAT,
        "schema": scorer.schema.to_json(),
        "shapes": dataclasses.asdict(shapes),
        "widths": programs.widths,
        "cache_type": programs.kind,
        "catalogue": _catalogue_record(scorer.catalogue),
    }
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("scorer.json", json.dumps(record))
            leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(scorer.params))}
            archive.writestr("parameters.npz", _npz(leaves))
            archive.writestr("features.npz", _npz(scorer.catalogue.features if scorer.catalogue else {}))
            for name, function, arguments in _functions(scorer, programs):
                archive.writestr(f"programs/{name}", _serialised(function, arguments))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _functions(scorer: "Scorer", programs: Programs) -> list[_Function]:
    """(name, function, arguments of its shapes) of all that a scorer may call."""
    shapes = scorer.shapes
    found: list[_Function] = []
    for capacity in shapes.capacities:
        layers = programs.empty(capacity)

        def batch(slots: int, lanes: int, capacity: int = capacity) -> Batch:
            return rows(scorer.schema, [], capacity, slice(0), slots, lanes)

        for chunk in shapes.chunks_within(capacity):
            extend = functools.partial(programs.extend, chunk=chunk)
            found.append((_extend_name(capacity, chunk), extend, (scorer.params, layers, batch(1, 1), np.int32(0))))
        for lanes in {1, shapes.lanes}:
            asked = batch(shapes.microbatch, lanes)
            found.append((_score_name(capacity, lanes), programs.score, (scorer.params, (layers,) * lanes, asked)))
    return found


def _extend_name(capacity: int, chunk: int) -> str:
    return f"extend-{capacity}-{chunk}"


def _score_name(capacity: int, lanes: int) -> str:
    return f"score-{capacity}-{lanes}"


def _serialised(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """The function of flat leaves, so that a reader needs none of the trees' classes."""
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    platforms = _EVERYWHERE if jax.default_backend() == "cpu" else None
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    return bytes(jax_export.export(jax.jit(flat), platforms=platforms)(*shapes).serialize())


class Exported:
    """The functions of an exported file, read when first called."""

    def __init__(
        self,
        read: Callable[[str], bytes],
        widths: Sequence[tuple[int, int, int]],
        slots: Callable[[int], int],
        kind: CacheType,
    ):
        self._read, self._widths, self._slots, self._kind = read, widths, slots, kind
        self._function = functools.cache(self._deserialised)

    def empty(self, capacity: int) -> Layers:
        return empty_layers(self._widths, self._slots(capacity), self._kind)

    def extend(self, params: Any, layers: Layers, batch: Batch, tokens: np.int32, *, chunk: int) -> Layers:
        first, leaves = len(jax.tree.leaves(params)), jax.tree.leaves(layers)
        consumed = tuple(range(first, first + len(leaves)))
        function = self._function(_extend_name(batch.history.item.shape[1], chunk), consumed)
        grown = function(*jax.tree.leaves((params, layers, batch, tokens)))
        return jax.tree.unflatten(jax.tree.structure(layers), grown)

    def score(self, params: Any, layers: Sequence[Layers], batch: Batch) -> jax.Array:
        function = self._function(_score_name(batch.history.item.shape[1], len(layers)), ())
        return function(*jax.tree.leaves((params, layers, batch)))[0]

    def _deserialised(self, name: str, consumed: tuple[int, ...]) -> Any:
        call = jax_export.deserialize(bytearray(self._read(f"programs/{name}"))).call
        return jax.jit(call, donate_argnums=consumed)


def load(path: Path) -> dict[str, Any]:
    """The arguments of a Scorer, as exported. Raises UserError if the file is no such export."""
    from genrec_jax.serve.scorer import Shapes

    try:
        archive = zipfile.ZipFile(path)
        record = json.loads(archive.read("scorer.json"))
        if record["format"] != FORMAT:
            raise UserError(
                f"{path} has format {record['format']}; this version reads format {FORMAT}: export it again"
            )
        shapes = Shapes(**record["shapes"] | {"chunks": tuple(record["shapes"]["chunks"])})
        widths = [tuple(each) for each in record["widths"]]
        schema = Schema.from_json(record["schema"])
        parameters = _arrays(archive.read("parameters.npz"))
        features = _arrays(archive.read("features.npz"))
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no exported scorer that can be read: {error}") from None
    named = record["catalogue"]
    return {
        "compiled": Exported(archive.read, widths, shapes.tokens, record["cache_type"]),
        "params": [jnp.asarray(parameters[str(i)]) for i in range(len(parameters))],
        "schema": schema,
        "shapes": shapes,
        "catalogue": Catalogue(schema, named["origin"], features, named["items"], named["categories"])
        if named
        else None,
    }


def _catalogue_record(catalogue: Catalogue | None) -> dict[str, Any] | None:
    if catalogue is None:
        return None
    return {"origin": catalogue.origin, "items": catalogue.items, "categories": catalogue.categories}


def _npz(arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    return dict(np.load(io.BytesIO(data), allow_pickle=False))
