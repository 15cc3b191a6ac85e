"""Meshes: which devices a trial runs on, and what each of their axes divides."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from genrec_jax.distributed.context import ALONE, Context
from genrec_jax.distributed.host import KIND
from genrec_jax.distributed.tensor import UNDIVIDED, Division, Tensor, axis_of, place
from genrec_jax.errors import UserError
from genrec_jax.nn import embedding

# The first two divide the rows of a batch, and the rows of large tables (genrec_jax/distributed/tables.py). fsdp also
# divides every parameter and what the optimiser keeps of it: a device holds its share, and gathers the whole while it
# computes with it (Zhao et al., "PyTorch FSDP", VLDB 2023). So does model, which divides heads and what is like them
# (genrec_jax/distributed/tensor.py). context divides the tokens of every row (genrec_jax/distributed/context.py).
AXES = ("data", "fsdp", "context", "model")
_SMALLEST = 1024  # elements of an array that is worth dividing


def parse_mesh(text: str) -> dict[str, int]:
    """``data=8`` -> {"data": 8}. Raises UserError for an axis that does not exist, given twice, or not positive."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh {text!r} is not of the form AXIS=DEVICES,…; the axes are: {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first devices. Raises UserError if there are too few."""
    devices = jax.devices() if devices is None else devices
    needed = int(np.prod(list(sizes.values())))
    if needed > len(devices):
        raise UserError(f"the mesh needs {needed} devices, {len(devices)} are here")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:needed])


def shares(mesh: Mesh | AbstractMesh | None) -> int:
    """How many equal parts the rows of a batch are divided into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that divide the rows of a batch."""
    return tuple(axis for axis in mesh.axis_names if axis in ("data", "fsdp"))


def rows_of(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Of arrays whose first axis is the rows of a batch."""
    return PartitionSpec(row_axes(mesh))


def context_of(mesh: Mesh | AbstractMesh | None) -> Context:
    """The devices that divide the tokens of a row among them."""
    size = 1 if mesh is None else mesh.shape.get("context", 1)
    return Context("context", size) if size > 1 else ALONE


def tensor_of(mesh: Mesh | AbstractMesh | None) -> Tensor:
    """The devices that divide heads, hidden units and experts among them."""
    size = 1 if mesh is None else mesh.shape.get("model", 1)
    return Tensor("model", size) if size > 1 else UNDIVIDED


def share_of(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], path: tuple = ()) -> PartitionSpec:
    """How devices divide an array of a ``shape`` that stands at ``path`` in a trial's state or its parameters.

    What has a row for every row of a large table: along these, by all devices that divide the rows of a batch. The
    rest by fsdp and model, along its longest axis of those that they divide evenly, if any, but for one that the
    devices of model need the other way (`genrec_jax.distributed.tensor.axis_of`).
    """
    if large_table(shape, path) and shares(mesh) > 1 and shape[0] % shares(mesh) == 0:
        return rows_of(mesh)
    over, taken = tuple(axis for axis in ("model", "fsdp") if mesh.shape.get(axis, 1) > 1), axis_of(path)
    if len(shape) == 1 and taken == 0:
        over = tuple(axis for axis in over if axis != "model")
    size = math.prod(mesh.shape[axis] for axis in over)
    able = [axis for axis in range(len(shape)) if "model" not in over or axis != taken]
    even = [axis for axis in able if shape[axis] % size == 0]
    if not over or not even or math.prod(shape) < _SMALLEST:
        return PartitionSpec()
    longest = max(even, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * longest, over if len(over) > 1 else over[0])


def large_table(shape: tuple[int, ...], path: tuple) -> bool:
    """Whether an array is a large table, or its moments, or what a row-wise rule keeps of its rows."""
    names = place(path)
    return (names[-1:] == ("rows_table",) or names[:2] == ("opt", "rows")) and shape[0] >= embedding.LARGE


def specs_of(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """:func:`share_of` every array of a trial's state, or of its parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, x: share_of(mesh, x.shape, path), tree)


def lent_rows(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], path: tuple) -> bool:
    """Whether an array has the rows of a table that devices lend each other (`genrec_jax.distributed.tables`)."""
    return large_table(shape, path) and share_of(mesh, shape, path) == rows_of(mesh)


def placed(mesh: Mesh | AbstractMesh | None, state: Any, *, offload: bool = False) -> Any:
    """The sharding of every array of a trial's state; without a mesh, on the first device.

    ``offload``: with what the optimiser keeps in the host's memory. Small arrays stay, and what a row-wise rule keeps
    of a table stays where its rows are not: of small tables, and on a mesh of those that devices do not lend.
    """

    def off(path: tuple, shape: tuple[int, ...]) -> bool:
        names = place(path)
        if not offload or names[0] != "opt" or math.prod(shape) < _SMALLEST:
            return False
        if names[1] != "rows":
            return True
        return large_table(shape, path) if mesh is None or mesh.size == 1 else lent_rows(mesh, shape, path)

    def of(path: tuple, x: Any) -> Sharding:
        kind = KIND if off(path, x.shape) else None
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0], memory_kind=kind)
        return NamedSharding(mesh, share_of(mesh, x.shape, path), memory_kind=kind)

    return jax.tree_util.tree_map_with_path(of, state)


def along(spec: PartitionSpec, axis: str) -> int | None:
    """Which axis of an array a mesh's ``axis`` divides; None for none."""
    found = [n for n, over in enumerate(spec) if over == axis or (isinstance(over, tuple) and axis in over)]
    return found[0] if found else None


def gathered(mesh: Mesh, params: Any, specs: Any, divided: Mapping[tuple[Any, ...], Division]) -> Any:
    """What a device computes with, from its shares of the parameters, in `jax.shard_map`: whole parameters, but for
    those that are ``divided`` over model. The derivative is summed over the axes of rows that divide a parameter, and
    each device has that of its share."""
    tensor = tensor_of(mesh)

    def whole(path: tuple[Any, ...], x: jax.Array, spec: PartitionSpec) -> jax.Array:
        over = tuple(axis for axis in row_axes(mesh) if along(spec, axis) is not None)
        if over:
            x = jax.lax.all_gather(x, over, axis=along(spec, over[0]) or 0, tiled=True)
        return tensor.taken(x, divided.get(place(path)), along(spec, "model"))

    return jax.tree.map_with_path(whole, params, specs)


def summed(mesh: Mesh, grads: Any, specs: Any) -> Any:
    """Sums of a device's gradients over the axes of rows that do not divide them: those that :func:`gathered` has not
    summed over."""

    def over_others(g: jax.Array, spec: PartitionSpec) -> jax.Array:
        others = tuple(axis for axis in row_axes(mesh) if along(spec, axis) is None)
        return jax.lax.psum(g, others) if others else g

    return jax.tree.map(over_others, grads, specs)
