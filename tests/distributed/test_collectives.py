"""Collectives as compilers write them: TPU, CPU, several results, groups in each notation."""

import pytest

from genrec_jax.distributed.collectives import Collective, collectives

LINES = {
    "a mesh's axis, asynchronous, in three computations": (
        "\n".join(
            f"  %all-gather.{n} = bf16[64,32]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%p), channel_id=1, "
            "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, "
            'frontend_attributes={chain_id="3"}'
            for n in range(3)
        ),
        Collective("all-gather", 4, 4096, 3072),
    ),
    "two axes, several results, an index between them": (
        "  %all-reduce.5 = (f32[64]{0:T(128)S(1)}, /*index=1*/f32[10,6]{1,0}, f32[]{:T(128)}) all-reduce(%a, %b, %c), "
        "replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%add",
        Collective("all-reduce", 8, 500, 875),
    ),
    "groups counted": (
        "  %r = f32[16,8]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
        Collective("reduce-scatter", 4, 2048, 1536),
    ),
    "groups listed": (
        "  ROOT %t = s32[8]{0} all-to-all(%x), replica_groups={{0,2},{1,3}}, dimensions={0}",
        Collective("all-to-all", 2, 32, 16),
    ),
    "all devices, started": (
        "  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}",
        Collective("all-gather", 8, 128, 112),
    ),
    "sent on": (
        "  %p = pred[3,5]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
        Collective("collective-permute", 8, 15, 15),
    ),
}


@pytest.mark.parametrize(("line", "want"), LINES.values(), ids=LINES)
def test_one_collective(line: str, want: Collective) -> None:
    text = f"  %a = f32[9]{{0}} add(%x, %y)\n{line}\n  %d = f32[32]{{0}} all-gather-done(%s)\n"
    assert collectives(text, 8) == (want,)


def test_one_device_alone_sends_nothing() -> None:
    line = "  %r = f32[4]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add"
    assert collectives(line, 8) == ()
