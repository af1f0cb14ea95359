"""What a compiled program does, counted: floating-point operations from its jaxpr, collectives from its optimised HLO.

A body counts as often as it runs. Scans say how often; of loops that run until something happens (decoding) the caller says it, from the
outermost in.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.extend import core

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64}


def _inner(eqn) -> Iterator:
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield getattr(one, "jaxpr", one)


def flops(jaxpr, runs: Sequence[int] = ()) -> int:
    """Two for every multiplication and addition of a matrix product, on all devices together. Attention of rows (`shard_map`) does not
    count: which of its blocks are computed is decided by the data."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in over)
        elif name == "scan":
            total += eqn.params["length"] * flops(eqn.params["jaxpr"].jaxpr, runs)
        elif name == "while":
            total += runs[0] * flops(eqn.params["body_jaxpr"].jaxpr, runs[1:]) if runs else 0
        elif name == "cond":
            total += max(flops(branch.jaxpr, runs) for branch in eqn.params["branches"])
        elif name != "shard_map":
            total += sum(flops(inner, runs) for inner in _inner(eqn))
    return total


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", re.M)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")
_CALLED = re.compile(r"(body|condition|to_apply|calls|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))")


class Move(NamedTuple):
    """A collective of a program: what it gives one device when it runs, and how often it runs."""

    kind: str
    bytes: int
    times: int
    looped: bool


def moves(hlo: str, runs: Sequence[int] = ()) -> Iterator[Move]:
    """Every collective of a program by its optimised HLO."""
    starts = list(_COMPUTATION.finditer(hlo))
    parts = {start[1]: hlo[start.end() : end.start() if end else len(hlo)] for start, end in zip(starts, [*starts[1:], None], strict=True)}

    def of(name: str, times: int, looped: bool, runs: Sequence[int]) -> Iterator[Move]:
        for line in parts[name].splitlines():
            if not (found := _OPERATION.match(line)):
                continue
            shapes, operation = found.groups()
            if (kind := operation.removesuffix("-start")) in COLLECTIVES:
                yield Move(kind, _bytes(shapes, operation != kind), times, looped)
            for role, several, one in _CALLED.findall(line):
                repeats, inside = 1, runs
                if role == "body" and (repeats := _trips(line, parts)) is None:
                    repeats, inside = runs[0] if runs else 1, runs[1:]
                for called in (several or one).replace("%", "").split(", "):
                    yield from of(called, times * repeats, looped or role == "body", inside)

    yield from of(next(start[1] for start in starts if start[0].startswith("ENTRY")), 1, False, runs)


def _trips(line: str, parts: dict[str, str]) -> int | None:
    """How often the body of a `while` runs where that is known: XLA says it, or (libtpu) the condition compares with a constant."""
    if said := _TRIPS.search(line):
        return int(said[1])
    condition = parts[next(one for role, _, one in _CALLED.findall(line) if role == "condition")]
    constants = {name: int(value) for name, value in _CONSTANT.findall(condition)}
    below = _BELOW.search(condition)
    return constants.get(below[2]) if below else None


def collectives(hlo: str, runs: Sequence[int] = ()) -> dict[str, int]:
    """Bytes that each kind of collective gives one device in one run of a program."""
    total: Counter = Counter()
    for move in moves(hlo, runs):
        total[move.kind] += move.times * move.bytes
    return dict(total)


def _bytes(shapes: str, pair: bool) -> int:
    """Of a result; an operation that only starts gives (operand, result)."""
    sizes = [math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(dtype, 8) // 8 for dtype, dims in _SHAPE.findall(shapes)]
    return max(sizes, default=0) if pair else sum(sizes)
