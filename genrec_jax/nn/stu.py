"""The stack of HSTU layers of the public ranking code (DLRM-v3, modules/stu.py), for its tokens or its parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.nn.hstu import RANKING, HSTUBlock
from genrec_jax.nn.stack import Stack


def stu_stack(
    width: int,
    depth: int,
    heads: int,
    *,
    qk_width: int,
    v_width: int,
    longest: int,
    alpha: float | None = None,
    group_norm: bool = False,
    dropout: float = 0.0,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> Stack:
    """``depth`` layers [U, V, Q, K] = LN(X) W + b;  Y = X + W_o dropout([SiLU(U); A V; norm(A V) * SiLU(U)]).

    What a token sees (candidates, a window, a context prefix that looks ahead) is in the tokens that the stack is
    called with: ``kernels_pallas.hstu_attention.jagged_tokens`` has the public code's arguments. There is no relative
    bias: its positions and times are added to the tokens.

    ``longest``: the divisor of attention, which the public code takes from the batch. ``alpha``: of Q K^T, None for
    ``qk_width ** -0.5``. ``group_norm``: normalises A V of each head alone.
    """

    def block() -> HSTUBlock:
        return HSTUBlock(
            width,
            heads,
            qk_width=qk_width,
            v_width=v_width,
            longest=longest,
            project_init=jax.nn.initializers.glorot_uniform(),
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
            variant=dataclasses.replace(RANKING, group_norm=group_norm),
            alpha=qk_width**-0.5 if alpha is None else alpha,
            out_bias=None,
        )

    return Stack([block() for _ in range(depth)], longest=0)
