"""The kernels of HSTU attention on Hopper GPUs, in Pallas Mosaic GPU.

A thread block is two computing warpgroups, each with 64 rows of the outer block, and one warpgroup that feeds them
inner blocks through rings of shared memory. Scores exist only as accumulators of the tensor cores; no statistics of
rows are needed, so tiles are added up in any order: first the full ones, then those that need the mask.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.hstu_attention import mosaic_gpu_pieces as pieces
from kernels_pallas.hstu_attention.mosaic_gpu_lists import NARROW, OUTER, Lists
from kernels_pallas.hstu_attention.mosaic_gpu_pieces import GROUPS, ROWS


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fields: jax.Array,
    lists: Lists,
    bias: jax.Array | None,
    *,
    inner: int,
    alpha: float,
    factor: float,
) -> jax.Array:
    """Output [B, O · 128, H, D] of q, k, v [B, T, H, D], by queries; ``bias`` [B, W, 128, inner].

    The warpgroups take turns at the tensor cores: while one multiplies, the other applies SiLU.
    """
    batch, _, heads, features = q.shape
    blocks = lists.inner.shape[1]

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, fields_ref, counts, listed, bias_refs, out_ref, *rest = refs
        q_smem, q_loaded, turn, weights_smem, *rings = rest
        k_ring, v_ring, *bias_ring = (pieces.Ring(*ring) for ring in rings)
        row, head = lax.axis_index("row"), lax.axis_index("head")
        block = blocks - 1 - lax.axis_index("block")  # the last queries of a sequence see most

        def next_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(group: jax.Array) -> None:
            first = block * OUTER + group * ROWS
            own = q_smem.at[group]
            rows = (row, pl.ds(first, ROWS), head)
            pieces.load_outer([q_ref.at[rows]], [own], q_loaded.at[group])
            pl.when(group == 1)(next_turn)

            def attend(total: Any) -> jax.Array:
                def step(j: jax.Array, *, masked: bool) -> None:
                    if masked:
                        key = listed[row, block, j] * inner
                        mask = pieces.mask_of(fields_ref, row, first, key, (ROWS, inner), query_axis=0)
                    (products,) = pieces.products_of((own, pieces.transposed(k_ring.take(j))), meanwhile=next_turn)
                    k_ring.release(j)
                    half = pieces.half_scores(products, alpha, bias_ring, j, group)
                    if masked:
                        half = jnp.where(mask(), half, 0.0)
                    weights, _ = pieces.silu(half)
                    operand = pieces.as_operand(weights.astype(q.dtype), weights_smem, group)
                    plgpu.barrier_arrive(turn)
                    values = v_ring.take(j)
                    plgpu.barrier_wait(turn)
                    plgpu.wgmma(total, operand, values)
                    plgpu.wgmma_wait(0)
                    v_ring.release(j)

                pieces.both_loops(step, counts, row, block)
                return total[...]

            total = pl.run_scoped(attend, plgpu.ACC((ROWS, features), jnp.float32))
            pl.when(group == 0)(next_turn)
            pieces.store_outer(total * factor, own, out_ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

        def feed() -> None:
            @pl.loop(0, counts[row, block, 1])
            def _(j: jax.Array) -> None:
                rows = (row, pl.ds(listed[row, block, j] * inner, inner), head)
                k_ring.fetch(j, k_ref.at[rows])
                for ring, source in zip(bias_ring, bias_refs):
                    ring.fetch(j, source.at[row, counts[row, block, 2] + j])
                v_ring.fetch(j, v_ref.at[rows])

        pieces.by_group(compute, feed)

    rings = [(inner, features)] * 2 + ([] if bias is None else [(OUTER, inner)])
    resident = OUTER * features * q.dtype.itemsize + pieces.operand_bytes(1, inner, q.dtype)
    return pieces.kernel(
        body,
        jax.ShapeDtypeStruct((batch, blocks * OUTER, heads, features), q.dtype),
        {"row": batch, "block": blocks, "head": heads},
        [
            pieces.resident(features, q.dtype),
            plgpu.Barrier(num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=GROUPS),
            *pieces.operand_scratch(1, inner, q.dtype),
            *pieces.rings_of(rings, resident, q.dtype),
        ],
        "hstu_forward",
    )(q, k, v, fields, lists.counts, lists.inner, [] if bias is None else [bias])


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    fields: jax.Array,
    lists: Lists,
    bias: jax.Array | None,
    *,
    alpha: float,
    factor: float,
) -> jax.Array:
    """Gradient [B, O · 128, H, D] of q from the output's ``g``, by queries; ``bias`` [B, W, 128, 64]."""
    batch, _, heads, features = q.shape
    blocks = lists.inner.shape[1]

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, g_ref, fields_ref, counts, listed, bias_refs, out_ref, *rest = refs
        own_smem, loaded, operand_smem, *rings = rest
        k_ring, v_ring, *bias_ring = (pieces.Ring(*ring) for ring in rings)
        row, head = lax.axis_index("row"), lax.axis_index("head")
        block = blocks - 1 - lax.axis_index("block")  # the last queries of a sequence see most

        def compute(group: jax.Array) -> None:
            first = block * OUTER + group * ROWS
            rows = (row, pl.ds(first, ROWS), head)
            own = pieces.own_rows(own_smem)
            pieces.load_outer([q_ref.at[rows], g_ref.at[rows]], own, loaded.at[group])

            def add_up(total: Any) -> jax.Array:
                def step(j: jax.Array, *, masked: bool) -> None:
                    keys = k_ring.take(j)
                    right = [pieces.transposed(keys), pieces.transposed(v_ring.take(j))]
                    products, upstream = pieces.products_of(*zip(pieces.own_rows(own_smem), right))
                    v_ring.release(j)
                    half = pieces.half_scores(products, alpha, bias_ring, j, group)
                    if masked:
                        key = listed[row, block, j] * NARROW
                        shown = pieces.mask_of(fields_ref, row, first, key, (ROWS, NARROW), query_axis=0)()
                        half, upstream = (jnp.where(shown, x, 0.0) for x in (half, upstream))
                    d_half = pieces.d_half_scores(half, pieces.silu(half)[1], upstream)
                    plgpu.wgmma(total, pieces.as_operand(d_half.astype(q.dtype), operand_smem, group), keys)
                    plgpu.wgmma_wait(0)
                    k_ring.release(j)

                pieces.both_loops(step, counts, row, block)
                return total[...]

            total = pl.run_scoped(add_up, plgpu.ACC((ROWS, features), jnp.float32))
            pieces.store_outer(total * (0.5 * alpha * factor), own[0], out_ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

        def feed() -> None:
            @pl.loop(0, counts[row, block, 1])
            def _(j: jax.Array) -> None:
                rows = (row, pl.ds(listed[row, block, j] * NARROW, NARROW), head)
                k_ring.fetch(j, k_ref.at[rows])
                v_ring.fetch(j, v_ref.at[rows])
                for ring, source in zip(bias_ring, bias_refs):
                    ring.fetch(j, source.at[row, counts[row, block, 2] + j])

        pieces.by_group(compute, feed)

    rings = [(NARROW, features)] * 2 + ([] if bias is None else [(OUTER, NARROW)])
    resident = 2 * OUTER * features * q.dtype.itemsize + pieces.operand_bytes(1, NARROW, q.dtype)
    return pieces.kernel(
        body,
        jax.ShapeDtypeStruct((batch, blocks * OUTER, heads, features), q.dtype),
        {"row": batch, "block": blocks, "head": heads},
        [
            [pieces.resident(features, q.dtype)] * 2,
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            *pieces.operand_scratch(1, NARROW, q.dtype),
            *pieces.rings_of(rings, resident, q.dtype),
        ],
        "hstu_query_gradient",
    )(q, k, v, g, fields, lists.counts, lists.inner, [] if bias is None else [bias])


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    fields: jax.Array,
    lists: Lists,
    bias: jax.Array | None,
    *,
    alpha: float,
    factor: float,
) -> tuple[jax.Array, jax.Array]:
    """Gradients [B, O · 128, H, D] of k and v from the output's ``g``, by keys; ``bias`` [B, W, 128, 64].

    Sums of 64 rows and 256 features take 128 registers a lane: two of them do not fit, and each gradient gets a kernel
    of its own, which computes the scores once more.
    """
    run = functools.partial(_key_gradients, q, k, v, g, fields, lists, bias, alpha=alpha, factor=factor)
    if q.shape[3] <= 128:
        d_k, d_v = run("kv")
        return d_k, d_v
    return run("k")[0], run("v")[0]


