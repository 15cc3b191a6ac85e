"""Multi-task heads as one block: shared-bottom, MMoE, DirL's head, CGC and PLE.

MMoE: Ma et al., KDD 2018. CGC and PLE: Tang et al., RecSys 2020. DirL (Microsoft, 2026) is one CGC level with N shared
experts and one expert per task.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from genrec_jax.distributed.tensor import UNDIVIDED
from genrec_jax.errors import UserError
from genrec_jax.nn.cost import Cost, Exchange, total


class Stacked(nnx.Module):
    """``n`` independent affine maps held as one kernel [n, inputs, outputs] and applied by one einsum."""

    def __init__(self, n: int, inputs: int, outputs: int, *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
        self.n, self.inputs, self.outputs = n, inputs, outputs
        self.dtype = dtype or jnp.float32
        init = jax.nn.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (n, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((n, outputs), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, inputs] (every map reads it) or [R, n, inputs] (one input per map) -> [R, n, outputs]."""
        equation = "ri,nio->rno" if x.ndim == 2 else "rni,nio->rno"
        y = jnp.einsum(equation, x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)[None]

    def cost(self, rows: int, *, one_input: bool = False) -> Cost:
        """``one_input``: all maps read the same vector, kept once for the backward pass."""
        kept = rows * self.inputs * (1 if one_input else self.n)
        return Cost(
            flops=2.0 * rows * self.n * self.inputs * self.outputs,
            dense_params=self.n * (self.inputs + 1) * self.outputs,
            activation_bytes=float(kept * jnp.dtype(self.dtype).itemsize),
        )


def _stack(n: int, sizes: Sequence[int], dtype: jnp.dtype | None, rngs: nnx.Rngs) -> list[Stacked]:
    return [Stacked(n, a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes)]


