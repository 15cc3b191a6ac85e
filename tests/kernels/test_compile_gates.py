"""The kernels in their machines' compilers, and the check that reads the schedules these write."""

import dataclasses
import itertools
import json
import sys
import textwrap

import pytest

from benchmarks import llo, tpu_compile
from benchmarks.compile_cases import DIMS, GPU, HEADS, LENGTHS, TARGETS, Case, Result, grid, kernel_calls

DIRECTION = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
COMPILER = pytest.mark.skipif(
    not tpu_compile.has_compiler(),
    reason="the TPU compiler (libtpu) is not installed; `make compile-check` installs it",
)

# A grid loop of 6 steps: a first branch without products (4 bundles), a tile in a loop over 4 heads, and a masked tile.
TREE = """\
$region0: #{kernel.1}
  // region range: [0, 40)
  #allocation1 [shape = 'f32[8,128]', space=vmem, size = 0x1000, offset = 0x100000, scoped, tag = 'scratch operand']
  #allocation2 [shape = 'u8[64]', space=smem, size = 0x40, offset = 0x900000, scoped, tag = 'list']
  #allocation3_spill [shape = 'u32[8,128]', space=vmem, size = 0x800, offset = 0x102000, scoped, tag = 'spilled vreg']
  loop: start=0, step=1, limit=6
  $region1: #{kernel.1} parent=0 // loop_pre_header
    // region range: [0, 2)
  $region2: #{kernel.1} parent=0 // loop_body
    // region range: [2, 38)
    $region3: #{kernel.1} parent=2 // pred_region
      // region range: [5, 9)
    $region4: #{kernel.1} parent=2 // pred_region
      // region range: [10, 22)
LOOP
      $region5: #{kernel.1} parent=4 // loop_pre_header
        // region range: [10, 11)
      $region6: #{kernel.1} parent=4 // loop_body
        // region range: [11, 21)
    $region7: #{kernel.1} parent=2 // pred_region
      // region range: [23, 36)
"""


def emitted_program():
    """Each bundle of 30, with the marks of the regions above and products in regions 6 and 7."""
    marks = {
        2: "Start region 2",
        4: "Start region 3",
        7: "End region 3",
        8: "Start region 4",
        9: "Start region 6",
        15: "End region 6",
        16: "End region 4",
        18: "Start region 7",
        27: "End region 7",
        28: "End region 2",
    }
    products = {10, 12, 19, 20, 21, 22, 23, 24, 25, 26}
    lines = ["= control target key start"]
    for bundle in range(30):
        address = "   0 " if bundle == 0 else f"{bundle:#6x}"
        work = " ;;  ".join(["%1 = vmatmul.bf16.gmra.mxu0 %v1", "%2 = vmatpush.mxu0 %v2"] if bundle in products else [])
        mark = f" /* {marks[bundle]} :: Start/End empty region 99 */" if bundle in marks else ""
        lines.append(f"{address}   : > {{ {work} }}{mark}")
    return "\n".join(lines) + "\n"


def read(loop="      loop: start=0, step=1, limit=4\n"):
    return llo.read_kernel("kernel.1", TREE.replace("LOOP\n", loop), emitted_program())


def test_a_schedule_is_read_into_branches_with_their_loops_run_to_the_end():
    kernel = read()
    first, looped, masked = kernel.branches
    assert first == llo.Branch(bundles=4, cycles=4, matmuls=0, loops=0)
    # 9 bundles of which the loop's 7 run four times; of the schedule's 12 it has 10, and both products.
    assert looped == llo.Branch(bundles=9 + 3 * 7, cycles=12 + 3 * 10, matmuls=8, loops=0)
    assert masked == llo.Branch(bundles=10, cycles=13, matmuls=8, loops=0)
    assert kernel.step == llo.Branch(bundles=27 - 4 - 9 - 10, cycles=36 - 4 - 12 - 13, matmuls=0, loops=0)
    assert kernel.bundles == 30


