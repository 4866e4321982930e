"""Parses the text of a compiled program (HLO): its instructions, and how often each one runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxgpt.layers.kernels.base import SELDOM

BITS = {"pred": 8, "bf16": 16} | {f"c{n}": n for n in (64, 128)}
"""Bits per element, if they are not the first number in the type's name (`f8e4m3fn`: 8)."""
_COMMA = re.compile(r",\s*(?![^\[\]{}()]*[\]})])")
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,<=]*)\]")


@dataclass(frozen=True)
class Array:
    """Type and shape of one array on one device."""

    dtype: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Bytes without padding; a 4-bit element counts as half a byte."""
        bits = BITS.get(self.dtype) or int(re.findall(r"\d+", self.dtype)[0])
        return bits / 8 * self.size


def arrays(text: str) -> list[Array]:
    """The arrays named in the text of a type, with tuples flattened."""
    return [
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in ARRAY.findall(text)
    ]


@dataclass(frozen=True)
class Op:
    """One instruction: `name = type kind(operands), attributes`."""

    name: str
    type: str
    kind: str
    operands: str
    attributes: str

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    @property
    def inputs(self) -> list[str]:
        """Names of the operands; older versions of the text also contain their types."""
        return [part.split("%")[-1].strip() for part in _COMMA.split(self.operands)]

    @property
    def source(self) -> str:
        """Its origin in Python, from JAX's name stack."""
        return self.attribute(r'op_name="([^"]*)"')


@dataclass
class Computation:
    """A list of instructions, and how often the program executes it.

    Attributes:
      ops: instructions by name, in order.
      root: name of the instruction whose value is the computation's result.
      runs: number of executions.
      depth: number of enclosing loops.
      fused: whether it is the body of a fusion, whose intermediate values are not written to memory.
    """

    ops: dict[str, Op]
    root: str = ""
    runs: int = 0
    depth: int = 0
    fused: bool = False

    def inputs(self, op: Op) -> list[Array]:
        """The arrays of an instruction's operands, in order."""
        return [array for name in op.inputs if name in self.ops for array in arrays(self.ops[name].type)]


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_KIND = re.compile(r"\s*([\w\-]+)\(")
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_REDUCERS = ("reduce", "sort", "scatter", "map", "reduce-window", "select-and-scatter", "reduce-scatter")
"""Operations that call a computation on scalars, which is not worth counting."""


def parse(text: str) -> tuple[dict[str, Computation], int]:
    """All computations of a module by name, and the number of loops with unknown iteration counts."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            # A line that is neither a head nor an end continues a kernel's metadata.
            if head := _HEAD.match(line):
                current = found[head.group(2)] = Computation({})
                entry = head.group(2) if head.group(1) else entry
            elif line.rstrip() == "}":
                current = None
        elif current is not None and (match := _LINE.match(line)):
            op = _op(*match.groups()[1:])
            current.ops[op.name] = op
            current.root = op.name if match.group(1) else current.root
    return found, _count(found, entry)


def _op(name: str, rest: str) -> Op:
    """Split `type kind(operands), attributes`; the type of a tuple contains parentheses itself."""
    end = _closing(rest, 0) if rest.startswith("(") else len(re.match(r"\S*", rest).group())  # type: ignore
    kind = _KIND.match(rest, end)
    if kind is None:
        return Op(name, rest, "", "", "")
    close = _closing(rest, kind.end() - 1)
    return Op(name, rest[:end], kind.group(1), rest[kind.end() : close - 1], rest[close:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _count(program: dict[str, Computation], entry: str) -> int:
    """Set how often each computation runs; returns the number of loops with unknown iteration counts."""
    unknown: set[str] = set()

    def walk(name: str, runs: int, depth: int, fused: bool) -> None:
        part = program[name]
        part.runs, part.depth, part.fused = part.runs + runs, max(part.depth, depth), fused
        for op in part.ops.values():
            if op.kind in _REDUCERS or op.kind.startswith("all-reduce"):
                continue
            turns, loop = 1, op.kind == "while"
            if loop and f"/{SELDOM}/" in op.source:
                continue
            if loop:
                turns = _turns(op, part, program)
                if not turns:
                    unknown.add(op.name)
            for _, called in _CALLS.findall(op.attributes):
                for inner in re.findall(r"[\w.\-]+", called):
                    if inner in program:
                        inside = fused or op.kind == "fusion"
                        walk(inner, runs * (turns or 1), depth + loop, inside)

    walk(entry, 1, 0, False)
    return len(unknown)


def _turns(loop: Op, around: Computation, program: dict[str, Computation]) -> int:
    """The number of iterations of a loop, or its maximum; 0 if it is known only at run time.

    TPU does not state the number; it follows from the counter's start, step and limit.
    """
    if known := loop.attribute(r"known_trip_count[^0-9]*(\d+)"):
        return int(known)
    condition = program[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = program[loop.attribute(r"body=%?([\w.\-]+)")]
    compare, arguments = condition.ops[condition.root], None
    if compare.kind == "fusion":
        arguments = [_scalar(name, condition, program) for name in compare.inputs]
        condition = program[compare.attribute(r"calls=%?([\w.\-]+)")]
        compare = condition.ops[condition.root]
    if compare.kind != "compare" or "direction=LT" not in compare.attributes:
        return 0
    counter, limit = (_scalar(name, condition, program, arguments) for name in compare.inputs)
    if counter is None or limit is None or counter[0] is None or limit[0] is not None:
        return 0
    starts, nexts = around.ops[loop.inputs[0]], body.ops[body.root]
    if starts.kind != "tuple" or nexts.kind != "tuple":
        return 0
    start = _scalar(starts.inputs[counter[0]], around, program)
    step = _scalar(nexts.inputs[counter[0]], body, program)
    if start is None or step is None or start[0] is not None or step[0] != counter[0] or step[1] < 1:
        return 0
    return max(-(-(limit[1] - counter[1] - start[1]) // step[1]), 0)


_Scalar = tuple[int | None, int]
"""A number as a loop counter (its index in the loop's tuple, or None) plus a constant."""


def _scalar(
    name: str,
    part: Computation,
    program: dict[str, Computation],
    arguments: list[_Scalar | None] | None = None,
) -> _Scalar | None:
    """An integer that is a constant, or a counter plus a constant; None for any other value."""
    op = part.ops.get(name)
    if op is None:
        return None
    if op.kind == "constant":
        number = op.operands.strip("{}")  # may be an array with one element
        return (None, int(number)) if number.isdigit() else None
    if op.kind in ("copy", "bitcast", "convert", "reshape"):
        return _scalar(op.inputs[0], part, program, arguments)
    if op.kind == "get-tuple-element":
        return int(op.attribute(r"index=(\d+)")), 0
    if op.kind == "parameter" and arguments is not None:
        return arguments[int(op.operands)]
    if op.kind == "fusion":
        inner = program[op.attribute(r"calls=%?([\w.\-]+)")]
        return _scalar(inner.root, inner, program, [_scalar(n, part, program, arguments) for n in op.inputs])
    if op.kind == "minimum":
        # The minimum of a value known only at run time and its upper bound: use the bound.
        known = [_scalar(n, part, program, arguments) for n in op.inputs]
        return min((one for one in known if one and one[0] is None), key=lambda one: one[1], default=None)
    if op.kind == "add":
        one, other = (_scalar(n, part, program, arguments) for n in op.inputs)
        if one and other and None in (one[0], other[0]):
            return other[0] if one[0] is None else one[0], one[1] + other[1]
    return None
