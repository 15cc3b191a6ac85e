"""Layer normalisation times a gate, with dropout: what the HSTU block does between attention and its last product."""

from kernels_pallas.gated_norm.api import BACKENDS, gated_norm
from kernels_pallas.gated_norm.dropout import keep_mask

__all__ = ["BACKENDS", "gated_norm", "keep_mask"]
