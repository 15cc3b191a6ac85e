"""Attention of long and packed rows in plain XLA: a loop over the tiles that hold anything, memory linear in the row.

Mask and bias of a tile are computed where it is met, from the attributes of its tokens, and what it adds to the output
or to a gradient is added in place: beside blocks of the inputs and of the results there is one tile at a time.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.hstu_attention.codes import Tables, codes
from kernels_pallas.hstu_attention.tokens import Keys, Queries, Tokens, attributes
from kernels_pallas.hstu_attention.worklist import work_list

BLOCK = 256
HIDDEN = -1e30  # score of a masked pair: SiLU and its slope are exactly 0 there, and so is exp after a row maximum


class Rule(NamedTuple):
    """How products become weights; the only place where the two operations differ."""

    kind: Literal["silu", "softmax"]
    scale: float  # on the products of queries and keys
    divisor: float  # of the output
    rate: float = 0.0  # of dropout on the weights


class Tiles(NamedTuple):
    """What all layers share. The blocks of all rows are numbered through: N = B · ceil(T / BLOCK).

    Attributes:
      listed: int32 scalar, tiles with work.
      query, key: int32 [W], the blocks of each tile; meaningful below ``listed``.
      queries, keys: attributes of tokens, int32 [N, BLOCK].
      place: int32 [N, BLOCK], a token's place in its row.
    """

    listed: jax.Array
    query: jax.Array
    key: jax.Array
    queries: Queries
    keys: Keys
    place: jax.Array


class _Inputs(NamedTuple):
    """Arguments of a call; q and k [B, T, H, Dqk], v [B, T, H, Dv]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: jax.Array  # `joint_table`
    tiles: Tiles


class _Sums(NamedTuple):
    """What the forward pass adds up, blocks [N, H, ., BLOCK]; SiLU needs the first alone."""

    out: jax.Array  # [N, H, Dv, BLOCK]
    top: jax.Array  # [N, H, 1, BLOCK], the largest score met
    total: jax.Array  # [N, H, 1, BLOCK], sum of exp(score - top)


