"""Pointwise SiLU attention (HSTU) and its softmax control, on rows that may pack several sequences."""

from kernels_pallas.hstu_attention.api import BACKENDS, hstu_attention, softmax_attention
from kernels_pallas.hstu_attention.buckets import TIME_BUCKETS, time_bucket
from kernels_pallas.hstu_attention.plan import Plan, plan
from kernels_pallas.hstu_attention.tokens import Tokens, visible

__all__ = [
    "BACKENDS",
    "TIME_BUCKETS",
    "Plan",
    "Tokens",
    "hstu_attention",
    "plan",
    "softmax_attention",
    "time_bucket",
    "visible",
]