def test_vmem_is_the_highest_address_of_vector_memory_with_spills():
    assert read().vmem == 0x102000 + 0x800


@pytest.mark.parametrize("loop", ["", "      loop: start=0, step=1, limit=%s12\n"])
def test_a_loop_of_unknown_length_counts_once_and_is_noted(loop):
    assert read(loop).branches[1] == llo.Branch(bundles=9, cycles=12, matmuls=2, loops=1)


def test_a_region_without_an_end_stops_where_the_next_one_starts():
    def region(parent, *bundles):
        return llo.Region(parent, "pred_region", None, (0, 0), bundles)

    regions = {0: region(-1, 0, -1), 1: region(0, 10, -1), 2: region(1, 20, 30), 3: region(0, 32, 50)}
    assert [region.bundles for region in llo._ended(regions, 60).values()] == [(0, 60), (10, 32), (20, 30), (32, 50)]


def case_of(target="v5e", backward=False, bias=False, length=2048, dim=128, heads=4):
    return Case(target, backward, bias, length, dim, heads)


def branch(bundles, matmuls=0, loops=0):
    return llo.Branch(bundles, bundles + 50, matmuls, loops)


def kernel_of(full, matmuls, vmem=2**20, bias=False):
    """A forward kernel whose full tiles take ``full`` bundles, 140 more with a mask.

    Two squares with many buckets take 150, one takes 80, one with few 30.
    """
    step, first, last = branch(10), branch(30), branch(20)
    many, few = [branch(150, loops=1), branch(80, loops=1)] * bias, [branch(30, loops=1)] * bias
    fills = [branch(40), *[branch(500)] * bias]
    tiles = [*many, branch(full - 10, matmuls), *few, *fills, *[branch(full + 90, matmuls)] * 2]
    return llo.Kernel("hstu_forward.1", vmem, 3 * full, step, (first, *tiles, last))


@pytest.mark.parametrize(("target", "ideal"), [("v5e", 1024), ("v5p", 1024), ("v6e", 256), ("7x", 256)])
def test_ideal_cycles_of_a_forward_tile(target, ideal):
    """The published figures for 512 x 512 pairs at D=128."""
    assert tpu_compile.ideal_cycles(case_of(target)) == ideal


def test_cost_is_per_512_tile_and_head_whatever_a_step_covers():
    case = case_of("v5e")
    one = tpu_compile.tile_costs(case, [kernel_of(1000, 256)])
    four = tpu_compile.tile_costs(case, [kernel_of(4000, 4 * 256)])
    assert one["full"] == (1000, 1100, 0)
    assert one["edge"].bundles == 1140
    assert set(one) == {"full", "edge"}
    assert four["full"].bundles == 1000
    biased = tpu_compile.tile_costs(case_of(bias=True), [kernel_of(1000, 256, bias=True)])
    bundles = {kind: cost.bundles for kind, cost in biased.items()}
    assert bundles == {"few": 1000, "one": 1080, "many": 1000 + 8 * 150, "edge": 1140 + 3 * 150 + 80 + 3 * 30}
    assert not any(cost.loops for cost in biased.values())


def test_a_kernel_with_other_branches_fails():
    kernel = kernel_of(1000, 256, bias=True)
    renamed = dataclasses.replace(kernel, name="other")
    reordered = dataclasses.replace(kernel, branches=(*kernel.branches[1:], kernel.branches[0]))
    for kernel in (kernel_of(1000, 256), renamed, reordered):
        assert "not those of BRANCHES" in tpu_compile.complaint(Result(case_of(bias=True), "", 1.0, (kernel,)))


def test_a_schedule_above_its_ceiling_and_a_full_memory_fail(monkeypatch):
    monkeypatch.setattr(tpu_compile, "CEILINGS", {("v5e", 128): (1010, *[0] * 7)})
    at, above = (Result(case_of(), "", 1.0, (kernel_of(n, 256),)) for n in (1010, 1011))
    assert tpu_compile.complaint(at) == ""
    assert "ceiling is 1010" in tpu_compile.complaint(above)
    large = dataclasses.replace(at, kernels=(kernel_of(1000, 256, vmem=129 * 2**20),))
    assert "129.0 MiB" in tpu_compile.complaint(large)


