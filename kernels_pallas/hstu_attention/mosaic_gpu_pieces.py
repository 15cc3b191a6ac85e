"""What the Hopper kernels are built of: rings of shared memory, products, the mask and the arithmetic of a tile."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.hstu_attention.mosaic_gpu_lists import OUTER
from kernels_pallas.hstu_attention.tokens import sees

# False sends weights through shared memory on their way to the second product: slower, the control for compilers that
# reuse operand registers too early, and what JAX's interpreter of these kernels can run on a CPU.
WEIGHTS_IN_REGISTERS = True

GROUPS = 2  # computing warpgroups
ROWS = OUTER // GROUPS
_SHARED_BYTES = 227 * 1024 - 2048  # of a Hopper thread block, less room for barriers and alignment
_MOST_STAGES = 4


def _transforms(dtype: jnp.dtype) -> tuple[Any, ...]:
    """Layout of matrices in shared memory: tiles of 8 rows of 128 bytes."""
    tiling, swizzle = (8, 128 // dtype.itemsize), 128
    return plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Inner blocks of one operand on their way through shared memory: ``ring`` [stages, ...] and two barriers each."""

    ring: Any
    loaded: Any
    free: Any

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.ring.shape[0]))

    def fetch(self, step: jax.Array, source: Any) -> None:
        """Starts the load for ``step``, once both warpgroups have released the slot."""
        slot = self.slot(step)
        pl.when(step >= self.ring.shape[0])(lambda: plgpu.barrier_wait(self.free.at[slot]))
        plgpu.copy_gmem_to_smem(source, self.ring.at[slot], self.loaded.at[slot])

    def take(self, step: jax.Array) -> Any:
        """The block of ``step``, once it is there."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.loaded.at[slot])
        return self.ring.at[slot]

    def release(self, step: jax.Array) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def rings_of(shapes: Sequence[tuple[int, int]], other_bytes: int, dtype: jnp.dtype) -> list[tuple[Any, ...]]:
    """Scratch of the rings of blocks of ``shapes``, with as many stages each as fit beside ``other_bytes``."""
    sizes = [rows * columns * dtype.itemsize for rows, columns in shapes]
    stages = [1] * len(shapes)
    left = _SHARED_BYTES - other_bytes - sum(sizes)
    if left < 0:
        raise NotImplementedError(f"a thread block would need {_SHARED_BYTES - left} bytes of shared memory")
    for _ in range(_MOST_STAGES - 1):
        for i, size in enumerate(sizes):
            if size <= left:
                left -= size
                stages[i] += 1
    return [
        (
            plgpu.SMEM((n, *shape), dtype, transforms=_transforms(dtype)),
            plgpu.Barrier(num_barriers=n),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=n),
        )
        for n, shape in zip(stages, shapes)
    ]


def resident(features: int, dtype: jnp.dtype) -> Any:
    """Shared memory for an outer block, one half per warpgroup."""
    return plgpu.SMEM((GROUPS, ROWS, features), dtype, transforms=_transforms(dtype))


def own_rows(buffers: Sequence[Any]) -> list[Any]:
    """This warpgroup's half of outer blocks in shared memory.

    Loops over two products ask for it again in every step: of a half known outside, the compiler would keep the
    addresses of all steps of both products in registers, which with 256 features spills hundreds of bytes.
    """
    return [buffer.at[lax.axis_index("group")] for buffer in buffers]


def load_outer(sources: Sequence[Any], places: Sequence[Any], barrier: Any) -> None:
    """Copies outer rows into this warpgroup's shared memory and waits for them."""
    for source, place in zip(sources, places):
        plgpu.copy_gmem_to_smem(source, place, barrier)
    plgpu.barrier_wait(barrier)


