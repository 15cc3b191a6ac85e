"""Layer normalisation times a gate, with dropout: what the HSTU block does between attention and its last product."""

from kernels_pallas.gated_norm.api import BACKENDS, gated_norm
from kernels_pallas.gated_norm.dropout import Part, keep_mask

__all__ = ["BACKENDS", "Part", "gated_norm", "keep_mask"]
