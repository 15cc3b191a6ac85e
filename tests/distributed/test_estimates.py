"""Estimates for GPUs, counted by hand; what they say devices send is held against compiled programs in test_mesh."""

import math
from typing import Any

import jax
import pytest

from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.distributed.estimates import estimated_plans
from genrec_jax.distributed.plan import Plan
from genrec_jax.distributed.topology import parse_topology
from genrec_jax.train.estimate import abstract_model, init_params, scoring_flops

SCHEMA = Schema(1024, ("click",))
ROWS, WIDTH, DEPTH = 16, 64, 3
# Numbers that a block of HSTU keeps of a token: its input and the normalised one, which all devices of a model keep
# whole; U, V, Q and K before and after SiLU, A V, and what the last map reads.
WHOLE, DIVIDED = 2 * WIDTH, (4 + 4 + 1 + 1) * WIDTH


def hstu() -> Trial:
    settings = {"train.batch_rows": ROWS, "model.width": WIDTH, "model.depth": DEPTH, "model.heads": 4}
    return override(default_trial("hstu"), {**settings, "data.history": 21})


def both(trial: Trial, gpus: int, *, remat: bool = False, schema: Schema = SCHEMA, **sizes: int) -> list[Plan]:
    return estimated_plans(trial, schema, parse_topology(f"h100:{gpus}"), sizes, 10, remat)


def stack(trial: Trial) -> tuple[float, int, float]:
    """Forward FLOPs of a row's blocks, tokens, and the bytes of everything else that is kept of the row."""
    model: Any = abstract_model(trial, SCHEMA)
    tokens, pairs = model.layout.row_tokens(trial.data.shape), model.layout.pairs(trial.data.shape)
    flops = DEPTH * (2 * tokens * (4 + 1) * WIDTH**2 + 2 * pairs * 2 * WIDTH)
    kept = model.cost(trial.data.shape).activation_bytes
    return flops, tokens, kept - DEPTH * tokens * (WHOLE + DIVIDED) * 4


def parameters(plan: Plan) -> float:
    return plan.state["parameters"] + plan.state["tables"]


def test_one_gpu_and_many_that_share_rows() -> None:
    """3 x forward FLOPs at 989 TFLOP/s; between nodes an adapter's 50 GB/s, within one 450 GB/s."""
    trial, schema = override(default_trial("dlrm"), {"train.batch_rows": 64}), Schema(50, ("click",))
    one, scored = both(trial, 1, data=1, schema=schema)
    row = abstract_model(trial, schema).cost(trial.data.shape)
    assert (one.flops, one.more_flops) == (3 * row.flops * 64, 0)
    assert one.seconds()["products"] == pytest.approx(one.flops / 989e12)
    assert one.collectives == scored.collectives == ()
    params = 4.0 * (row.dense_params + row.embedding_params)
    assert parameters(one) == params
    assert one.temporaries == row.activation_bytes * 64 + params
    assert (scored.flops, scored.requests, scored.more_flops) == (row.flops * 64, 64, 0)
    assert scored.temporaries == row.activation_bytes * 64
    assert scored.state == one.state
    many, _ = both(trial, 16, data=16, schema=schema)
    assert many.flops == one.flops / 16
    assert many.sent == pytest.approx(2 * 15 / 16 * params)
    assert many.seconds()["links"] == pytest.approx(many.sent / 50e9)
    near, _ = both(trial, 8, data=8, schema=schema)
    assert near.seconds()["links"] == pytest.approx(near.sent / 450e9)


def test_a_context_divides_tokens() -> None:
    """The last chunk is filled up; embeddings and the head every device computes alike."""
    trial = hstu()
    flops, tokens, rest = stack(trial)
    assert tokens % 4
    chunk = math.ceil(tokens / 4)
    alone, _ = both(trial, 1, data=1)
    plan, scored = both(trial, 4, context=4)
    assert plan.temporaries == ROWS * (rest + DEPTH * chunk * (WHOLE + DIVIDED) * 4) + parameters(plan)
    assert plan.flops == alone.flops / 4
    products = flops / 4 + DEPTH * 2 * (chunk - tokens / 4) * 5 * WIDTH**2
    computed = alone.flops + 3 * ROWS * (products - flops)
    assert plan.flops + plan.more_flops == pytest.approx(computed)
    assert plan.seconds()["products"] == pytest.approx(computed / 989e12)
    assert scored.flops == scoring_flops(abstract_model(trial, SCHEMA), trial.data.shape) * ROWS / 4
    assert scored.flops + scored.more_flops == pytest.approx(computed / 3)