class CGCLevel(nnx.Module):
    """One level of customised gate control over T task branches and one shared branch.

    o_k = softmax(W_k x_k) . [E_{k,1..specific}(x_k); E_{s,1..shared}(x_s)]  (Tang et al. 2020, equations 1-3), and
    unless this is the ``last`` level  o_s = softmax(W_s x_s) . [all task experts; shared experts]  (PLE, equation 6).
    A branch that sees a single expert has no gate.
    """

    def __init__(
        self,
        inputs: int,
        tasks: int,
        shared: int,
        specific: int,
        widths: Sequence[int],
        *,
        last: bool,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.tasks, self.shared, self.specific, self.width = tasks, shared, specific, widths[-1]
        self.tensor = UNDIVIDED
        self.count = tasks * specific + shared
        self.experts = nnx.List(_stack(self.count, [inputs, *widths], dtype, rngs))
        self.gates = (
            None if shared + specific == 1 else Stacked(tasks, inputs, specific + shared, dtype=dtype, rngs=rngs)
        )
        self.shared_gate = None if last else Stacked(1, inputs, self.count, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [R, inputs] or one vector per branch [R, T + 1, inputs] -> [R, T (+ 1 unless last), width]."""
        e = self._experts(x)
        own = e[:, : self.tasks * self.specific].reshape(len(e), self.tasks, self.specific, self.width)
        common = e[:, self.tasks * self.specific :]
        branches = self._mix_tasks(x if x.ndim == 2 else x[:, : self.tasks], own, common)
        if self.shared_gate is None:
            return branches
        gate = _softmax(self.shared_gate(x if x.ndim == 2 else x[:, self.tasks :]))
        return jnp.concatenate([branches, jnp.einsum("rge,rew->rgw", gate, e)], axis=1)

    def _experts(self, x: jax.Array) -> jax.Array:
        """Every expert on its own branch's vector: [R, T * specific + shared, width], task experts first."""
        if x.ndim == 3:
            own = jnp.repeat(x[:, : self.tasks], self.specific, axis=1)
            x = jnp.concatenate([own, jnp.repeat(x[:, self.tasks :], self.shared, axis=1)], axis=1)
        x = self.tensor.enter(x) if x.ndim == 2 else self.tensor.own(x, 1)
        for layer in self.experts:
            x = jax.nn.relu(layer(x))
        return self.tensor.together(x, 1)

    def _mix_tasks(self, x: jax.Array, own: jax.Array, common: jax.Array) -> jax.Array:
        """own [R, T, specific, width], common [R, shared, width] -> the gated sum of each task, [R, T, width]."""
        if self.gates is None:
            return own[:, :, 0] if self.specific else jnp.repeat(common, self.tasks, axis=1)
        gate = _softmax(self.gates(x))
        mine = jnp.einsum("rks,rksw->rkw", gate[..., : self.specific], own)
        return mine + jnp.einsum("rks,rsw->rkw", gate[..., self.specific :], common)

    def cost(self, rows: int, *, one_input: bool) -> Cost:
        """Experts, gates and the weighted sums of experts over ``rows`` vectors."""
        alike = [one_input and i == 0 for i in range(len(self.experts))]  # all experts read the same vector
        parts = [
            layer.cost(rows, one_input=one).among(self.tensor.size, activations=not one)
            for layer, one in zip(self.experts, alike, strict=True)
        ]
        parts.append(self._exchanged(rows, one_input=one_input))
        if self.gates is not None:
            mixing = 2.0 * rows * self.tasks * (self.specific + self.shared) * self.width
            parts += [self.gates.cost(rows, one_input=one_input), Cost(flops=mixing)]
        if self.shared_gate is not None:
            parts += [self.shared_gate.cost(rows), Cost(flops=2.0 * rows * self.count * self.width)]
        return total(parts)

    def _exchanged(self, rows: int, *, one_input: bool) -> Cost:
        """What devices that divide the experts send: :meth:`_experts`."""
        if self.tensor.size == 1:
            return Cost()
        first, axis = self.experts[0], self.tensor.axis
        sent = float(rows * first.inputs * jnp.dtype(first.dtype).itemsize)
        joined = float(rows * self.count * self.width * jnp.dtype(first.dtype).itemsize)
        kind, times = ("all-reduce", 1) if one_input else ("all-gather", self.count)
        return Cost(exchanges=(Exchange(kind, axis, 0.0, times * sent), Exchange("all-gather", axis, joined, 0.0)))


class CGC(nnx.Module):
    """Multi-task head: mixtures of shared and task-specific experts, then one tower per task.

    g_k = softmax(W_k z);  m_k = sum_i g_{k,i} E_i(z);  logit_k = tower_k(m_k), i over shared and own experts.

    - shared-bottom: shared=1, specific=0 (no gate)      - MMoE: shared=N, specific=0
    - DirL: shared=N, specific=1                         - PLE: shared, specific >= 1 and levels > 1

    Experts and towers are MLPs with ReLU; ``widths`` are an expert's layers (its last one is the width of m_k),
    ``tower`` the hidden layers of a tower, () for a linear one.
    """

    def __init__(
        self,
        inputs: int,
        tasks: int,
        *,
        shared: int,
        specific: int,
        widths: Sequence[int],
        levels: int = 1,
        tower: Sequence[int] = (),
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        check(shared=shared, specific=specific, widths=widths, levels=levels, tower=tower)
        self.tasks = tasks
        self.levels = nnx.List(
            [
                CGCLevel(
                    inputs if level == 0 else widths[-1],
                    tasks,
                    shared,
                    specific,
                    widths,
                    last=level == levels - 1,
                    dtype=dtype,
                    rngs=rngs,
                )
                for level in range(levels)
            ]
        )
        self.towers = nnx.List(_stack(tasks, [widths[-1], *tower, 1], dtype, rngs))

    def __call__(self, z: jax.Array) -> jax.Array:
        """z [..., inputs] -> logits [..., tasks] float32."""
        x = z.reshape(-1, z.shape[-1])
        for level in self.levels:
            x = level(x)
        for i, layer in enumerate(self.towers):
            x = layer(jax.nn.relu(x) if i else x)
        return x.astype(jnp.float32).reshape(*z.shape[:-1], self.tasks)

    def cost(self, rows: int) -> Cost:
        """Cost of scoring ``rows`` vectors."""
        levels = [level.cost(rows, one_input=i == 0) for i, level in enumerate(self.levels)]
        return total([*levels, *(layer.cost(rows) for layer in self.towers)])


def check(*, shared: int, specific: int, widths: Sequence[int], levels: int, tower: Sequence[int]) -> None:
    """Raises UserError unless the sizes describe a head (for a model's own ``check``)."""
    if min(shared, specific) < 0 or shared + specific < 1:
        raise UserError(f"a task needs at least one expert, not {shared} shared and {specific} of its own")
    if not widths or min(*widths, *tower, levels) < 1:
        raise UserError(f"expert widths {tuple(widths)}, tower {tuple(tower)} and levels {levels} must be positive")
    if levels > 1 and min(shared, specific) < 1:
        raise UserError(f"{levels} levels of experts need shared and task-specific experts at every level")


def _softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis, computed in float32."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)
