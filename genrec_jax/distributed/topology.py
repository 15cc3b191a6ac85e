"""TPU slices and GPU nodes by name, what their chips can do, and the compiler that compiles for TPUs without one."""

import dataclasses
import math
import os
import sys
from pathlib import Path

from genrec_jax.errors import UserError

# The compiler lives in a folder of its own: jax would look for a TPU at every start if it could import it.
LIBTPU = Path(sys.prefix) / "libtpu"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by the vendor's data sheet (Cloud TPU documentation; NVIDIA, SXM boards, products without sparsity).

    flops: bfloat16, a second. memory: bytes of HBM. bandwidth, links: bytes a second of HBM, and sent on all links to
    other chips together. devices: what jax calls so, on one chip. shapes: its slices, small to large.
    gpu: nodes of eight (`NODE`), between which each chip sends 50 GB/s (`ADAPTER`, of 400 Gb/s).
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    devices: int
    shapes: tuple[str, ...]
    gpu: bool = False


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SPACE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_COUNT = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024")
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 1, _PLANE),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9, 1, _PLANE),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 1, _SPACE),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7380e9, 1200e9, 2, _SPACE),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 1, _COUNT, gpu=True),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 1, _COUNT, gpu=True),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 1, _COUNT, gpu=True),
    "b200": Chip(2250e12, 180e9, 7700e9, 900e9, 1, _COUNT, gpu=True),
}
NODE, ADAPTER = 8, 50e9


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, ``v5e:16x16``, or a number of GPUs, ``h100:8``."""

    name: str
    chip: Chip
    chips: int

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def kind(self) -> str:
        """Of chip."""
        return self.name.partition(":")[0]


def parse_topology(text: str) -> Topology:
    """Raises UserError for a kind of chip or a shape that does not exist."""
    kind, _, shape = text.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise UserError(f"--topology {text!r}: the kinds of chip are {', '.join(CHIPS)}")
    if shape not in chip.shapes:
        raise UserError(f"--topology {text!r}: the shapes of {kind} are {', '.join(chip.shapes)}")
    return Topology(text, chip, math.prod(map(int, shape.split("x"))))


def slices(topology: Topology) -> list[Topology]:
    """All slices of the same chip, small to large."""
    return [parse_topology(f"{topology.kind}:{shape}") for shape in topology.chip.shapes]


def prepare(*, quick: bool = False) -> None:
    """Makes the TPU compiler known to jax, which must not have been used yet; ``quick``: one that optimises little.

    Raises UserError where it is missing.
    """
    if not LIBTPU.is_dir():
        raise UserError("the TPU compiler (libtpu) is not installed: `make tpu-compiler` installs it (140 MB)")
    os.environ.update(ENVIRONMENT | ({"JAX_OPTIMIZATION_LEVEL": "O0"} if quick else {}))
    if str(LIBTPU) not in sys.path:
        sys.path.append(str(LIBTPU))
    if "jax" in sys.modules:  # imported, it no longer looks at the variable
        jax = sys.modules["jax"]
        jax.config.update("jax_platforms", "cpu")
        if quick:
            jax.config.update("jax_optimization_level", "O0")
