"""Traces of each kind of device, written by hand, give the times that they show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from jax.profiler import ProfileData

from jaxgpt.profile.trace import Ran, Trace, read
from jaxgpt.train.hooks import BESIDE

Events = Sequence[tuple[str, float, float, dict[str, Any]]]
"""Name, begin and end in microseconds, statistics."""


def trace(planes: Mapping[str, Mapping[str, Events]]) -> ProfileData:
    """A trace: plane -> line -> events."""

    def text() -> Iterator[str]:
        for plane, lines in planes.items():
            events = [event for line in lines.values() for event in line]
            names = list(dict.fromkeys(event[0] for event in events))
            stats = list(dict.fromkeys(name for event in events for name in event[3]))
            yield f'planes {{ name: "{plane}"'
            for line, of_line in lines.items():
                yield f'lines {{ name: "{line}"'
                for name, begin, end, known in of_line:
                    yield f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {round(begin * 1e6)}"
                    yield f"duration_ps: {round((end - begin) * 1e6)}"
                    for key, value in known.items():
                        kind = "str_value" if isinstance(value, str) else "int64_value"
                        quote = '"' if isinstance(value, str) else ""
                        yield f"stats {{ metadata_id: {stats.index(key) + 1} {kind}: {quote}{value}{quote} }}"
                    yield "}"
                yield "}"
            for kind, known in (("event", names), ("stat", stats)):
                for number, name in enumerate(known, 1):
                    yield f'{kind}_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}'
            yield "}"

    return ProfileData.from_text_proto("\n".join(text()))


def micro(found: Mapping[str, Ran]) -> dict[str, tuple[float, int]]:
    return {name: (pytest.approx(ran.seconds * 1e6), ran.runs) for name, ran in found.items()}


def op(name: str, module: str = "jit_step", **more: Any) -> dict[str, Any]:
    return {"hlo_op": name, "hlo_module": module, **more}


def test_gpus_and_their_streams() -> None:
    """Kernels have names of their own; two streams share the time in which both work."""
    streams = {
        "Stream #1(Kernel)": [
            ("sm90_gemm", 0, 10, op("dot.1")),
            ("loop_fusion", 10, 14, op("fusion.2")),
            ("loop_fusion", 20, 22, op("fusion.2")),
            ("other", 30, 35, op("dot.1", "jit_eval")),
        ],
        "Stream #2(Kernel)": [("ncclKernel", 8, 12, op("all-reduce-start"))],
        "Stream #3(MemcpyH2D)": [("MemcpyH2D", 24, 25, {})],
        "XLA Ops": [("dot.1", 0, 10, op("dot.1"))],  # derived, as TensorBoard would
    }
    host = {"python": [(BESIDE, 28, 36, {})], "threads": [("dot.1", 0, 3, op("dot.1"))]}
    planes = {"/host:CPU": {"python": [], **host}, "/device:GPU:0": streams}
    found = read(trace(planes), "jit_step")
    assert micro(found.instructions) == {
        "dot.1": (9, 1),
        "fusion.2": (5, 2),
        "all-reduce-start": (2, 1),
        "MemcpyH2D": (1, 1),
    }
    assert (found.devices, found.others, found.beside) == (1, {}, pytest.approx(8e-6))
    planes["/host:CPU"] = {}
    planes["/device:GPU:1"] = {"Stream #9": [("sm90_gemm", 0, 6, op("dot.1"))]}
    found = read(trace(planes), "jit_step")
    assert found.devices == 2
    assert found.instructions["dot.1"].runs == 2
    assert found.others == {"jit_eval": pytest.approx(5e-6)}


def test_tpus_and_their_loops() -> None:
    """A loop has what no instruction in it has; another line says which program ran."""
    lines = {
        "XLA Modules": [("jit_step(123)", 0, 20, {}), ("jit_eval(7)", 20, 30, {})],
        "XLA Ops": [
            ("%while.1 = (s32[]) while(...)", 0, 10, {}),
            ("%fusion.3 = f32[8] fusion(...)", 1, 5, {}),
            ("%fusion.3 = f32[8] fusion(...)", 6, 9, {}),
            ("%copy.4 = f32[8] copy(...)", 12, 15, {}),
            ("%copy.4 = f32[8] copy(...)", 21, 25, {}),
        ],
        "Async XLA Ops": [("%copy-start = f32[8] copy-start(...)", 0, 20, {})],
    }
    found = read(trace({"/device:TPU:0": lines, "/device:TPU:0 SparseCore 1": {}}), "jit_step", ["while.1"])
    assert micro(found.instructions) == {"while.1": (3, 1), "fusion.3": (7, 2), "copy.4": (3, 1)}
    assert found.others == {"jit_eval": pytest.approx(4e-6)}


def test_cpus_and_their_threads() -> None:
    """A part that another thread does belongs to its instruction; what waits for a thread has no time."""
    of = "ThreadpoolListener::{}".format
    lines = {
        "caller": [
            ("while.9", 0, 30, op("while.9", device_ordinal=0)),
            ("dot.1", 1, 9, op("dot.1", device_ordinal=0)),
            (of("Record"), 2, 2, {"_p": 5}),
            ("add.2", 9, 12, op("add.2", device_ordinal=0)),
            (of("Record"), 10, 10, {"_p": 6}),
            ("dot.1", 40, 42, op("dot.1", device_ordinal=1)),
            ("log", 44, 45, {}),
        ],
        "worker": [
            (of("StartRegion"), 3, 3, {"_c": 5}),
            (of("StopRegion"), 15, 15, {}),
            (of("StartRegion"), 16, 16, {"_c": 6}),
            (of("Record"), 17, 17, {"_p": 7}),
            (of("StopRegion"), 18, 18, {}),
            (of("StartRegion"), 18, 18, {"_c": 7}),  # a part of a part
            (of("StopRegion"), 20, 20, {}),
            (of("StartRegion"), 21, 21, {"_c": 99}),  # of nothing known
            (of("StopRegion"), 29, 29, {}),
        ],
    }
    found = read(trace({"/host:CPU": lines}), "jit_step", ["while.9"])
    # From 9 to 12 each has one of two threads; the loop has 0 to 1, 15 to 16 and 20 to 30.
    assert micro(found.instructions) == {
        "dot.1": (8 + 1.5 + 3 + 2, 2),
        "add.2": (1.5 + 4, 1),
        "while.9": (12, 1),
    }
    assert found.devices == 2


def test_a_trace_without_the_program() -> None:
    assert read(trace({"/host:CPU": {}}), "jit_step") == Trace(0, {}, {}, 0.0)