def store_outer(value: jax.Array, place: Any, target: Any) -> None:
    """Starts the store of this warpgroup's rows, by way of shared memory."""
    place[...] = value.astype(place.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(place, target)


def products_of(*pairs: tuple[Any, Any], meanwhile: Callable[[], None] | None = None) -> list[jax.Array]:
    """a @ b for each pair, in float32; ``meanwhile`` runs once the products are issued."""

    def multiply(*sums: Any) -> list[jax.Array]:
        for total, (a, b) in zip(sums, pairs):
            plgpu.wgmma(total, a, b)
        if meanwhile is not None:
            meanwhile()
        return [total[...] for total in sums]

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def as_operand(value: jax.Array, scratch: Sequence[Any], group: jax.Array) -> Any:
    """``value`` as the left operand of a product: in registers, or in this warpgroup's part of ``scratch``."""
    if not scratch:
        return value
    scratch[0][group] = value
    plgpu.commit_smem()
    return scratch[0].at[group]


def operand_scratch(count: int, inner: int, dtype: jnp.dtype) -> list[list[Any]]:
    """Scratch for `as_operand`, ``count`` of them."""
    shape = plgpu.SMEM((GROUPS, ROWS, inner), dtype, transforms=_transforms(dtype))
    return [[] if WEIGHTS_IN_REGISTERS else [shape] for _ in range(count)]


def operand_bytes(count: int, inner: int, dtype: jnp.dtype) -> int:
    return 0 if WEIGHTS_IN_REGISTERS else count * OUTER * inner * dtype.itemsize


def half_scores(
    products: jax.Array, alpha: float, bias_ring: Sequence[Ring], step: jax.Array, group: jax.Array
) -> jax.Array:
    """Half the scores; takes and releases the tile of the bias, if there is a ring of them."""
    half = products * (0.5 * alpha)
    for ring in bias_ring:
        half += loaded_bias(ring.take(step).at[pl.ds(group * ROWS, ROWS)])
        plgpu.commit_smem()  # orders these reads before the copy that reuses the slot
        ring.release(step)
    return half


def loaded_bias(ref: Any) -> jax.Array:
    """A tile of the bias in registers, laid out as sums of products are."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def silu(half: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SiLU of the scores from half of them, and the hyperbolic tangent it took; both 0 at 0."""
    tanh = jnp.tanh(half)
    return half * tanh + half, tanh


def d_half_scores(half: jax.Array, tanh: jax.Array, upstream: jax.Array) -> jax.Array:
    """Cotangent of half the scores, given that of the weights."""
    return (upstream * tanh + upstream) * ((1.0 + half) - half * tanh)


def mask_of(
    fields: Any, row: jax.Array, query: jax.Array, key: jax.Array, shape: tuple[int, int], query_axis: int
) -> Callable[[], jax.Array]:
    """Loads what the mask of a tile needs; the result evaluates it.

    Args:
      fields: int32 [B, 5, T], see `mosaic_gpu_lists.Prepared`.
      query, key: the first query and the first key of the tile.
      shape: of the tile.
      query_axis: along which the queries run.
    """

    def vector(field: int, start: jax.Array, axis: int) -> jax.Array:
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        loaded = plgpu.load(fields.at[row, field, pl.ds(start, shape[axis])], layout=layout, optimized=False)
        return lax.broadcast_in_dim(loaded, shape, [axis])

    key_axis = 1 - query_axis
    low, high, until, own = (vector(field, query, query_axis) for field in range(4))
    rank = vector(4, key, key_axis)

    def evaluate() -> jax.Array:
        index = key + plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=plgpu.Layout.WGMMA)
        return sees(low, high, until, own, rank, index)

    return evaluate


def both_loops(step: Callable[..., None], counts: Any, row: jax.Array, block: jax.Array) -> None:
    """Runs ``step(j, masked=...)`` for the full tiles of an outer block, then for its masked tiles."""
    full, count = counts[row, block, 0], counts[row, block, 1]
    lax.fori_loop(0, full, lambda j, _: step(j, masked=False), None)
    # Counted from 0: inside shard_map a loaded first index would have another type than the next one.
    lax.fori_loop(0, count - full, lambda j, _: step(full + j, masked=True), None)


def kernel(body: Callable[..., None], out_type: Any, grid: dict[str, int], scratch: Sequence[Any], name: str) -> Any:
    """A kernel of two computing warpgroups and a feeding one.

    The last axis of the grid runs fastest: heads share tiles of the bias, and the blocks of a row its keys and values,
    while these are in the second-level cache.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )


def by_group(compute: Callable[[jax.Array], None], feed: Callable[[], None]) -> None:
    """Gives each warpgroup its part and its share of the registers, 504 of 512 a lane in all."""
    group = lax.axis_index("group")

    @pl.when(group < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        compute(group)

    @pl.when(group == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        feed()
