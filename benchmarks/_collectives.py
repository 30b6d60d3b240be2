"""What the devices of a compiled program send to one another, read from its text (XLA's HLO)."""

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# What a device sends of R bytes of result in a group of n, by the ring algorithms of NCCL and of
# TPUs, which are optimal in bytes (Patarasuk and Yuan 2009, section 3, for the all-reduce).
SENT = {
    "all-gather": lambda result, n: result * (n - 1) / n,
    "all-reduce": lambda result, n: 2 * result * (n - 1) / n,
    "reduce-scatter": lambda result, n: result * (n - 1),
    "all-to-all": lambda result, n: result * (n - 1) / n,
    "collective-permute": lambda result, n: result,
}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?")
_NAME = re.compile(r"[\w.-]+")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclass(frozen=True)
class Collective:
    """An exchange of a program.

    Attributes:
      kind: a key of `SENT`.
      group: the devices of one of the groups that exchange.
      times: how often it runs.
      sent: bytes that a device sends each time.
    """

    kind: str
    group: tuple[int, ...]
    times: int
    sent: float


def collectives(text: str, devices: int) -> list[Collective]:
    """The exchanges of a program for so many devices.

    A loop counts as often as the program says; one whose count is not in it, once.

    Raises:
      ValueError: the program has an exchange whose bytes this does not know.
    """
    computations, entry = _split(text)
    found = []

    def visit(name: str, times: int) -> None:
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            result, operation, rest = match.groups()
            if operation in SENT:
                group = _group(rest, devices)
                size = SENT[operation](_size(result), len(group))
                found.append(Collective(operation, group, times, size))
            elif operation.removesuffix("-start") in SENT or "ragged-all-to-all" in operation:
                raise ValueError(f"no bytes are known for {operation}")
            trips = _TRIPS.search(rest) if operation == "while" else None
            for called in _called(rest):
                visit(called, times * int(trips[1]) if trips else times)

    visit(entry, 1)
    return found


def bytes_by_axes(found: list[Collective], mesh: dict[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that a device sends, by the mesh axes that an exchange goes along, and by its kind."""
    sums: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: collections.defaultdict(float)
    )
    for each in found:
        places = np.array(np.unravel_index(each.group, tuple(mesh.values())))
        axes = [axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place)]
        sums[" x ".join(axes)][each.kind] += each.times * each.sent
    return {axes: dict(kinds) for axes, kinds in sums.items() if axes}


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first that runs."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _called(rest: str) -> Iterator[str]:
    for match in _CALLED.finditer(rest):
        yield _NAME.match(rest, match.end())[0]
    for branches in _BRANCHES.finditer(rest):
        yield from (name.strip().lstrip("%") for name in branches[1].split(","))


def _size(result: str) -> int:
    """Bytes of an array, or of a tuple of arrays."""
    return sum(
        _BYTES[kind] * math.prod(map(int, filter(None, sizes.split(","))))
        for kind, sizes in _ARRAY.findall(result)
    )


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """One of the groups of an exchange, in each of the notations that there are."""
    if match := _PAIRS.search(rest):
        return int(match[1]), int(match[2])
    if match := _MESH_GROUPS.search(rest):
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", match[1])}
        along = re.findall(r"'([^']+)'", match[2])
        ids = np.arange(devices).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in along else 0 for name in sizes)
        return tuple(ids[first].reshape(-1).tolist())
    if match := _IOTA_GROUPS.search(rest):
        groups, shape, order = (
            tuple(map(int, part.split(","))) if part else None for part in match.groups()
        )
        ids = np.arange(devices).reshape(shape).transpose(order)
        return tuple(ids.reshape(groups)[0].tolist())
    if match := _LISTED_GROUPS.search(rest):
        return tuple(map(int, match[1].split(",")))
    return tuple(range(devices))
