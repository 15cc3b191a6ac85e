"""The attention programs that the compile check compiles, and the process that compiles them.

`python -m benchmarks.compile_cases` reads cases from its input and writes one line of JSON per case, so that an
aborting compiler loses one case and no more. No array is made and nothing runs: every input is a shape.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import llo
from kernels_pallas.hstu_attention import TIME_BUCKETS, hstu_attention, jagged_tokens, plan

# The smallest slice of each TPU generation as the compiler names it, and the VMEM of one of its cores in bytes.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
# A device of each as jax names it, and how many cores share it: some operations lower differently from chip to chip.
DEVICES = {"v5e": ("TPU v5 lite", 1), "v5p": ("TPU v5", 2), "v6e": ("TPU v6 lite", 1), "7x": ("TPU7x", 1)}
VMEM = {"v5e": 128 * 2**20, "v5p": 64 * 2**20, "v6e": 128 * 2**20, "7x": 64 * 2**20}
GPU = "hopper"
TARGETS = (*TOPOLOGIES, GPU)

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DIMS = (64, 128, 256)
HEADS = (1, 4, 8)
SEQUENCES = 8  # packed into the row


@dataclass(frozen=True)
class Case:
    """One program: bfloat16 attention of a row of ``length`` tokens, one direction, with both bias tables or none."""

    target: str
    backward: bool
    bias: bool
    length: int
    dim: int
    heads: int

    @property
    def name(self) -> str:
        direction = "backward" if self.backward else "forward"
        bias = "bias" if self.bias else "plain"
        return f"{self.target} {direction} {bias} T={self.length} D={self.dim} H={self.heads}"


@dataclass(frozen=True)
class Result:
    """What became of a case. ``reason`` is empty if it compiled; ``seconds`` include lowering and the dump."""

    case: Case
    reason: str
    seconds: float
    kernels: tuple[llo.Kernel, ...] = ()


def grid(every: bool = False) -> list[Case]:
    """All combinations, or those that cover in minutes what can differ.

    The schedule depends on D and the bias; memory on the length too, and is scarcest on v5p and 7x.
    """
    lines = itertools.product(TARGETS, (False, True), (False, True), LENGTHS, DIMS, HEADS)
    cases = [Case(*line) for line in lines]
    return cases if every else [case for case in cases if _covers(case)]


def _covers(case: Case) -> bool:
    shape = (case.length, case.dim, case.heads)
    if shape in [(2048, dim, 4) for dim in DIMS]:
        return True
    scarce = [(length, 128, 4) for length in (512, 16384)] + [(2048, 128, 1), (2048, 128, 8), (16384, 256, 8)]
    return case.target in ("v5p", "7x") and shape in scarce


def program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, argument shapes) of a case. The plan is an argument: what is compiled is a layer's own work."""
    implementation = "mosaic_gpu" if case.target == GPU else "mosaic_tpu"
    positions, buckets = (case.length, TIME_BUCKETS) if case.bias else (0, 0)
    ints = jax.ShapeDtypeStruct((SEQUENCES + 1,), jnp.int32)
    times = jax.ShapeDtypeStruct((case.length,), jnp.int32)

    def prepare(offsets: jax.Array, timestamps: jax.Array) -> Any:
        tokens = jagged_tokens(offsets, case.length, timestamps=timestamps)
        return plan(tokens, positions=positions, buckets=buckets, implementation=implementation)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, position: Any, seconds: Any, given: Any) -> jax.Array:
        return hstu_attention(
            q,
            k,
            v,
            given,
            max_len=case.length,
            alpha=case.dim**-0.5,
            position_bias=position,
            time_bias=seconds,
            implementation=implementation,
        )

    def backward(
        q: jax.Array, k: jax.Array, v: jax.Array, position: Any, seconds: Any, given: Any, g: jax.Array
    ) -> Any:
        _, pull = jax.vjp(functools.partial(forward, given=given), q, k, v, position, seconds)
        return pull(g)

    row = jax.ShapeDtypeStruct((1, case.length, case.heads, case.dim), jnp.bfloat16)
    tables = [jax.ShapeDtypeStruct((n,), jnp.float32) if case.bias else None for n in (2 * positions - 1, buckets)]
    inputs = (row, row, row, *tables, jax.eval_shape(prepare, ints, times))
    return (backward, (*inputs, row)) if case.backward else (forward, inputs)


def compile_tpu(case: Case, dumps: Path) -> tuple[llo.Kernel, ...]:
    """Compiles a case for a TPU that is not there; the process must run in `llo.DUMP_FLAGS` for ``dumps``."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case.target])
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    function, shapes = program(case)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with _device_of(case):
        jax.jit(function).lower(*placed).compile()
    return tuple(llo.read_kernels(dumps))


def kernel_calls(case: Case) -> int:
    """Pallas kernels in a case lowered to the dialect of its machine; needs no compiler of the machine."""
    platform, target = ("cuda", "mosaic_gpu") if case.target == GPU else ("tpu", "tpu_custom_call")
    function, shapes = program(case)
    with _device_of(case):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
    return lowered.as_text().count(f"custom_call @{target}")


def _device_of(case: Case) -> contextlib.AbstractContextManager[Any]:
    """In this context jax takes the device to be the case's TPU."""
    if case.target == GPU:
        return contextlib.nullcontext()
    kind, cores = DEVICES[case.target]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def run(case: Case, dumps: Path) -> Result:
    began = time.perf_counter()
    kernels: tuple[llo.Kernel, ...] = ()
    try:
        if case.target == GPU:
            if not kernel_calls(case):
                raise RuntimeError("the lowered program holds no Mosaic GPU kernel")
        else:
            kernels = compile_tpu(case, dumps)
            if not kernels:
                raise RuntimeError("the compiled program holds no Pallas kernel")
    except Exception as error:  # the compiler's own errors have no common class
        return Result(case, one_line(error), time.perf_counter() - began)
    return Result(case, "", time.perf_counter() - began, kernels)


def one_line(error: BaseException) -> str:
    """The error's first lines as one, without the dump of the program that may follow."""
    words = " ".join(str(error).split()) or repr(error)
    return f"{type(error).__name__}: {words}"[:400]


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        folder.mkdir()


def main() -> None:
    # Compilers print where they like: keep the real output for the results alone.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    dumps = Path(sys.argv[1])
    for line in json.load(sys.stdin):
        with _emptied(dumps):
            result = run(Case(**line), dumps)
        print(json.dumps(asdict(result)), file=results, flush=True)


if __name__ == "__main__":
    main()
