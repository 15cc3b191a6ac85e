"""What the GPU benchmark runs: shapes, published numbers, targets, kernel checks, the queue of jobs. Needs no jax."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

Direction = Literal["forward", "planned", "backward"]
Layout = Literal["uniform", "padded", "packed"]
PLAIN_BACKENDS = ("xla", "reference")  # the lab's own backends in plain XLA; every other one is a kernel
RIVALS = ("cudnn", "dense")  # softmax attention of cuDNN; the definition in bf16, dense, in XLA
_SHORTEST = 64  # of the ragged lengths


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention problem in bf16, causal.

    layout: "uniform" rows all ``length`` long; "padded" rows of Zipf-like lengths up to ``length``, one each; "packed"
    the same sequences one after the other in a single row. bias: position and time tables, and their gradients.
    """

    dim: int
    length: int
    batch: int
    heads: int = 4
    layout: Layout = "uniform"
    bias: bool = False

    @property
    def name(self) -> str:
        kind = "" if self.layout == "uniform" else f" {self.layout}"
        return f"D={self.dim} T={self.length} B={self.batch} H={self.heads}{kind}{' bias' if self.bias else ''}"

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Length of each sequence, int [B]. Ragged: log-uniform, so that the density falls as 1 / length."""
        if self.layout == "uniform":
            return np.full(self.batch, self.length)
        share = np.random.default_rng(0).permutation((np.arange(self.batch) + 0.5) / self.batch)
        shortest = min(_SHORTEST, self.length)
        return np.ceil(shortest * (self.length / shortest) ** share).astype(int)

    @property
    def rows(self) -> tuple[int, int]:
        """(B, T) of the arrays."""
        return (1, int(self.lengths.sum())) if self.layout == "packed" else (self.batch, self.length)

    def flops(self, direction: Direction) -> float:
        """``4 H D sum(n²) / 2`` forward (QK and PV, half for causal), 2.5 times that backward (five products)."""
        forward = 2.0 * self.heads * self.dim * float((self.lengths.astype(float) ** 2).sum())
        return forward * (2.5 if direction == "backward" else 1.0)

    def bytes(self, direction: Direction) -> float:
        """Each bf16 array once: q, k, v, out forward; q, k, v, d_out, dq, dk, dv backward; real tokens alone."""
        arrays = 7 if direction == "backward" else 4
        return 2.0 * arrays * self.heads * self.dim * float(self.lengths.sum())

    def special(self) -> float:
        """Special functions that cannot be avoided, either direction: one tanh per visible pair and head."""
        return self.heads * float((self.lengths.astype(float) ** 2).sum()) / 2


class Published(NamedTuple):
    """TFLOP/s to beat, and whose they are."""

    forward: float
    backward: float
    source: str


# NVIDIA's CUTLASS HSTU on an H100 80GB: bf16, causal, H = 4, no bias, batch 32, P10 of 50 event timings
# (NVIDIA/recsys-examples, examples/hstu/training/benchmark/figs/hstu_attn_h100_p10_heatmap.png).
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
_CUTLASS = {
    64: ((55, 128, 207, 333, 416, 470, 477), (67, 135, 223, 314, 383, 404, 423)),
    128: ((102, 182, 329, 457, 528, 525, 561), (85, 161, 276, 384, 440, 468, 486)),
    256: ((111, 245, 409, 537, 622, 624, 637), (86, 163, 256, 321, 360, 379, 385)),
}
# The same at batch 512: (D, T) -> forward, backward.
_CUTLASS_512 = {(64, 256): (86, 100), (128, 256): (163, 106), (128, 512): (287, 201), (128, 1024): (392, 309)}
# Softmax attention on an H100: bf16, causal, B T = 16k, H D = 2048 (openxla/tokamax, autotuning cache).
# (D, T) -> cuDNN forward, Pallas Mosaic GPU forward and backward.
_SOFTMAX = {
    (64, 1024): (311, 274, 209),
    (64, 4096): (468, 413, 286),
    (64, 16384): (538, 502, 334),
    (128, 512): (343, 279, 205),
    (128, 1024): (448, 388, 288),
    (128, 4096): (595, 568, 408),
    (128, 8192): (629, 620, 438),
    (128, 16384): (645, 637, 452),
    (256, 4096): (601, 580, 143),
    (256, 16384): (655, 650, 155),
}


def published(shape: Shape) -> Published | None:
    """Uniform rows without bias alone: nobody publishes the others."""
    if shape.layout != "uniform" or shape.bias:
        return None
    key = (shape.dim, shape.length)
    if shape.heads == 4 and shape.batch == 32 and shape.dim in _CUTLASS and shape.length in _LENGTHS:
        forward, backward = (row[_LENGTHS.index(shape.length)] for row in _CUTLASS[shape.dim])
        return Published(forward, backward, "CUTLASS HSTU, H100")
    if shape.heads == 4 and shape.batch == 512 and key in _CUTLASS_512:
        return Published(*_CUTLASS_512[key], "CUTLASS HSTU, H100")
    if shape == _softmax_shape(*key) and key in _SOFTMAX:
        cudnn, forward, backward = _SOFTMAX[key]
        return Published(max(cudnn, forward), backward, "softmax: best of cuDNN and tokamax, H100")
    return None


def _softmax_shape(dim: int, length: int) -> Shape:
    return Shape(dim, length, 16384 // length, 2048 // dim)


@dataclasses.dataclass(frozen=True)
class Target:
    """Either at least ``tflops``, or at most ``times`` the time of the same shape without bias."""

    shape: Shape
    direction: Direction
    tflops: float = 0.0
    times: float = 0.0


MAIN = (Shape(128, 4096, 32), Shape(64, 4096, 32), Shape(256, 4096, 32))
SHORT = Shape(64, 256, 512)
BIASED = Shape(128, 4096, 32, bias=True)
TARGETS = (
    Target(MAIN[0], "forward", tflops=535),
    Target(MAIN[0], "backward", tflops=440),
    Target(MAIN[1], "forward", tflops=416),
    Target(MAIN[1], "backward", tflops=383),
    Target(MAIN[2], "forward", tflops=622),
    Target(MAIN[2], "backward", tflops=360),
    Target(SHORT, "forward", tflops=172),
    Target(BIASED, "forward", times=1.3),
    Target(BIASED, "backward", times=1.4),
)
# The recipe that is trained where there are data, and the seconds it may take after compilation on an H200.
RECIPE, RECIPE_SECONDS, QUICK_RECIPE = "ml-1m-hstu-large", 90.0, "ml-1m-sasrec"
FIRST_SHAPES = (*MAIN, SHORT, BIASED)
_RAGGED = (Shape(128, 4096, 64, layout="padded"), Shape(128, 4096, 64, layout="packed"))
_RAGGED_BIASED = dataclasses.replace(_RAGGED[0], bias=True)


def later_shapes() -> list[Shape]:
    """Every other shape, the more telling first."""
    rows = [*_RAGGED, *(Shape(dim, length, 512) for dim, length in _CUTLASS_512), _RAGGED_BIASED]
    rows += [Shape(dim, length, 32) for length in (1024, 512, 2048, 8192, 256, 16384) for dim in (128, 64, 256)]
    rows += [_softmax_shape(*key) for key in sorted(_SOFTMAX, key=lambda key: abs(key[1] - 4096))]
    rows += [Shape(64, 4096, 32, bias=True), Shape(256, 4096, 32, bias=True), Shape(128, 1024, 32, bias=True)]
    return [shape for shape in dict.fromkeys(rows) if shape not in FIRST_SHAPES]


QUICK_SHAPES = (Shape(64, 96, 2, 2), Shape(64, 96, 3, 2, layout="packed", bias=True))


@dataclasses.dataclass(frozen=True)
class Check:
    """A small packed batch for correctness; 50 rows of padding, filled with NaN, follow the sequences."""

    lengths: tuple[int, ...]
    targets: tuple[int, ...] = ()
    window: int = 0
    full_len: int = 0
    context_len: int = 0
    bias: bool = False
    qk_dim: int = 64
    v_dim: int = 64


CHECKS = {
    "ragged": Check((0, 1, 63, 64, 65, 127, 128, 129, 300)),
    "bias": Check((200, 129, 256), (7, 0, 20), bias=True),
    "targets": Check((40, 150, 30, 256), (3, 50, 30, 0)),
    "window": Check((200, 300), (5, 0), window=37, full_len=20),
    "context": Check((150, 220, 3), (10, 0, 0), context_len=4),
    "ragged D=128": Check((130, 257, 64), qk_dim=128, v_dim=128),
    "bias D=128": Check((200, 129, 256), (7, 0, 20), context_len=2, bias=True, qk_dim=128, v_dim=128),
    "ragged D=256": Check((130, 257, 64), qk_dim=256, v_dim=256),
    "bias D=256": Check((200, 129), bias=True, qk_dim=256, v_dim=256),
    "Dqk=64 Dv=128": Check((130, 200), (9, 0), qk_dim=64, v_dim=128),
}
QUICK_CHECKS = {"targets, bias": Check((0, 1, 17, 40), (0, 0, 3, 0), bias=True)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement, or one check; ``shape`` or ``check`` says of what.

    case: a name; of "train" that of a model size, of "recipe" that of a recipe, which is trained on ``data``.
    """

    section: Literal["ceilings", "probe", "tests", "attention", "train", "recipe"]
    case: str
    implementation: str = ""
    direction: Direction | Literal[""] = ""
    dtype: str = ""
    shape: Shape | None = None
    check: Check | None = None
    quick: bool = False
    data: str = ""

    @property
    def title(self) -> str:
        return " ".join(x for x in (self.section, self.case, self.implementation, self.direction, self.dtype) if x)

    @property
    def seconds(self) -> float:
        """The longest it may take, compilation included."""
        return {"train": 150.0, "recipe": 240.0, "ceilings": 60.0}.get(self.section, 75.0)


