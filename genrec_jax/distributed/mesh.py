"""Meshes: which devices a trial runs on, and what each of their axes divides."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from genrec_jax.errors import UserError

# data: rows of a batch; every device holds all parameters.
AXES = ("data",)


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


def shares(mesh: Mesh | None) -> int:
    """How many equal parts the rows of a batch are divided into."""
    return 1 if mesh is None else mesh.shape["data"]


def by_rows(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
