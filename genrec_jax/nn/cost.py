"""The accounts every block must enter: FLOPs, parameters and activation bytes, stated beside its equations.

Conventions: a multiply-add is 2 FLOPs; causal attention counts half the square; embedding rows are parameters, not
FLOPs; training is three times the forward pass. A block that was told of devices that divide its work
(`genrec_jax.nn.stack.over_devices`) states what one of them does.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What devices along an axis of a mesh send each other for one row. kind: of
    `genrec_jax.distributed.collectives.KINDS`; forward, backward: its payload in either pass, bytes."""

    kind: str
    axis: str
    forward: float
    backward: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one forward pass over one row of a batch.

    flops: forward floating-point operations; loss_flops: those among them that only the training loss takes, so that
    scoring does not; dense_params and embedding_params: scalars held; embedding_reads: embedding scalars looked up for
    the row, one looked up twice counted twice; activation_bytes: bytes kept for the backward pass; again_flops: forward
    operations that the backward pass computes again, with rematerialisation; exchanges: between devices.
    """

    flops: float = 0.0
    loss_flops: float = 0.0
    dense_params: int = 0
    embedding_params: int = 0
    embedding_reads: int = 0
    activation_bytes: float = 0.0
    again_flops: float = 0.0
    exchanges: tuple[Exchange, ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.loss_flops + other.loss_flops,
            self.dense_params + other.dense_params,
            self.embedding_params + other.embedding_params,
            self.embedding_reads + other.embedding_reads,
            self.activation_bytes + other.activation_bytes,
            self.again_flops + other.again_flops,
            self.exchanges + other.exchanges,
        )

    def among(self, devices: int, *, activations: bool = True) -> "Cost":
        """A device's part where ``devices`` divide the products, and what is kept unless each keeps it all."""
        kept = self.activation_bytes / (devices if activations else 1)
        return dataclasses.replace(self, flops=self.flops / devices, activation_bytes=kept)

    @property
    def active_params(self) -> int:
        """Parameters that one row touches: all dense ones, and the embedding scalars read, at most as many as held."""
        return self.dense_params + min(self.embedding_reads, self.embedding_params)


def total(costs: list[Cost]) -> Cost:
    """The sum of blocks that each hold their own parameters."""
    return sum(costs, Cost())
