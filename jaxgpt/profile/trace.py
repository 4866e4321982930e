"""Reads an xprof trace: how long each instruction of one program ran, and what ran beside it.

CPUs: the host's plane has a line for each thread. An instruction's event says its program and its device. A
part of it that another thread does is a region there, with the number of an event `Record` that lies in the
instruction's event (or in a region of it). GPUs: a plane for each device has a line for each stream, and a
kernel's event says its program and its instruction. TPUs: a plane for each device has a line of
instructions, and another one that says when each program ran.
"""

from __future__ import annotations

import bisect
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from jaxgpt.train.hooks import BESIDE

HOST, DEVICE = "/host:CPU", re.compile(r"/device:(?:TPU|GPU):(\d+)")
RECORD, BEGIN, END = (f"ThreadpoolListener::{name}" for name in ("Record", "StartRegion", "StopRegion"))


class Op(NamedTuple):
    """An instruction of a program on a device."""

    device: int
    module: str
    name: str


class Span(NamedTuple):
    """From when to when a line did something, in nanoseconds.

    Attributes:
      begin, end: these.
      op: of what instruction; None where that is not known.
      part: whether it is a part that one thread does for another, and so no run of its own.
    """

    begin: float
    end: float
    op: Op | None
    part: bool = False


Line = list[Span]
"""What one thread, stream or core did; a span may lie in another one."""


class Ran(NamedTuple):
    """Of one instruction: seconds and runs, both of all steps and devices together."""

    seconds: float
    runs: int


@dataclass(frozen=True)
class Trace:
    """What ran on the devices of one process.

    Attributes:
      devices: how many ran the program.
      instructions: of the program. Time in which a device ran several is divided among them by the threads or
        streams that each one had, so that they add up to the time in which any ran; a loop has what no
        instruction in it has.
      others: seconds by name of the other programs that ran meanwhile, of all devices together.
      beside: seconds of the host's work that is no part of a step; what ran then is left out.
    """

    devices: int
    instructions: dict[str, Ran]
    others: dict[str, float]
    beside: float


def find_trace(folder: Path) -> Path | None:
    """The file of events that `jax.profiler.stop_trace` left under a folder."""
    return max(folder.glob("plugins/profile/*/*.xplane.pb"), default=None, key=lambda p: p.stat().st_mtime)


def read(data: ProfileData, module: str, containers: Collection[str] = ()) -> Trace:
    """What a trace says of one program.

    Args:
      data: the trace.
      module: the program's name.
      containers: instructions that run others, which are in the trace too.
    """
    with warnings.catch_warnings():  # the type of a statistic names no module
        warnings.simplefilter("ignore", DeprecationWarning)
        planes = {plane.name: plane for plane in data.planes}
        pauses = _pauses(planes)
        lines = [[span for span in line if not _inside(span, pauses)] for line in _lines(planes, module)]
    runs = Counter(span.op for line in lines for span in line if span.op and not span.part)
    devices = {op.device for op in runs if op.module == module}
    seconds = defaultdict(float, dict.fromkeys(runs, 0.0))  # also of what took no time
    for op, nanoseconds in _divided(lines, lambda op: op.module == module and op.name in containers):
        seconds[op] += nanoseconds / 1e9
    times: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    for op, time in seconds.items():
        (times if op.module == module else others)[op.name if op.module == module else op.module] += time
    counts: Counter[str] = Counter()
    for op, number in runs.items():
        counts[op.name] += number if op.module == module else 0
    own = {name: Ran(time, counts[name]) for name, time in times.items()}
    return Trace(len(devices), own, dict(others), sum(end - begin for begin, end in pauses) / 1e9)


def _divided(lines: Iterable[Line], holds: Callable[[Op], bool]) -> Iterator[tuple[Op, float]]:
    """Nanoseconds of instructions, see `Trace.instructions`; of what `holds` others only the rest."""
    edges: dict[int, list[tuple[float, int, Op]]] = defaultdict(list)
    for line in lines:
        for begin, end, op in _innermost(line):
            edges[op.device] += [(begin, 1, op), (end, -1, op)]
    for of_device in edges.values():
        working: Counter[Op] = Counter()
        holding: Counter[Op] = Counter()
        before = 0.0
        for now, change, op in sorted(of_device):
            if now > before and (running := working or holding):
                for one, threads in running.items():
                    yield one, (now - before) * threads / running.total()
            before, which = now, holding if holds(op) else working
            which[op] += change
            if not which[op]:
                del which[op]