def _key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    fields: jax.Array,
    lists: Lists,
    bias: jax.Array | None,
    wanted: str,
    *,
    alpha: float,
    factor: float,
) -> list[jax.Array]:
    """The ``wanted`` of `key_gradients`. Tiles are transposed: keys are rows."""
    batch, _, heads, features = k.shape
    blocks = lists.inner.shape[1]
    resident = [k, v] if "k" in wanted else [k]  # the slope of the scores needs v, the weights do not
    scales = {"k": 0.5 * alpha * factor, "v": factor}

    def body(*refs: Any) -> None:
        q_ref, g_ref, sources, fields_ref, counts, listed, bias_refs, *rest = refs
        targets, (own_smem, loaded, operand_smem, *rings) = rest[: len(wanted)], rest[len(wanted) :]
        q_ring, g_ring, *bias_ring = (pieces.Ring(*ring) for ring in rings)
        row, block, head = (lax.axis_index(axis) for axis in ("row", "block", "head"))

        def compute(group: jax.Array) -> None:
            first = block * OUTER + group * ROWS
            rows = (row, pl.ds(first, ROWS), head)
            own = pieces.own_rows(own_smem)
            pieces.load_outer([source.at[rows] for source in sources], own, loaded.at[group])

            def add_up(*totals: Any) -> list[jax.Array]:
                def step(j: jax.Array, *, masked: bool) -> None:
                    queries, upstream = q_ring.take(j), g_ring.take(j)
                    right = [pieces.transposed(queries), pieces.transposed(upstream)]
                    products, *d_weights = pieces.products_of(*zip(pieces.own_rows(own_smem), right))
                    half = pieces.half_scores(products, alpha, bias_ring, j, group)
                    if masked:
                        query = listed[row, block, j] * NARROW
                        shown = pieces.mask_of(fields_ref, row, query, first, (ROWS, NARROW), query_axis=1)()
                        half, *d_weights = (jnp.where(shown, x, 0.0) for x in (half, *d_weights))
                    weights, tanh = pieces.silu(half)
                    left = {"v": weights}
                    if d_weights:
                        left["k"] = pieces.d_half_scores(half, tanh, d_weights[0])
                    operands = [
                        pieces.as_operand(left[name].astype(k.dtype), scratch, group)
                        for name, scratch in zip(wanted, operand_smem)
                    ]
                    for name, total, operand in zip(wanted, totals, operands):
                        plgpu.wgmma(total, operand, queries if name == "k" else upstream)
                    plgpu.wgmma_wait(0)
                    q_ring.release(j)
                    g_ring.release(j)

                pieces.both_loops(step, counts, row, block)
                return [total[...] for total in totals]

            totals = pl.run_scoped(add_up, *(plgpu.ACC((ROWS, features), jnp.float32) for _ in wanted))
            for name, total, place, target in zip(wanted, totals, own, targets):
                pieces.store_outer(total * scales[name], place, target.at[rows])
            plgpu.wait_smem_to_gmem(0)

        def feed() -> None:
            @pl.loop(0, counts[row, block, 1])
            def _(j: jax.Array) -> None:
                rows = (row, pl.ds(listed[row, block, j] * NARROW, NARROW), head)
                q_ring.fetch(j, q_ref.at[rows])
                g_ring.fetch(j, g_ref.at[rows])
                for ring, source in zip(bias_ring, bias_refs):
                    ring.fetch(j, source.at[row, counts[row, block, 2] + j])

        pieces.by_group(compute, feed)

    rings = [(NARROW, features)] * 2 + ([] if bias is None else [(OUTER, NARROW)])
    taken = len(resident) * OUTER * features * k.dtype.itemsize + pieces.operand_bytes(len(wanted), NARROW, k.dtype)
    return pieces.kernel(
        body,
        [jax.ShapeDtypeStruct((batch, blocks * OUTER, heads, features), k.dtype)] * len(wanted),
        {"row": batch, "block": blocks, "head": heads},
        [
            [pieces.resident(features, k.dtype)] * len(resident),
            plgpu.Barrier(num_arrivals=len(resident), num_barriers=GROUPS),
            pieces.operand_scratch(len(wanted), NARROW, k.dtype),
            *pieces.rings_of(rings, taken, k.dtype),
        ],
        f"hstu_key_gradients_{wanted}",
    )(q, g, resident, fields, lists.counts, lists.inner, [] if bias is None else [bias])