def test_model_divides_heads() -> None:
    """A block's input and its norm every device keeps whole, and of the parameters all but its part of the maps."""
    trial = hstu()
    flops, tokens, rest = stack(trial)
    alone, _ = both(trial, 1, data=1)
    plan, _ = both(trial, 4, model=4)
    arrays = jax.tree.leaves(jax.eval_shape(lambda: init_params(trial, SCHEMA)))
    maps = DEPTH * (4 + 1) * WIDTH**2 * 4
    small = 4 * sum(x.size for x in arrays if x.size < 1024 or (x.shape[0] % 4 and x.shape[-1] % 4))
    used = parameters(alone) - maps * 3 / 4
    activations = ROWS * (rest + DEPTH * tokens * (WHOLE + DIVIDED / 4) * 4)
    assert plan.temporaries == activations + used + (used - small)
    assert plan.flops + plan.more_flops == pytest.approx(alone.flops - 3 * ROWS * flops * 3 / 4)


def test_remat_keeps_inputs_of_blocks_and_computes_them_again() -> None:
    """And the activations of one block at a time. A forward pass more takes time; it is none of the model's FLOPs."""
    trial = hstu()
    flops, tokens, rest = stack(trial)
    whole, _ = both(trial, 1, data=1)
    plan, _ = both(trial, 1, data=1, remat=True)
    kept = ROWS * (rest + (DEPTH * WIDTH + WHOLE + DIVIDED) * tokens * 4)
    assert plan.temporaries == kept + parameters(plan)
    assert (plan.flops, plan.more_flops) == (whole.flops, flops * ROWS)
    again = whole.temporaries - plan.temporaries
    assert plan.traffic - whole.traffic == pytest.approx(again)
    roofs = plan.seconds()
    assert roofs["products"] == pytest.approx((whole.flops + flops * ROWS) / 989e12)
    assert plan.mfu == pytest.approx(whole.flops / 989e12 / max(roofs.values()))
    sent, more = (both(trial, 4, context=4, remat=remat)[0].collectives for remat in (False, True))
    exchanged = [sum(one.payload for one in found if one.kind == "all-to-all") for found in (sent, more)]
    assert exchanged[1] == 1.5 * exchanged[0]  # the forward pass' once more


def test_a_retriever_gathers_its_table_to_score() -> None:
    """Of 16,384 ids or more, divided by rows: the whole of it, its normalised vectors, and some users' scores."""
    settings = {"train.batch_rows": 8, "train.embedding_optimizer": "rowwise_adagrad", "model.width": WIDTH}
    trial, schema = override(default_trial("sasrec"), settings), Schema(2**15, ())
    training, scored = both(trial, 8, fsdp=8, schema=schema)
    table = 2**15 * WIDTH * 4
    assert scored.gathered == table
    assert training.state["tables"] == table / 8
    assert table < training.temporaries < 4 * table  # boxes and the rows at hand
    (gathered,) = (one for one in scored.collectives if one.kind == "all-gather" and one.payload > table)
    assert gathered.payload < 1.1 * table
    assert 2 * table < scored.temporaries
    ranker = override(default_trial("dlrm"), {"train.batch_rows": 8})
    lent = both(ranker, 8, fsdp=8, schema=Schema(2**15, ("click",)))[1]
    assert lent.gathered == 0
    assert any(one.kind == "all-to-all" for one in lent.collectives)


@pytest.mark.parametrize(("sizes", "between"), [({"data": 2, "model": 8}, {2}), ({"fsdp": 16}, {16})])
def test_groups_within_a_node_do_not_use_its_adapter(sizes: dict[str, int], between: set[int]) -> None:
    trial = override(hstu(), {"model.heads": 8, "train.batch_rows": 64})
    plan, _ = both(trial, 16, **sizes)
    assert {one.group for one in plan.collectives if one.between_nodes} == between
    if "model" in sizes:
        assert {one.group for one in plan.collectives if not one.between_nodes} == {8}
