"""What devices send each other in a compiled program, read off its text (optimised HLO)."""

import math
import re
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_CALL = re.compile(rf" = (\(?[^=]*?\)?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[([0-9,]+)\]<=")
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=([0-9]+)")
# The scope of what a step does where ids crowd, and otherwise not at all (genrec_jax/distributed/tables.py).
SELDOM = "seldom"
# A TPU's asynchronous collective stands in every computation that work is done in meanwhile, under one such number.
_CHAIN = re.compile(r'chain_id="([0-9]+)"')


@dataclass(frozen=True)
class Collective:
    """A collective of one step. kind: of `KINDS`. group: devices that take part in one. payload: bytes of its largest
    side, a device's input or output. sent: bytes that a device sends if they stand in a ring. between_nodes: of GPUs
    (estimates alone)."""

    kind: str
    group: int
    payload: float
    sent: float
    between_nodes: bool = False


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of a compiled program for ``devices``: those in a loop count once, those in the scope `SELDOM`
    not at all."""
    found, chains = [], set()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        call, chain = _CALL.search(line), _CHAIN.search(line)
        if call is None or (chain and chain[1] in chains) or f"/{SELDOM}/" in line:
            continue
        if chain:
            chains.add(chain[1])
        results, kind, start = call.groups()
        sizes = [_bytes(*shape) for shape in _SHAPE.findall(results)]
        if start and kind in ("all-gather", "collective-permute"):
            sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]  # operands come first
        group = _group(line, devices)
        if group > 1 or kind == "collective-permute":
            payload = sum(sizes) * (group if kind == "reduce-scatter" else 1)
            found.append(ring(kind, group, payload))
    return tuple(found)


def _bytes(dtype: str, dims: str) -> float:
    digits = re.search(r"[0-9]+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
    return bits / 8 * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str, devices: int) -> int:
    if counted := _COUNTED.search(line):
        return int(counted[1].split(",")[-1])
    if of_mesh := _OF_MESH.search(line):
        sizes = dict(_AXIS.findall(of_mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", of_mesh[2]))
    listed = _LISTED.search(line)
    return len(listed[1].split(",")) if listed and listed[1] else devices


def ring(kind: str, group: int, payload: float, *, between_nodes: bool = False) -> Collective:
    """A collective of ``group`` devices in a ring."""
    others = (group - 1) / group
    sent = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(kind, others)
    return Collective(kind, group, payload, payload * sent, between_nodes)