def prepare(tokens: Tokens) -> Tiles:
    """Lists the tiles of tokens [B, T]."""
    queries, keys = attributes(tokens)
    work = work_list(queries, keys, BLOCK, BLOCK)
    length = tokens.segment.shape[1]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.segment.shape)

    def blocks(x: jax.Array, fill: int = 0) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -length % BLOCK)), constant_values=fill).reshape(-1, BLOCK)

    first = work.row * -(-length // BLOCK)
    return Tiles(
        work.size,
        first + work.query,
        first + work.key,
        Queries(*map(blocks, queries))._replace(self=blocks(queries.self, -1)),
        Keys(*map(blocks, keys))._replace(rank=blocks(keys.rank, -1)),
        blocks(place),
    )


def _blocks(x: jax.Array, tiles: Tiles) -> jax.Array:
    """[B, T, H, D] -> [N, H, D, BLOCK] in at least float32, with padding zeroed, whatever it holds (NaN included).

    Tokens stand innermost: the orientation in which XLA's CPU runs the small products of a tile fastest.
    """
    _, length, heads, width = x.shape
    x = jnp.pad(x.astype(jnp.promote_types(x.dtype, jnp.float32)), ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    real = tiles.queries.self >= 0
    return jnp.where(real[:, None, None], x.reshape(-1, BLOCK, heads, width).transpose(0, 2, 3, 1), 0)


def _rows(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_blocks`, in the shape and dtype of ``like``."""
    batch, length, heads, width = like.shape
    return blocks.transpose(0, 3, 1, 2).reshape(batch, -1, heads, width)[:, :length].astype(like.dtype)


def silu(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SiLU and its slope."""
    sigmoid = 1 / (1 + jnp.exp(-scores))
    weights = scores * sigmoid
    return weights, sigmoid * (1 + scores - weights)


def _tile_codes(reach: Tables, tiles: Tiles, i: jax.Array, j: jax.Array) -> jax.Array:
    """`codes` [BLOCK, BLOCK] of query block i against key block j."""
    queries = Queries(*(x[i][:, None] for x in tiles.queries))
    keys = Keys(*(x[j][None] for x in tiles.keys))
    # Without the barrier XLA computes the codes again for every head and every use: a third of all time.
    return jax.lax.optimization_barrier(codes(reach, queries, keys, tiles.place[j][None]))


def _tile_scores(
    rule: Rule, reach: Tables, q_t: jax.Array, k_t: jax.Array, table: jax.Array, code: jax.Array
) -> jax.Array:
    """Scores [H, BLOCK, BLOCK] of one tile, `HIDDEN` or less where the mask hides."""
    if reach.positions or reach.buckets:
        bias = table.at[code].get(mode="promise_in_bounds")
    else:
        bias = jnp.where(code == reach.hidden, jnp.asarray(HIDDEN, table.dtype), 0)
    return rule.scale * jnp.einsum("hdi,hdj->hij", q_t, k_t) + bias


def _forward(rule: Rule, reach: Tables, inputs: _Inputs) -> _Sums:
    """Sums over all tiles; softmax keeps a running maximum and rescales what it has when the maximum rises."""
    tiles = inputs.tiles
    q_t, k_t, v_t = (_blocks(x, tiles) for x in inputs[:3])
    line = jnp.zeros_like(v_t[:, :, :1])

    def step(entry: jax.Array, sums: _Sums) -> _Sums:
        i, j = tiles.query[entry], tiles.key[entry]
        scores = _tile_scores(rule, reach, q_t[i], k_t[j], inputs.table, _tile_codes(reach, tiles, i, j))
        if rule.kind == "silu":
            return sums._replace(out=sums.out.at[i].add(jnp.einsum("hdj,hij->hdi", v_t[j], silu(scores)[0])))
        top = jnp.maximum(sums.top[i], scores.max(-1)[:, None])
        raised, shrink = jnp.exp(scores - top.mT), jnp.exp(sums.top[i] - top)
        return _Sums(
            sums.out.at[i].set(shrink * sums.out[i] + jnp.einsum("hdj,hij->hdi", v_t[j], raised)),
            sums.top.at[i].set(top),
            sums.total.at[i].set(shrink * sums.total[i] + raised.sum(-1)[:, None]),
        )

    # A maximum that starts above `HIDDEN` leaves hidden pairs at exactly 0, in rows that see nothing too.
    return jax.lax.fori_loop(0, tiles.listed, step, _Sums(jnp.zeros_like(v_t), line + 0.5 * HIDDEN, line))


def _backward(
    rule: Rule, reach: Tables, inputs: _Inputs, sums: _Sums | None, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k, v and the table."""
    tiles = inputs.tiles
    q_t, k_t, v_t, g_t = (_blocks(x, tiles) for x in (*inputs[:3], d_out))
    g_t = g_t / rule.divisor

    def pull(scores: jax.Array, upstream: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights, and the cotangent of the scores given the weights' cotangent ``upstream``."""
        if sums is None:
            weights, slope = silu(scores)
            return weights, upstream * slope
        weights = jnp.exp(scores - sums.top[i].mT) / sums.total[i].mT
        mean = (sums.out[i] * g_t[i]).sum(1)[..., None] / sums.total[i].mT
        return weights, weights * (upstream - mean)

    def step(entry: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q, d_k, d_v, d_table = carry
        i, j = tiles.query[entry], tiles.key[entry]
        code = _tile_codes(reach, tiles, i, j)
        scores = _tile_scores(rule, reach, q_t[i], k_t[j], inputs.table, code)
        weights, d_scores = pull(scores, jnp.einsum("hdi,hdj->hij", g_t[i], v_t[j]), i)
        if reach.positions or reach.buckets:
            # Heads are added one by one: as a chain of sums it fuses, as a reduction it would be a pass of its own.
            d_bias = functools.reduce(jnp.add, (d_scores[head] for head in range(d_scores.shape[0])))
            d_table = d_table.at[code].add(d_bias, mode="promise_in_bounds")
        d_q = d_q.at[i].add(jnp.einsum("hdj,hij->hdi", k_t[j], d_scores))
        d_k = d_k.at[j].add(jnp.einsum("hdi,hij->hdj", q_t[i], d_scores))
        d_v = d_v.at[j].add(jnp.einsum("hdi,hij->hdj", g_t[i], weights))
        return d_q, d_k, d_v, d_table

    start = tuple(map(jnp.zeros_like, (q_t, k_t, v_t, inputs.table)))
    d_q, d_k, d_v, d_table = jax.lax.fori_loop(0, tiles.listed, step, start)
    d_qkv = (_rows(d, x) for d, x in zip((rule.scale * d_q, rule.scale * d_k, d_v), inputs[:3], strict=True))
    return *d_qkv, d_table


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    rule: Rule, reach: Tables, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, tiles: Tiles
) -> jax.Array:
    """Attention of q, k [B, T, H, Dqk] and v [B, T, H, Dv] under the joint table: [B, T, H, Dv]."""
    return _attend_forward(rule, reach, q, k, v, table, tiles)[0]


_Residuals = tuple[_Inputs, _Sums | None]


def _attend_forward(
    rule: Rule, reach: Tables, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, tiles: Tiles
) -> tuple[jax.Array, _Residuals]:
    inputs = _Inputs(q, k, v, table, tiles)
    sums = _forward(rule, reach, inputs)
    if rule.kind == "silu":
        return _rows(sums.out / rule.divisor, v), (inputs, None)
    sums = sums._replace(total=jnp.where(sums.total > 0, sums.total, 1))
    return _rows(sums.out / (rule.divisor * sums.total), v), (inputs, sums)


def _attend_backward(
    rule: Rule, reach: Tables, residuals: _Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None]:
    return *_backward(rule, reach, *residuals, d_out), None


attend.defvjp(_attend_forward, _attend_backward)