def test_every_combination_is_in_the_full_grid_and_every_value_in_the_covering_one():
    every, covering = grid(every=True), grid()
    assert len(set(every)) == len(TARGETS) * 4 * len(LENGTHS) * len(DIMS) * len(HEADS)
    assert set(covering) < set(every)
    for target in TARGETS:
        own = [case for case in covering if case.target == target]
        assert {(case.backward, case.bias, case.dim) for case in own} == set(itertools.product(*[(0, 1)] * 2, DIMS))
    scarce = [case for case in covering if case.target == "7x" and case.backward and case.bias]
    assert {case.heads for case in scarce} == set(HEADS)
    assert {min(LENGTHS), max(LENGTHS)} < {case.length for case in scarce}


# A compiler's process: a line of JSON per case, except that D=128 ends it.
WORKER = """
import json, sys
for case in json.load(sys.stdin):
    if case["dim"] == 128:
        sys.exit("check failed: register file")
    print(json.dumps({"case": case, "reason": "", "seconds": 1.0, "kernels": []}), flush=True)
"""


def test_a_compiler_that_ends_loses_one_case(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    start = tpu_compile.subprocess.Popen
    monkeypatch.setattr(
        tpu_compile.subprocess, "Popen", lambda command, **options: start([sys.executable, str(script)], **options)
    )
    cases = [case_of(dim=dim) for dim in DIMS]
    results = list(tpu_compile.compile_cases(cases))
    assert [result.case for result in results] == cases
    assert [result.reason for result in results[::2]] == ["", ""]
    assert "status 1: check failed: register file" in results[1].reason


def test_command_fails_and_writes_what_it_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tpu_compile, "has_compiler", lambda: True)
    monkeypatch.setattr(tpu_compile, "CEILINGS", {("v5e", 128): (1000, 1300, 1279, 2500, *[0] * 4)})
    costs = {False: 990, True: 1200}
    monkeypatch.setattr(
        tpu_compile,
        "compile_cases",
        lambda cases: (Result(case, "", 1.0, (kernel_of(costs[case.bias], 256, bias=case.bias),)) for case in cases),
    )
    words = ["--only", "v5e", "forward", "T=2048", "D=128", "H=4"]
    out = tmp_path / "results.json"
    assert tpu_compile.main([*words, "--quiet", "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  v5e forward bias" in printed
    assert "1 of 2 cases pass" in printed
    plain, biased = json.loads(out.read_text())
    assert plain["tiles"]["full"]["bundles"] == 990
    assert plain["complaint"] == ""
    assert biased["complaint"] == "a one tile takes 1280 bundles, the ceiling is 1279"
    assert tpu_compile.main([*words, "plain", "--quiet"]) == 0
    assert tpu_compile.main(["--only", "v9"]) == 2


@DIRECTION
@BIAS
@pytest.mark.parametrize("dim", DIMS)
def test_gpu_kernels_lower_for_hopper(dim, bias, backward):
    assert kernel_calls(case_of(GPU, backward, bias, dim=dim)) >= 1


@DIRECTION
@BIAS
@pytest.mark.parametrize("dim", DIMS)
def test_tpu_kernels_lower_to_mosaic(dim, bias, backward):
    assert kernel_calls(case_of("v5e", backward, bias, length=1024, dim=dim)) >= 1


@COMPILER
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_tpu_kernels_compile(target):
    """The least and the most demanding kernel, on both sizes of matrix unit; one head, for the compiler's time."""
    cases = [case_of(target, length=512, heads=1), case_of(target, backward=True, bias=True, length=1024, heads=1)]
    for result in list(tpu_compile.compile_cases(cases)):
        assert tpu_compile.complaint(result) == "", result.case.name