def queue(backends: Iterable[str], quick: bool, only: str | None, data: str = "") -> list[Job]:
    """All jobs after the ceilings and the probes, the most important first.

    ``backends``: those that work on this machine. Checks of the kernels come before their times; then the shapes
    with a target; then a training step; then the rest. ``data``: the dataset of the recipe, which is trained after the
    step; without one none is.
    """
    backends = list(backends)
    kernels = [name for name in backends if name not in PLAIN_BACKENDS]
    plain = [name for name in PLAIN_BACKENDS if name in backends]
    if quick:
        jobs = _checks(backends, QUICK_CHECKS, quick)
        jobs += _timings(QUICK_SHAPES[:1], [*backends, *RIVALS], quick)
        jobs += _timings(QUICK_SHAPES[1:], [*kernels, *plain[:1]], quick, ("forward", "planned", "backward"))
        jobs.append(Job("train", "tiny", quick=True))
        jobs += [Job("recipe", QUICK_RECIPE, quick=True, data=data)] if data else []
    else:
        fast = kernels or plain[:1]
        later = later_shapes()
        jobs = [
            *_checks(kernels, CHECKS, quick),
            *_timings(FIRST_SHAPES, [*fast, "cudnn"], quick),
            Job("train", "middle"),
            *([Job("recipe", RECIPE, data=data)] if data else []),
            *_timings(later[:3], fast, quick),
            *_timings((MAIN[0], BIASED, *_RAGGED), kernels, quick, ("planned",)),
            *_timings(FIRST_SHAPES, ["dense"], quick),
            *_timings(later[3:], fast, quick),
            Job("train", "large"),
            *_timings(later, ["cudnn"], quick),
            *_checks(plain, CHECKS, quick),
            *_timings(FIRST_SHAPES, plain, quick),
            *_timings(later, ["dense"], quick),
        ]
    return [job for job in dict.fromkeys(jobs) if only in (None, job.section)]


def _checks(backends: Iterable[str], cases: dict[str, Check], quick: bool) -> list[Job]:
    return [
        Job("tests", case, name, dtype=dtype, check=check, quick=quick)
        for name in backends
        for case, check in cases.items()
        for dtype in ("bfloat16", "float32")
    ]


def _timings(
    shapes: Iterable[Shape],
    implementations: Iterable[str],
    quick: bool,
    directions: Iterable[Direction] = ("forward", "backward"),
) -> list[Job]:
    names, directions = list(implementations), list(directions)
    return [
        Job("attention", shape.name, name, direction, "bfloat16", shape, quick=quick)
        for shape in shapes
        for name in names
        for direction in directions
    ]
