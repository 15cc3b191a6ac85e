"""A stack of sequence blocks over one row of tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed.context import ALONE, Context
from genrec_jax.distributed.tensor import Division, Tensor, axis_of
from genrec_jax.errors import UserError
from genrec_jax.nn.cost import Cost, total
from genrec_jax.nn.experts import CGCLevel
from genrec_jax.nn.hstu import HSTUBlock
from genrec_jax.nn.sasrec import SASRecBlock
from genrec_jax.nn.transformer_block import TransformerBlock
from kernels_pallas.hstu_attention import TIME_BUCKETS, Plan, Tokens, plan

Block = HSTUBlock | SASRecBlock | TransformerBlock


class Stack(nnx.Module):
    """Blocks one after the other; what they share (masks, distances, time buckets) is prepared once per call.

    With ``remat`` only what goes from block to block is kept for the backward pass, which computes the rest again.
    In `jax.shard_map` the devices of a ``context`` divide the tokens among them, from the first block to the last, and
    those of a block's ``tensor`` its heads and hidden units.
    """

    def __init__(self, blocks: Sequence[Block], *, longest: int):
        """``longest``: n of the blocks' position tables [2n - 1], 0 if they have no relative bias."""
        self.blocks = nnx.List(blocks)
        self.longest = longest
        self.remat = False
        self.context = ALONE

    def __call__(self, x: jax.Array, tokens: Tokens, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; whatever padding tokens hold is dropped here."""
        length = x.shape[1]
        x = self.context.divided(jnp.where((tokens.segment > 0)[..., None], x, 0))
        pairs = plan(tokens, positions=self.longest, buckets=TIME_BUCKETS if self.longest else 0)
        run = nnx.remat(_run) if self.remat else _run
        for block in self.blocks:
            x = run(self.context.shared(block), x, pairs, rngs)
        return self.context.together(x, length)

    def cost(self, tokens: int, pairs: float) -> Cost:
        """Cost of one row of ``tokens`` tokens (padding included) with ``pairs`` visible pairs."""
        own = self.context.chunk(tokens)
        blocks = [block.cost(own, pairs / self.context.size) for block in self.blocks]
        inputs = [block.norm.cost(own).activation_bytes for block in self.blocks]
        whole = total([*blocks, self.context.joined(inputs[-1])])
        if not self.remat:
            return whole
        return dataclasses.replace(
            whole,
            activation_bytes=sum(inputs) + max(block.activation_bytes for block in blocks),
            again_flops=whole.flops,
            exchanges=tuple(
                one if one.kind == "all-gather" else dataclasses.replace(one, backward=one.forward + one.backward)
                for one in whole.exchanges
            ),
        )


def _run(block: Block, x: jax.Array, pairs: Plan, rngs: nnx.Rngs | None) -> jax.Array:
    return block(x, pairs, rngs=rngs)


def rematerialised[M: nnx.Module](model: M) -> M:
    """The model, told to keep between the passes no more of its stacks than their blocks' inputs."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Stack):
            module.remat = True
    return model


def over_devices[M: nnx.Module](model: M, context: Context, tensor: Tensor) -> M:
    """The model, told which devices divide the tokens of its rows, and which its heads, hidden units and experts, for
    use in `jax.shard_map`. Experts that cannot be divided evenly every device computes.

    Raises UserError if a stack's heads cannot be divided so, and ValueError for a block that knows no ``tensor``.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, CGCLevel) and module.count % tensor.size == 0:
            module.tensor = tensor
        if not isinstance(module, Stack):
            continue
        module.context = context
        for block in module.blocks:
            block.context, block.tensor = context, tensor
            if block.heads % (context.size * tensor.size):
                axes = {"context": context.size, "model": tensor.size}
                said = " times ".join(f"{axis} ({size})" for axis, size in axes.items() if size > 1)
                raise UserError(f"model.heads ({block.heads}) must be a multiple of the mesh's {said}")
            if isinstance(block, HSTUBlock) and block.variant.affine and tensor.size > 1:
                raise ValueError("the heads of an HSTU block with affine normalisations cannot be divided")
    return model


def divisions(model: nnx.Module) -> dict[tuple[Any, ...], Division]:
    """How the devices that the model was told of take its parameters apart, by their places in it."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Block | CGCLevel) or module.tensor.size == 1:
            continue
        for own, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
            axis = axis_of((*path, *own))
            if axis is None:
                continue
            if isinstance(module, CGCLevel) or own[0] != "project":
                found[*path, *own] = Division(axis, (param.get_value().shape[axis],))
            else:
                found[*path, *own] = Division(axis, module.sections)
    return found
