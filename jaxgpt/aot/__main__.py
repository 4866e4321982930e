"""The other process of `aot.compile_for`: a request on standard input, one line of JSON as the answer."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time

from jaxgpt.aot import Answer, Request
from jaxgpt.aot.programs import compile_on
from jaxgpt.aot.topology import Topology
from jaxgpt.config import Run, from_json
from jaxgpt.errors import UserError
from jaxgpt.files import parse_json, to_json
from jaxgpt.layers.kernels.gpu import assume_device
from jaxgpt.sharding import make_mesh


def main() -> None:
    """Read a request from standard input and answer it with one line of JSON."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        request = parse_json(sys.stdin.read(), Request, "the request", "call `jaxgpt.aot.compile_for`")
        run, topology = from_json(Run, request.run), Topology(request.where)
        devices = topology.describe()
        if topology.chip.platform == "cuda":
            assume_device(devices[0])
        mesh = make_mesh(run.check_mesh(len(devices)), devices)
        reports = [
            compile_on(run, mesh, name, request.decoding, where=topology.name, keep=request.keep)
            for name in request.programs
        ]
        answer = Answer(reports=[dataclasses.asdict(report) for report in reports])
    except UserError as error:
        answer = Answer(mistake=str(error))
    print(to_json(dataclasses.asdict(answer)))


def _end_with(parent: int) -> None:
    """Exit when the parent process is gone: a compilation may take an hour and blocks libtpu."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
