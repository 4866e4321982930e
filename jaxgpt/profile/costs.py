"""What one run of each instruction of a program costs: bytes and FLOPs; and where in our code it comes from.

`aot.hlo` counts a whole program; here the same rules are read for each instruction that a trace can name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from jaxgpt.aot.hlo import COLLECTIVES, VIEWS, kernel_flops, kernel_name, product_flops
from jaxgpt.aot.hlo_text import Array, Computation, Op, arrays, parse
from jaxgpt.profile.names import TRACED, Name, name_of

Computations = dict[str, Computation]
CONTROL = ("while", "conditional", "call")
"""Instructions that run others, which a trace names too."""
IN_PLACE = (*VIEWS, *CONTROL, "constant", "after-all", "domain")
"""Instructions that move no bytes of their own."""
BOOKKEEPING = (
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding"),
    *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
)
"""Custom calls in which a compiler says something to itself."""
SLICES = ("slice", "dynamic-slice", "gather")
"""Instructions that read the part of their first operand that they return."""
ARITHMETIC = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "remainder", "power"),
    *("exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "erf"),
    *("sqrt", "rsqrt", "cbrt", "sine", "cosine", "tan", "atan2"),
}
"""Instructions that count as one FLOP for each element of floats."""
UNKNOWN = {
    *("sort", "map", "fft", "cholesky", "triangular-solve", "rng", "rng-bit-generator", "select-and-scatter")
}
"""Instructions whose FLOPs are not counted."""


@dataclass(frozen=True)
class Cost:
    """One run of an instruction on one device.

    Attributes:
      name: where in our code it comes from.
      kind: of the instruction in HLO.
      bytes: that it must read and write, each array once: what crosses the memory where no cache keeps it. A
        fusion reads of an array what its slices take, and of two arrays that one number chooses between the
        larger; of one that is updated in place it writes the update.
      flops: two for each multiplication and addition of a product, one for each element of other arithmetic
        on floats and of a sum; None where they are not known, as of a kernel or a sort.
    """

    name: Name
    kind: str
    bytes: float
    flops: float | None


def costs(text: str) -> dict[str, Cost]:
    """The cost of every instruction that a trace of a program may name; `text` is `compiled.as_text()`."""
    program, _ = parse(text)
    return {
        op.name: Cost(_name(op, part, program), op.kind, _bytes(op, part, program), _flops(op, part, program))
        for part in program.values()
        if not part.fused
        for op in part.ops.values()
        if op.kind not in ("parameter", "constant", "tuple", "get-tuple-element")
    }


def module_name(text: str) -> str:
    """The name by which a trace knows a program."""
    found = re.match(r"HloModule ([\w.\-]+)", text)
    return found.group(1) if found else ""


def _body(op: Op, program: Computations) -> Computation | None:
    """What a fusion computes."""
    return program.get(op.attribute(r"calls=%?([\w.\-]+)")) if op.kind == "fusion" else None


def _walk(op: Op, part: Computation, program: Computations) -> Iterator[tuple[Op, Computation]]:
    """The instruction, or those of a fusion."""
    if (body := _body(op, program)) is None:
        yield op, part
        return
    for inner in body.ops.values():
        yield from _walk(inner, body, program)


# Names --------------------------------------------------------------------------------------------


def _name(op: Op, part: Computation, program: Computations) -> Name:
    """That of the largest product in it, or its own or its last part's, or else that of what it reads."""
    inner = list(_walk(op, part, program))
    product, place = max(inner, key=lambda one: product_flops(*one))
    if product_flops(product, place):
        factors = " · ".join("x".join(map(str, a.dims)) for a in place.inputs(product)[:2])
        return name_of(product.source or op.source, product.kind, factors)
    kind = kernel_name(op) or inner[-1][0].kind
    kinds = (one.kind.removesuffix("-start") for one, _ in inner)
    if sent := next((kind for kind in kinds if kind in COLLECTIVES), ""):
        return name_of(_own_source(op, part, program), sent)._replace(what=sent)
    if own := _own_source(op, part, program):
        return name_of(own, kind)
    return name_of(_read_source(op, part, program), kind)._replace(what=kind)


def _own_source(op: Op, part: Computation, program: Computations) -> str:
    """The origin of an instruction or of its last part that has one; "" of what the compiler adds."""
    sources = [op.source, *(one.source for one, _ in reversed(list(_walk(op, part, program))))]
    return next((source for source in sources if source.startswith(TRACED)), "")


def _read_source(op: Op, part: Computation, program: Computations, depth: int = 4) -> str:
    """The origin of what an instruction reads."""
    read = [part.ops[name] for name in op.inputs if name in part.ops] if depth else []
    own = (one.source if one.kind == "parameter" else _own_source(one, part, program) for one in read)
    further = (_read_source(one, part, program, depth - 1) for one in read)
    return next(filter(None, (*own, *further)), "")


def _bookkeeping(op: Op) -> bool:
    return op.kind == "custom-call" and op.attribute(r'custom_call_target="([^"]*)"') in BOOKKEEPING


# Bytes --------------------------------------------------------------------------------------------


def _size(found: list[Array]) -> float:
    return sum(array.nbytes for array in found)


def _operand(op: Op, number: int, part: Computation) -> list[Array]:
    names = op.inputs
    known = part.ops.get(names[number]) if number < len(names) else None
    return arrays(known.type) if known else []


