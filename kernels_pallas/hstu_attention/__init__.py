"""Pointwise SiLU attention (HSTU) and its softmax control, on packed, padded or mixed rows of sequences."""

from kernels_pallas.hstu_attention.api import (
    BACKENDS,
    hstu_attention,
    hstu_attention_padded,
    plan,
    softmax_attention,
)
from kernels_pallas.hstu_attention.buckets import TIME_BUCKETS, time_bucket
from kernels_pallas.hstu_attention.cached import hstu_attention_cached, split_tokens
from kernels_pallas.hstu_attention.columns import Columns
from kernels_pallas.hstu_attention.plan import Plan
from kernels_pallas.hstu_attention.tokens import Tokens, jagged_tokens, padded_tokens, visible

__all__ = [
    "BACKENDS",
    "TIME_BUCKETS",
    "Columns",
    "Plan",
    "Tokens",
    "hstu_attention",
    "hstu_attention_cached",
    "hstu_attention_padded",
    "jagged_tokens",
    "padded_tokens",
    "plan",
    "softmax_attention",
    "split_tokens",
    "time_bucket",
    "visible",
]
