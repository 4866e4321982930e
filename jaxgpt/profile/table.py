"""The costliest operations of a step: a trace's times joined with what the compiled program says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jax.profiler import ProfileData

from jaxgpt.aot.hlo import COLLECTIVES
from jaxgpt.profile.costs import CONTROL, Cost, costs, module_name
from jaxgpt.profile.names import NO_PASS, Name
from jaxgpt.profile.trace import find_trace, read
from jaxgpt.report.profiled import Operation

UNNAMED = "(no name)"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a step, as one device ran it; all numbers are of one step.

    Attributes:
      label: its name in the program.
      name: where in our code it comes from.
      seconds: that it ran.
      runs: how often; a loop runs what is in it several times.
      bytes, flops: of all runs, see `costs.Cost`; None where they are not known.
    """

    label: str
    name: Name
    seconds: float
    runs: float
    bytes: float | None
    flops: float | None


@dataclass
class Row:
    """Instructions that belong together, and their sums."""

    instructions: list[Instruction] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all."""
        return sum(one.seconds for one in self.instructions)

    @property
    def runs(self) -> float:
        """Of all."""
        return sum(one.runs for one in self.instructions)

    @property
    def bytes(self) -> float | None:
        """Of all; None where one is not known."""
        return _total(one.bytes for one in self.instructions)

    @property
    def flops(self) -> float | None:
        """Of all; None where one is not known."""
        return _total(one.flops for one in self.instructions)

    @property
    def what(self) -> str:
        """A product's factors, or the primitives that took most of the time."""
        if product := self.instructions[0].name.product:
            return product
        times: dict[str, float] = defaultdict(float)
        for one in self.instructions:
            times[one.name.what] += one.seconds
        most = sorted(times, key=lambda what: -times[what])
        return ", ".join(most[:3]) + (", ..." if len(most) > 3 else "")


def _total(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else sum(filter(None, found))


@dataclass(frozen=True)
class Steps:
    """What was traced of some steps.

    Attributes:
      seconds: of one step, of all the time between the first one's begin and the last one's end, without
        evaluating and saving, and without other programs.
      instructions: of the step.
      others: seconds of a step by name of the other programs that ran meanwhile, as in an evaluation.
      devices: of this process.
    """

    seconds: float
    instructions: list[Instruction]
    others: dict[str, float]
    devices: int

    @property
    def idle(self) -> float:
        """Seconds of a step in which no instruction ran: the host, data, and waiting for other devices."""
        return max(0.0, self.seconds - sum(one.seconds for one in self.instructions))

    def rows(self, key: Callable[[Name], Hashable]) -> dict[Hashable, Row]:
        """The instructions by what a key says of their names, the longest first."""
        found: dict[Hashable, Row] = defaultdict(Row)
        for one in self.instructions:
            found[key(one.name)].instructions.append(one)
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))

    @property
    def operations(self) -> list[Operation]:
        """A row for every scope and pass, with the products of each shape and each kind of collective apart.

        The longest comes first.
        """
        rows = self.rows(lambda name: (name.scope, name.part, name.product or _apart(name)))
        return [_operation(row, self.seconds) for row in rows.values()]


def _apart(name: Name) -> str:
    return name.what if name.what in COLLECTIVES or not name.scope else ""


def _operation(row: Row, step: float) -> Operation:
    name = row.instructions[0].name
    return {
        "scope": name.scope or UNNAMED,
        "pass": name.part,
        "what": row.what,
        "product": bool(name.product),
        "runs": row.runs,
        "seconds": row.seconds,
        "share": row.seconds / step if step else 0.0,
        "bytes": row.bytes,
        "flops": row.flops,
        "instructions": [one.label for one in row.instructions],
    }


def traced_steps(folder: Path, text: str, seconds: float, steps: int) -> Steps:
    """What the trace in a folder says of steps.

    Args:
      folder: given to `jax.profiler.start_trace`.
      text: `compiled.as_text()` of the step; bytes and FLOPs are not known of a program without a text.
      seconds: how long all the steps took.
      steps: how many.
    """
    path, known = find_trace(folder), costs(text) if text else {}
    if path is None:
        return Steps(seconds / steps, [], {}, 0)
    loops = {name for name, cost in known.items() if cost.kind in CONTROL}
    found = read(ProfileData.from_file(str(path)), module_name(text), loops)
    each = steps * max(1, found.devices)
    instructions = [
        _instruction(label, ran.seconds / each, ran.runs / each, known.get(label))
        for label, ran in found.instructions.items()
    ]
    others = {name: share / each for name, share in found.others.items()}
    rest = (seconds - found.beside) / steps - sum(others.values())
    return Steps(max(rest, 0.0), instructions, others, found.devices)


def _instruction(label: str, seconds: float, runs: float, cost: Cost | None) -> Instruction:
    if cost is None:
        return Instruction(label, Name("", NO_PASS, label), seconds, runs, None, None)
    flops = None if cost.flops is None else cost.flops * runs
    return Instruction(label, cost.name, seconds, runs, cost.bytes * runs, flops)
