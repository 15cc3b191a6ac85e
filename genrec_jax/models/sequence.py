"""What the generative models share: their sizes and their stack of blocks."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.batch import Batch
from genrec_jax.errors import UserError
from genrec_jax.layouts import Layout, join, split
from genrec_jax.models.base import ModelConfig, Ranker
from genrec_jax.nn.basic import dropout
from genrec_jax.nn.hstu import HSTUBlock
from genrec_jax.nn.stack import Block, Stack
from genrec_jax.nn.transformer_block import TransformerBlock

Mixer = Literal["hstu", "softmax"]


@dataclasses.dataclass(frozen=True)
class SequenceConfig(ModelConfig):
    """width: D of every token. depth: blocks. heads: of attention. dropout: on the tokens and inside every block."""

    width: int = 64
    depth: int = 2
    heads: int = 2
    dropout: float = 0.1

    def check(self) -> None:
        if min(self.width, self.depth, self.heads) < 1:
            raise UserError("model.width, model.depth and model.heads must be positive")
        if self.width % self.heads:
            raise UserError(f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), not {self.dropout}")


@dataclasses.dataclass(frozen=True)
class RankingConfig(SequenceConfig):
    """Sizes as in SequenceConfig.

    base_width: parametrise the model so that learning rates found at this width, with one head, hold at any
    (:mod:`genrec_jax.models.mup`); 0 for the standard parametrisation. base_depth: blocks of a deeper model add
    base_depth / depth of what they compute; 0 for all of it at any depth.
    """

    base_width: int = 0
    base_depth: int = 0

    @property
    def base(self) -> "RankingConfig | None":
        if not (self.base_width or self.base_depth):
            return None
        return dataclasses.replace(self, width=self.base_width, heads=1) if self.base_width else self

    @property
    def branch(self) -> float:
        return min(1.0, self.base_depth / self.depth) if self.base_depth else 1.0

    def check(self) -> None:
        super().check()
        if min(self.base_width, self.base_depth) < 0:
            raise UserError("model.base_width and model.base_depth must not be negative")


class SequenceRanker(Ranker):
    """A ranker of tokens [context | history | candidates], in parts, so that a server can cache what comes before the
    candidates: logits = ``logits`` of the candidates' rows of ``stack`` over ``prefix`` and ``candidate_tokens``."""

    layout: ClassVar[Layout]
    stack: Stack
    dropout: float

    def states(self, batch: Batch, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
        """The stack's states at each event's first token [B, N, D] and at candidates [B, C, D]."""
        x = join(*self.prefix(batch), self.candidate_tokens(batch))
        x = self.stack(dropout(x, self.dropout, rngs), self.layout.tokens(batch), rngs=rngs)
        return split(x, batch.user.shape[1], batch.history.item.shape[1], self.layout.per_event)

    def prefix(self, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
        """Context tokens [B, S, D], and of each event ``layout.per_event`` tokens, each [B, N, D]."""
        raise NotImplementedError

    def candidate_tokens(self, batch: Batch) -> jax.Array:
        """[B, C, D]; may read the history."""
        raise NotImplementedError

    def logits(self, states: jax.Array) -> jax.Array:
        """States [..., D] at items or candidates -> [..., A] float32."""
        raise NotImplementedError


def ranking_stack(config: RankingConfig, mixer: Mixer, longest: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> Stack:
    """``depth`` blocks whose heads are ``width / heads`` wide; ``longest`` is the longest sequence a token can see.

    q . k grows like the width of a head once both have learned anything, in HSTU from the start (SiLU has a mean). With
    a base width it is divided by that, and is what the standard has where a head is as wide as the base.
    """
    head, base = config.width // config.heads, config.base_width

    def block() -> Block:
        if mixer == "softmax":
            return TransformerBlock(
                config.width,
                config.heads,
                scale=base**0.5 / head if base else head**-0.5,
                longest=longest,
                dropout=config.dropout,
                dtype=dtype,
                rngs=rngs,
            )
        return HSTUBlock(
            config.width,
            config.heads,
            qk_width=head,
            v_width=head,
            longest=longest,
            project_init=jax.nn.initializers.normal(config.width**-0.5),
            alpha=base / head if base else 1.0,
            dropout=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )

    return Stack([block() for _ in range(config.depth)], longest=longest)
