"""Pointwise SiLU attention (HSTU) and its softmax control, on packed, padded or mixed rows of sequences."""

from kernels_pallas.hstu_attention.api import (
    BACKENDS,
    hstu_attention,
    hstu_attention_padded,
    plan,
    softmax_attention,
)
from kernels_pallas.hstu_attention.buckets import TIME_BUCKETS, time_bucket
from kernels_pallas.hstu_attention.cached import Scaled, hstu_attention_cached, scaled, split_tokens, widened
from kernels_pallas.hstu_attention.columns import Columns, heads_apart
from kernels_pallas.hstu_attention.plan import Plan
from kernels_pallas.hstu_attention.tokens import Tokens, jagged_tokens, padded_tokens, visible

__all__ = [
    "BACKENDS",
    "TIME_BUCKETS",
    "Columns",
    "Plan",
    "Scaled",
    "Tokens",
    "heads_apart",
    "hstu_attention",
    "hstu_attention_cached",
    "hstu_attention_padded",
    "jagged_tokens",
    "padded_tokens",
    "plan",
    "scaled",
    "softmax_attention",
    "split_tokens",
    "time_bucket",
    "visible",
    "widened",
]