def bias_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    fields: jax.Array,
    tiles: jax.Array,
    bias: jax.Array,
    *,
    alpha: float,
    factor: float,
) -> jax.Array:
    """Gradient of the bias of each listed tile, float32 [B, W, 128, 64], summed over the heads.

    A thread block owns one tile of ``tiles`` [B, W, 2], whose bias is at the same place of ``bias`` [B, W or more, 128,
    64], and runs over the heads; places without a tile stay unwritten.
    """
    batch, _, heads, features = q.shape
    width = tiles.shape[1]

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, g_ref, fields_ref, tiles_ref, bias_ref, out_ref, out_smem, *rings = refs
        q_ring, k_ring, v_ring, g_ring = (pieces.Ring(*ring) for ring in rings)
        row, place = lax.axis_index("row"), lax.axis_index("tile")
        outer, inner = tiles_ref[row, place, 0], tiles_ref[row, place, 1]

        def compute(group: jax.Array) -> None:
            own = pl.ds(group * ROWS, ROWS)

            def step(head: jax.Array, total: jax.Array) -> jax.Array:
                pairs = (q_ring, k_ring), (g_ring, v_ring)
                products, upstream = pieces.products_of(
                    *((left.take(head).at[own], pieces.transposed(right.take(head))) for left, right in pairs)
                )
                for ring in (q_ring, k_ring, g_ring, v_ring):
                    ring.release(head)
                half = products * (0.5 * alpha) + pieces.loaded_bias(bias_ref.at[row, place, own])
                return total + pieces.d_half_scores(half, pieces.silu(half)[1], upstream)

            zero = plgpu.layout_cast(jnp.zeros((ROWS, NARROW), jnp.float32), plgpu.Layout.WGMMA)
            total = lax.fori_loop(0, heads, step, zero)
            shape = (ROWS, NARROW)
            mask = pieces.mask_of(fields_ref, row, outer * OUTER + group * ROWS, inner * NARROW, shape, query_axis=0)
            total = jnp.where(mask(), total, 0.0)
            pieces.store_outer(total * (0.5 * factor), out_smem.at[group], out_ref.at[row, place, own])
            plgpu.wait_smem_to_gmem(0)

        def feed() -> None:
            queries, keys = pl.ds(outer * OUTER, OUTER), pl.ds(inner * NARROW, NARROW)

            @pl.loop(0, heads)
            def _(head: jax.Array) -> None:
                q_ring.fetch(head, q_ref.at[row, queries, head])
                k_ring.fetch(head, k_ref.at[row, keys, head])
                g_ring.fetch(head, g_ref.at[row, queries, head])
                v_ring.fetch(head, v_ref.at[row, keys, head])

        pl.when(outer >= 0)(lambda: pieces.by_group(compute, feed))

    rings = [(OUTER, features), (NARROW, features), (NARROW, features), (OUTER, features)]
    return pieces.kernel(
        body,
        jax.ShapeDtypeStruct((batch, width, OUTER, NARROW), jnp.float32),
        {"row": batch, "tile": width},
        [
            pieces.resident(NARROW, jnp.dtype(jnp.float32)),
            *pieces.rings_of(rings, OUTER * NARROW * 4, q.dtype),
        ],
        "hstu_bias_gradient",
    )(q, k, v, g, fields, tiles, bias)
