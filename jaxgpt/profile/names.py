"""What an instruction of a compiled program is called: the scopes that it was traced in, and the pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

TRANSFORMED = re.compile(r"(\w+)\((.*)\)", re.DOTALL)
DROPPED = re.compile(
    r"|while|body|cond|branch_\d+_fun|scan|eval_jaxpr|closed_call|core_call|checkpoint|remat2?|shard_map|pjit"
    r"|custom_[vj][jv]p_call(_jaxpr)?|jvp|transpose|rematted_computation|.*->.*"
)
"""Parts of a name that JAX adds: structure of the program, and the letters of an einsum."""
RECOMPUTED = "rematted_computation"
TRACED = "jit("
"""Begins the names of what was traced; others are of arguments, as `state.step`."""
ARGUMENTS = "arguments"
"""The scope of what copies those."""
PASSES = ("jvp", "transpose")
FORWARD, BACKWARD, AGAIN, NO_PASS = "forward", "backward", "recomputed", ""


class Name(NamedTuple):
    """Where an instruction comes from.

    Attributes:
      scope: named scopes from the outside in, as `layers/attention/softmax`; numbers at their ends are left
        out, so that all layers have one. "" where it has none.
      part: `forward`, `backward`, `recomputed` in the backward pass, or "" outside of differentiation.
      what: JAX's primitive; of what the compiler adds, as copies, the instruction's kind.
      product: the shapes of a matrix product's factors, as `1024x768 · 768x3072`; "" for others.
    """

    scope: str
    part: str
    what: str
    product: str = ""


def name_of(source: str, kind: str, product: str = "") -> Name:
    """The name of an instruction.

    Args:
      source: `op_name` of its metadata, as `jit(train_step)/transpose(jvp(layers))/while/body/norm/mul`; what
        the compiler makes of several has `(a:b)` at its end; what copies an argument has the argument's name.
      kind: of the instruction.
      product: see `Name`.
    """
    if not source.startswith(TRACED):
        return Name(ARGUMENTS if source else "", NO_PASS, kind, product)
    *around, what = list(_words(source.split(";")[0])) or [""]
    scopes = [re.sub(r"[_.]?\d+$", "", word) for word in around if not DROPPED.fullmatch(word)]
    part = NO_PASS
    if "transpose" in around:
        part = AGAIN if RECOMPUTED in around else BACKWARD
    elif "jvp" in around:
        part = FORWARD
    what = kind if not what or what.startswith("(") else what
    return Name("/".join(filter(None, scopes)), part, what, product)


def _words(source: str) -> Iterator[str]:
    """The parts of a name: of `transpose(jvp(layers))` three, of `jit(f)` none."""
    depth, start = 0, 0
    for i, letter in enumerate(source + "/"):
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            word, start = source[start:i], i + 1
            if found := TRANSFORMED.fullmatch(word):
                transform, inner = found.groups()
                yield from (transform,) if transform in PASSES else ()
                yield from () if transform in ("jit", "pjit") else _words(inner)
            else:
                yield word
