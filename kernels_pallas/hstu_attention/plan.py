"""What all layers of one step share: token attributes, and whatever a backend derives from them.

Bucketing times, comparing segments and listing tiles costs as much as a layer's own attention, and none of it depends
on a layer's parameters. A model calls `plan` once per batch and hands the result to each layer in place of the tokens.
"""

import dataclasses
import functools
from typing import Any

import jax

from kernels_pallas.hstu_attention.tokens import Tokens


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "prepared"),
    meta_fields=("positions", "buckets", "backends"),
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Tokens with what backends derived from them; build it with `kernels_pallas.hstu_attention.plan`.

    Attributes:
      tokens: the tokens themselves, fields [B, T].
      prepared: what each backend asked for, by its name. Under jit, what no call uses is never computed.
      positions: n of the position table [2n - 1] the plan is for, 0 without a position bias.
      buckets: length of the time table the plan is for, 0 without a time bias.
      backends: names to try in order.
    """

    tokens: Tokens
    prepared: dict[str, Any]
    positions: int
    buckets: int
    backends: tuple[str, ...]
