"""Reads the schedules that the TPU compiler dumps: what one grid step of a kernel costs, and its VMEM.

The compiler's last schedule is a tree of regions. Each `pl.when` of a kernel is a region that is branched around, and
the grid is a loop region. Two counts of a region are read:

- bundles: VLIW instructions of the program as it is emitted (`final_bundles`);
- cycles: the length of the schedule before waits for the matrix units are left to the hardware
  (`post-bundle-packing-post-ra`). It has no stalls for memory, so it is a lower bound of the time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# What the compiler has to dump, as the value of LIBTPU_INIT_ARGS; it is read once in a process.
DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    " --xla_jf_dump_llo_pass_label_regex=(final_bundles|schedule-analysis_final_bundles|post-bundle-packing-post-ra).*"
)
_TREE = "post-bundle-packing-post-ra"
_FILE = re.compile(rf"^\d+-(.+)-\d+-({_TREE}|schedule-analysis_final_bundles|final_bundles)\.txt$")
_REGION = re.compile(r"^\s*\$region(\d+): #\{.*?\}(?: parent=(\d+))?(?: // (\w+))?\s*$")
_RANGE = re.compile(r"^\s*// region range: \[(\d+), (\d+)\)")
_LOOP = re.compile(r"^\s*loop: start=(\S+), step=(\S+), limit=(\S+)")
_VMEM = re.compile(r"^\s*#allocation\w+ \[.*space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_UNKNOWN = -1  # end of a region
_MARK = re.compile(r"(Start/End empty|Start|End) region (\d+)")


@dataclass(frozen=True)
class Region:
    """A node of the tree. Spans are half-open: ``cycles`` in the schedule, ``bundles`` in the emitted program."""

    parent: int
    kind: str
    trips: int | None  # of a loop body, None where the length is not a constant
    cycles: tuple[int, int]
    bundles: tuple[int, int]


@dataclass(frozen=True)
class Branch:
    """A conditional part of a kernel's grid step (a `pl.when`), with its inner loops run to their end.

    Attributes:
      matmuls: matrix unit instructions issued (each 16 rows of bfloat16 against one loaded square of weights).
      loops: loops inside whose length is not a constant; they count as run once.
    """

    bundles: int
    cycles: int
    matmuls: int
    loops: int


@dataclass(frozen=True)
class Kernel:
    """One Pallas kernel of a compiled program.

    Attributes:
      vmem: bytes, the highest address in use: blocks (twice where double-buffered), scratch and spilled registers.
      bundles: of the whole program, every branch once.
      step: what every grid step costs outside of its branches: addresses, copies, waits, unconditional work.
      branches: those of a grid step, in the order of the program.
    """

    name: str
    vmem: int
    bundles: int
    step: Branch
    branches: tuple[Branch, ...]


def read_kernels(folder: Path) -> list[Kernel]:
    """The Pallas kernels among the dumps in ``folder``, by name."""
    files: dict[str, dict[str, Path]] = {}
    for path in folder.iterdir():
        if found := _FILE.match(path.name):
            files.setdefault(found[1], {})[found[2]] = path
    texts = {name: {kind: path.read_text() for kind, path in kinds.items()} for name, kinds in sorted(files.items())}
    return [
        read_kernel(name, kinds[_TREE], kinds["final_bundles"])
        for name, kinds in texts.items()
        if re.search(rf"%{re.escape(name)} = .*tpu_custom_call", kinds["schedule-analysis_final_bundles"])
    ]


def read_kernel(name: str, tree: str, program: str) -> Kernel:
    """A kernel from the texts of its region tree and of its emitted program."""
    spans, matmuls = _read_program(program)
    regions = _ended(_read_tree(tree, spans), len(matmuls))
    loop, parts = _grid_step(regions, matmuls)
    branches = tuple(_branch(regions, key, matmuls) for key in parts)
    whole = _branch(regions, loop, matmuls)
    step = Branch(
        whole.bundles - sum(branch.bundles for branch in branches),
        whole.cycles - sum(branch.cycles for branch in branches),
        whole.matmuls - sum(branch.matmuls for branch in branches),
        whole.loops - sum(branch.loops for branch in branches),
    )
    ends = [_number(size) + _number(offset) for size, offset in _matches(_VMEM, tree)]
    return Kernel(name, max(ends, default=0), len(matmuls), step, branches)


def _number(text: str) -> int:
    return int(text, 0)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, ...]]:
    return (found.groups() for line in text.splitlines() if (found := pattern.match(line)))


def _read_program(text: str) -> tuple[dict[int, tuple[int, int]], list[int]]:
    """(span of each region that has marks, matrix products in each bundle) of the emitted program."""
    starts: dict[int, int] = {}
    stops: dict[int, int] = {}
    matmuls: list[int] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            matmuls.append(0)
        if not matmuls:
            continue
        matmuls[-1] += line.count("= vmatmul.")
        for mark, region in _MARK.findall(line):
            if mark == "Start":
                starts[int(region)] = len(matmuls) - 1
            elif mark == "End":
                stops[int(region)] = len(matmuls)
    return {key: (start, stops.get(key, _UNKNOWN)) for key, start in starts.items()}, matmuls


def _read_tree(text: str, spans: Mapping[int, tuple[int, int]]) -> dict[int, Region]:
    """The regions by number. Regions that the compiler emptied have no span."""
    regions: dict[int, Region] = {}
    trips: dict[int, int | None] = {}  # of the latest loop whose parts stand in a region
    loop: tuple[str, ...] | None = None
    key, parent, kind = 0, -1, ""
    for line in text.splitlines():
        if found := _LOOP.match(line):
            loop = found.groups()
        elif found := _REGION.match(line):
            key, parent, kind = int(found[1]), int(found[2] or -1), found[3] or ""
            if kind == "loop_pre_header":  # of a loop without a line of its own nothing is known
                trips[parent], loop = _trips(*loop) if loop else None, None
            regions[key] = Region(parent, kind, trips.get(parent), (0, 0), spans.get(key, (0, 0)))
        elif found := _RANGE.match(line):
            cycles = (int(found[1]), int(found[2]))
            regions[key] = Region(parent, kind, regions[key].trips, cycles, regions[key].bundles)
    return regions


def _ended(regions: Mapping[int, Region], length: int) -> dict[int, Region]:
    """Regions whose end the program does not mark (7x) reach to the next one that starts after all their parts."""

    def stop(key: int) -> int:
        inside = {key} | {child for child in regions if key in _ancestors(regions, child)}
        ends = [end for child in inside if (end := regions[child].bundles[1]) != _UNKNOWN]
        after = max([regions[key].bundles[0], *ends])
        starts = (region.bundles[0] for other, region in regions.items() if other not in inside and region.bundles[1])
        return min((start for start in starts if start >= after), default=length)

    unmarked = [key for key, region in regions.items() if region.bundles[1] == _UNKNOWN]
    found = {key: replace(regions[key], bundles=(regions[key].bundles[0], stop(key))) for key in unmarked}
    return {**regions, **found}


def _trips(start: str, step: str, limit: str) -> int | None:
    if not all(re.fullmatch(r"-?\d+", text) for text in (start, step, limit)):
        return None
    return -((int(start) - int(limit)) // int(step))


def _grid_step(regions: Mapping[int, Region], matmuls: Sequence[int]) -> tuple[int, list[int]]:
    """(the grid's loop, the branches of its step in the order of the program)."""
    outermost = [key for key, region in regions.items() if region.kind == "loop_body" and region.bundles[1]]
    loop = min(outermost, key=lambda key: len(list(_ancestors(regions, key))), default=0)

    def branches(parent: int) -> list[int]:
        own = [key for key, region in regions.items() if (region.parent, region.kind) == (parent, "pred_region")]
        return sorted((key for key in own if any(_size(regions[key], matmuls))), key=lambda key: regions[key].bundles)

    def busy(parent: int) -> list[int]:
        return [key for key in branches(parent) if _size(regions[key], matmuls)[2]]

    step = loop
    while len(inner := busy(step)) == 1 and busy(inner[0]):  # the grid's own condition around the whole step
        step = inner[0]
    return loop, branches(step)


def _ancestors(regions: Mapping[int, Region], key: int) -> Iterator[int]:
    while (key := regions[key].parent) in regions:
        yield key


def _size(region: Region, matmuls: Sequence[int]) -> tuple[int, int, int]:
    """(bundles, cycles, matrix unit instructions) of a region, every loop inside once."""
    start, stop = region.bundles
    return stop - start, region.cycles[1] - region.cycles[0], sum(matmuls[start:stop])


def _branch(regions: Mapping[int, Region], key: int, matmuls: Sequence[int]) -> Branch:
    """The cost of a region, with each loop inside it counted as often as it runs."""
    (bundles, cycles, products), loops = _size(regions[key], matmuls), 0
    for child, region in regions.items():
        above = list(_ancestors(regions, child))
        if region.kind != "loop_body" or key not in above:
            continue
        if any(regions[between].kind == "loop_body" for between in above[: above.index(key)]):
            continue  # counted with the loop around it
        inside, once = _branch(regions, child, matmuls), _size(region, matmuls)
        trips = 1 if region.trips is None else region.trips
        bundles += trips * inside.bundles - once[0]
        cycles += trips * inside.cycles - once[1]
        products += trips * inside.matmuls - once[2]
        loops += inside.loops + (region.trips is None)
    return Branch(bundles, cycles, products, loops)