def _innermost(line: Line) -> Iterator[tuple[float, float, Op]]:
    """What a line did from when to when, of spans that lie in each other the inner one."""
    open_spans: list[Span] = []
    now = 0.0

    def until(time: float) -> Iterator[tuple[float, float, Op]]:
        """Close what ends by then."""
        nonlocal now
        while open_spans and now < time:
            last = open_spans[-1]
            end = min(last.end, time)
            if last.op and end > now:
                yield now, end, last.op
            now = max(now, end)
            if last.end <= time:
                open_spans.pop()
        now = max(now, time)

    for span in sorted(line, key=lambda span: (span.begin, -span.end)):
        yield from until(span.begin)
        open_spans.append(span)
    yield from until(float("inf"))


def _pauses(planes: dict[str, Any]) -> list[tuple[float, float]]:
    """When the host did something that is no part of a step."""
    lines = planes[HOST].lines if HOST in planes else ()
    return [(e.start_ns, e.end_ns) for line in lines for e in line.events if e.name == BESIDE]


def _inside(span: Span, pauses: list[tuple[float, float]]) -> bool:
    return any(begin <= span.begin < end for begin, end in pauses)


def _lines(planes: dict[str, Any], module: str) -> list[Line]:
    """Of the accelerators, or where these did nothing of the CPUs."""
    devices = {int(found.group(1)): p for name, p in planes.items() if (found := DEVICE.fullmatch(name))}
    lines = [line for number, plane in devices.items() for line in _of_device(number, plane, module)]
    return lines if any(lines) or HOST not in planes else _of_threads(planes[HOST])


def _of_device(number: int, plane: Any, module: str) -> Iterator[Line]:
    """Lines of an accelerator; what names no program, as a copy from the host, is taken for `module`'s."""
    events = {line.name: list(line.events) for line in plane.lines}
    streams = [name for name in events if name.startswith("Stream")]
    programs = sorted((e.start_ns, e.end_ns, _plain(e.name)) for e in events.get("XLA Modules", ()))

    def span(event: Any) -> Span:
        stats, begin = dict(event.stats), event.start_ns
        where = _plain(str(stats.get("hlo_module", "")))
        at = bisect.bisect_right(programs, (begin, float("inf"), "")) - 1
        if not where and at >= 0 and begin < programs[at][1]:
            where = programs[at][2]
        own = str(stats.get("hlo_op") or event.name).split(" = ")[0].lstrip("%")
        return Span(begin, event.end_ns, Op(number, where or module, own))

    for name in streams or [name for name in events if name == "XLA Ops"]:
        yield [span(event) for event in events[name]]


def _of_threads(plane: Any) -> list[Line]:
    """Lines of CPUs."""
    lines: list[Line] = []
    records: list[tuple[float, int, Any]] = []
    regions: list[tuple[float, float, int, Any]] = []
    for number, line in enumerate(plane.lines):
        lines.append([])
        region = None
        for event in sorted(line.events, key=lambda event: event.start_ns):
            begin = event.start_ns
            if event.name == RECORD:
                records.append((begin, number, dict(event.stats).get("_p")))
            elif event.name == BEGIN:
                region = begin, dict(event.stats).get("_c")
            elif event.name == END and region:
                regions.append((region[0], begin, number, region[1]))
                region = None
            elif "hlo_op" in (stats := dict(event.stats)):
                where = int(stats.get("device_ordinal", 0)), _plain(str(stats["hlo_module"]))
                lines[-1].append(Span(begin, event.end_ns, Op(*where, str(stats["hlo_op"]))))
    _add_parts(lines, records, regions)
    return lines


def _add_parts(lines: list[Line], records: list[tuple[float, int, Any]], regions: list[Any]) -> None:
    """Add to the lines what their threads did for instructions of others.

    Args:
      lines: with their own instructions.
      records: when, on which line, the number of a part was given out.
      regions: from when to when, on which line, the part of that number was done.
    """
    by_number = {number: (begin, end, line) for begin, end, line, number in regions}
    starts = [[span.begin for span in line] for line in lines]
    for time, line, number in sorted(records, key=lambda record: record[0]):
        if number not in by_number:
            continue
        begin, end, where = by_number[number]
        at = bisect.bisect_right(starts[line], time) - 1
        while at >= 0 and lines[line][at].end < time:  # the innermost that it lies in
            at -= 1
        if at >= 0:
            place = bisect.bisect_right(starts[where], begin)
            lines[where].insert(place, Span(begin, end, lines[line][at].op, part=True))
            starts[where].insert(place, begin)


def _plain(module: str) -> str:
    """A program's name without the number of its compilation."""
    return re.sub(r"\(\d+\)$", "", module)
