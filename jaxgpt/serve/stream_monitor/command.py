"""`jaxgpt monitor RUN [FILES|-]`: a stream of texts through a classifier, with alarms by a control chart.

jax and the web framework are imported only once the command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt.config import ONE_DEVICE, Labelled, Mesh, load_run
from jaxgpt.config.bounds import Bounds, Rows, bounded
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.evals.control_charts import Charting, Kind, Memory, Odds, RunLength, Size
from jaxgpt.files import to_json
from jaxgpt.sample.settings import Verify
from jaxgpt.serve.hook import run_hook
from jaxgpt.serve.stream_monitor.feed import Feed, read_files, read_stream
from jaxgpt.serve.stream_monitor.monitor import Monitor, Scored

if TYPE_CHECKING:
    from jaxgpt.sample.load import Trained

log = logging.getLogger(__name__)

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
ALARMED = 5
"""Exit code where an alarm came."""
BATCH = 256
"""Texts of a file that are put into the feed at a time."""
TOKEN = "JAXGPT_MONITOR_TOKEN"
HOMES = ("127.0.0.1", "localhost", "::1")


@bounded
def monitor(
    run: Folder,
    files: Files = (),
    *,
    label: str = "",
    chart: Kind = "cusum",
    window: Size = 50,
    run_length: RunLength = 1000.0,
    odds: Odds = 2.0,
    weight: Memory = 0.2,
    usual: Annotated[float | None, Bounds(1e-4, 1 - 1e-4)] = None,
    learn: Annotated[int, Bounds(10, 10_000_000)] = 2000,
    listen: str = "",
    hook: str = "",
    every_window: Switch = False,
    field: str = "",
    checkpoint: str = "best",
    verify: Verify = True,
    batch_size: Rows = 32,
    mesh: Mesh = ONE_DEVICE,
) -> int:
    """Watch a stream of texts: alarm when a label, such as negative, becomes more frequent than usual.

    Events are JSON lines on standard output: `ready` once it is known what is usual, `alarm` with the surest
    texts of its window, `over`. The exit code is 5 where an alarm came (a service that was stopped ends with
    0).

    Args:
      run: folder of a classifier's run.
      files: as for `jaxgpt predict`, in the order of time; `-` is standard input: a text a line, or with
        --field a JSON object a line.
      label: what is counted.
      chart: `p` looks at each window alone, `ewma` at a running mean, `cusum` sums evidence.
      window: texts of a window.
      run_length: windows from one false alarm to the next, on average, while nothing changes; the limit is
        computed from it.
      odds: what `cusum` finds soonest: the label's odds times this.
      weight: of the newest window in the mean of `ewma`.
      usual: share of the label that is usual; by default it is learned.
      learn: first texts of the stream that it is learned from.
      listen: HOST:PORT of a webhook (`POST /v1/texts`), metrics (`/metrics`) and a page (`/`). Port 0 takes
        any. Beyond this machine the environment must have a token, JAXGPT_MONITOR_TOKEN.
      hook: command that is run at each alarm and end of one, with the event as JSON on its standard input.
      every_window: print every window.
      field: field or column of the text; by default `data.text` of the run.
      checkpoint: `best` on validation data, `newest`, or a step number.
      batch_size: rows per batch.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run that classifies no texts, a file that cannot be read, an address that cannot be used.
    """
    data, labels = _classifier(run)
    require(bool(label), f"no label is named; name what is counted with --label, of {', '.join(labels)}.")
    require_known(label, labels, f"--label is {label!r}")
    require(bool(files or listen), "there is nothing to watch; name files, - or --listen HOST:PORT.")
    host, port = _address(listen) if listen else ("", 0)
    how = Charting(chart=chart, window=window, run_length=run_length, odds=odds, weight=weight)
    shown = ("ready", "alarm", "over", *["window"] * every_window)
    watched = Monitor(how, usual, learn, lambda event: _tell(event | {"label": label}, shown, hook))
    from jaxgpt.sample.load import load_trained

    logging.getLogger("jaxgpt.data.packing").setLevel(logging.WARNING)  # it has a line for every batch
    trained, feed = load_trained(run, which=checkpoint, mesh=mesh, verify=verify), Feed()

    def take(texts: Sequence[str]) -> None:
        watched.add(_scored(trained, texts, label, batch_size))

    stop: list[UserError] = []
    reader = threading.Thread(target=_read, args=(feed, files, data, field, not listen, stop), daemon=True)
    reader.start()
    if listen:
        _serve(host, port, lambda: feed.drain(8 * batch_size, take), watched, feed, label)
        return 0
    feed.drain(8 * batch_size, take)
    if stop:
        raise stop[0]
    return ALARMED if watched.status().alarms else 0


def _classifier(run: str) -> tuple[Labelled, tuple[str, ...]]:
    held = load_run(run)
    if held.task is None or not isinstance(held.data, Labelled) or held.data.pair:
        raise UserError(f"{run} classifies no texts; give the run of a Classifier of single texts.")
    return held.data, held.task.labels


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    good = bool(host) and port.isdecimal() and int(port) < 2**16
    require(good, f"--listen is {listen!r}; write HOST:PORT, such as 127.0.0.1:8090.")
    require(
        host in HOMES or bool(os.environ.get(TOKEN)),
        f"--listen is {listen!r}, which others can reach, but there is no token; set {TOKEN}, or listen on "
        "127.0.0.1.",
    )
    return host, int(port)


def _scored(trained: Trained, texts: Sequence[str], label: str, batch_size: int) -> list[Scored]:
    from jaxgpt.evals.predict import classify

    found = classify(trained, texts, batch_size)
    return [Scored(t, f.label, f.label == label, f.scores[label]) for t, f in zip(texts, found, strict=True)]


def _read(
    feed: Feed, files: Sequence[str], data: Labelled, field: str, end: bool, stop: list[UserError]
) -> None:
    """Fill the feed, in a thread; a mistake ends it."""
    try:
        for name in files:
            if name == "-":
                feed.put(read_stream(sys.stdin.buffer, field))
            else:
                feed.put(read_files([name], data, field), BATCH)
    except UserError as error:
        stop.append(error)
        log.error("%s", error)
    if end:
        feed.end()


def _tell(event: dict[str, Any], shown: Sequence[str], hook: str) -> None:
    line = to_json(event)
    if event["event"] in shown:
        print(line, flush=True)
    if hook and event["event"] in ("alarm", "over"):
        run_hook(hook, line)


def _serve(host: str, port: int, drain: Callable[[], None], watched: Monitor, feed: Feed, label: str) -> None:
    """Answer requests until a signal comes; then what waits is classified."""
    try:
        import uvicorn

        from jaxgpt.serve.stream_monitor.app import monitor_app
    except ImportError:
        raise UserError(
            "--listen needs FastAPI, uvicorn and prometheus-client, which are not installed; run "
            "`pip install 'jaxgpt[serve]'`."
        ) from None
    app = monitor_app(watched, feed, label, os.environ.get(TOKEN, ""))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    failed: list[BaseException] = []

    def work() -> None:
        try:
            drain()
        except BaseException as error:
            failed.append(error)
            server.should_exit = True

    with _socket(host, port) as bound:
        place = "http://{}:{}/".format(*bound.getsockname()[:2])
        log.info("%s takes texts (POST /v1/texts) and shows them", place)
        worker = threading.Thread(target=work)
        worker.start()
        with _own_signals():
            server.run(sockets=[bound])
        feed.end()
        worker.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Uvicorn stops at these signals and then raises them again, which would end the process at once."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _socket(host: str, port: int) -> socket.socket:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # from here on nobody is refused
    except OSError as error:
        bound.close()
        raise UserError(f"{host}:{port} cannot be used ({error.strerror}); name another.") from None
    return bound