def _bytes(op: Op, part: Computation, program: Computations) -> float:
    if op.kind in IN_PLACE or op.kind.endswith(("-done", "-update")) or _bookkeeping(op):
        return 0.0
    if body := _body(op, program):
        given = {one.operands.strip(): one.name for one in body.ops.values() if one.kind == "parameter"}
        read = 0.0
        for number, name in enumerate(op.inputs):
            if name not in op.inputs[:number]:
                read += _read(given[str(number)], body, program) if str(number) in given else 0.0
        spared = sum(min(map(_size, sides)) for sides in _choices(body))
        return read - spared + _written(body.ops[body.root], body, program)
    operands = [part.ops[name] for name in dict.fromkeys(op.inputs) if name in part.ops]
    given = [array for one in operands for array in arrays(one.type)]
    results = arrays(op.type)
    if op.kind.endswith("-start") and len(results) > len(given) and results[: len(given)] == given:
        results = results[len(given) :]  # such a tuple begins with its operands
    if op.kind.removesuffix("-start") in SLICES:
        return 2 * _size(results) + _size(given) - _size(_operand(op, 0, part))
    if op.kind == "dynamic-update-slice":
        return 2 * _size(_operand(op, 1, part))
    if op.kind == "scatter":  # rows of the table are read and written
        tables = len(op.inputs) // 2
        updates = sum(_size(_operand(op, tables + 1 + i, part)) for i in range(tables))
        return _size(_operand(op, tables, part)) + 3 * updates
    if op.kind == "custom-call" and len(results) > 1 and results[-1].dtype in ("s8", "u8"):
        results = results[:-1]  # a library's workspace
    return _size(given) + _size(results)


def _read(name: str, body: Computation, program: Computations) -> float:
    """Bytes that a fusion reads of one of its operands."""
    whole, total = _size(arrays(body.ops[name].type)), 0.0
    for user in body.ops.values():
        places = [i for i, given in enumerate(user.inputs) if given == name]
        if not places:
            continue
        if user.kind == "bitcast":
            total += _read(user.name, body, program)
        elif user.kind in SLICES and places == [0]:
            total += _size(arrays(user.type))
        elif inner := _body(user, program):
            given = {one.operands.strip(): one.name for one in inner.ops.values() if one.kind == "parameter"}
            total += sum(_read(given[str(i)], inner, program) for i in places if str(i) in given)
        elif user.kind != "dynamic-update-slice" or places != [0]:
            return whole
    return min(total, whole)


def _choices(body: Computation) -> Iterator[tuple[list[Array], list[Array]]]:
    """What a fusion reads for the one and for the other side of each choice that one number makes."""
    users = Counter(name for op in body.ops.values() for name in set(op.inputs))

    def alone(name: str) -> Iterator[Array]:
        """The operands that only this value is made of."""
        op = body.ops.get(name)
        if op and users[name] == 1:
            yield from arrays(op.type) if op.kind == "parameter" else ()
            for given in op.inputs if op.kind != "parameter" else ():
                yield from alone(given)

    for op in body.ops.values():
        chooser = body.ops.get(op.inputs[0]) if op.kind == "select" else None
        if chooser and chooser.kind == "broadcast" and "dimensions={}" in chooser.attributes:
            yield list(alone(op.inputs[1])), list(alone(op.inputs[2]))


def _written(op: Op, body: Computation, program: Computations) -> float:
    """Bytes of a fusion's result that it writes."""
    if op.kind == "tuple":
        return sum(_written(body.ops[name], body, program) for name in op.inputs if name in body.ops)
    if op.kind == "bitcast" and op.inputs[0] in body.ops:
        return _written(body.ops[op.inputs[0]], body, program)
    if op.kind == "dynamic-update-slice":
        return _size(_operand(op, 1, body))
    if inner := _body(op, program):
        return _written(inner.ops[inner.root], inner, program)
    return _size(arrays(op.type))


# FLOPs --------------------------------------------------------------------------------------------


def _flops(op: Op, part: Computation, program: Computations) -> float | None:
    found = [_own_flops(inner, place) for inner, place in _walk(op, part, program)]
    return None if None in found else sum(filter(None, found))


def _own_flops(op: Op, part: Computation) -> float | None:
    if product := product_flops(op, part):
        return product
    if op.kind == "custom-call" and not _bookkeeping(op):
        return kernel_flops(name, op, part) if (name := kernel_name(op)) else None
    if op.kind.removesuffix("-start") in UNKNOWN:
        return None
    results = arrays(op.type)
    if not results or results[0].dtype[0] not in "bfc":  # no floats
        return 0.0
    if op.kind in ARITHMETIC:
        return float(results[0].size)
    if op.kind == "reduce" or op.kind.startswith(("all-reduce", "reduce-scatter")):
        return float(sum(array.size for array in part.inputs(op)[: len(results)]))
    if op.kind == "reduce-window":
        sizes = op.attribute(r"window=\{size=([\dx]+)")
        return float(results[0].size * math.prod(map(int, sizes.split("x")))) if sizes else None
    if op.kind == "scatter":
        return float(sum(a.size for a in _operand(op, len(op.inputs) // 2 + 1, part)))
    return 0.0
