"""`jaxgpt report RUN ...` draws the reports of runs anew; `jaxgpt watch RUN` shows one while it changes."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.config.bounds import Bounds, bounded
from jaxgpt.errors import UserError, require
from jaxgpt.report import run_report
from jaxgpt.report.run import run_page

log = logging.getLogger(__name__)

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
HOME = "127.0.0.1"
WATCHED = ("metrics.jsonl", "samples.jsonl", "eval", "config.json", "sweep.html")
"""What a new picture is drawn for."""
TRIES = 20
"""Ports that are tried from the one asked for on."""

SHELL = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
html,body,iframe{{margin:0;width:100%;height:100%;border:0;display:block}}</style></head><body>
<iframe id="page" src="/page" title="{title}"></iframe><script>
const frame = document.getElementById("page"); let seen = null;
async function look() {{
  try {{
    const now = await (await fetch("/state", {{cache: "no-store"}})).text();
    if (seen !== null && now !== seen) {{
      const at = frame.contentWindow.scrollY;
      frame.addEventListener("load", () => frame.contentWindow.scrollTo(0, at), {{once: true}});
      frame.contentWindow.location.reload();
    }}
    seen = now;
  }} catch (error) {{}}  // the server has ended: the last page stays
  setTimeout(look, 1000);
}}
look();</script></body></html>"""
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>
<body style="font:16px system-ui;margin:3em;color-scheme:light dark"><h1>{title}</h1><p>{words}</p></body>
</html>"""


def report(runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]) -> int:
    """Draw report.html of runs anew, from what is in their folders by now.

    Args:
      runs: folders of runs.
    """
    require(bool(runs), "no run is named; give the folder of at least one.")
    for run in runs:
        require(
            (Path(run) / "metrics.jsonl").is_file(),
            f"{run!r} has no metrics.jsonl, so there is nothing to draw; give the folder of a trained run.",
        )
    made = [run_report(run) for run in runs]
    for path in made:
        print(path if path else "not drawn, see above")
    return 0 if all(made) else 2


@bounded
def watch(run: Folder, *, port: Annotated[int, Bounds(0, 65535)] = 8000) -> int:
    """Serve the report of a run to a browser on this machine, drawn anew whenever the run has news.

    The run may be training, finished, or not begun yet. Over SSH, forward the port (`ssh -L
    8000:localhost:8000 HOST`). Ctrl-C ends it. Only the report is served, and to this machine alone.

    Args:
      run: folder of a run, or of a sweep.
      port: on 127.0.0.1; if it is taken, the next one that is free. 0 takes any.
    """
    with serve(Path(run), port) as server:
        print(f"http://{HOME}:{server.server_port}/ shows {run}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("", file=sys.stderr)
    return 0


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of a run's report, not yet running.

    Raises:
      UserError: no port is free.
    """
    handler, why = functools.partial(_Handler, folder), None
    for number in range(port, min(port + TRIES, 65536)):
        try:
            return ThreadingHTTPServer((HOME, number), handler)
        except OSError as error:
            why = error.strerror
    raise UserError(f"--port {port} and the {TRIES - 1} after it cannot be used ({why}); name another.")


_drawing = threading.Lock()


@functools.lru_cache(maxsize=4)
def _drawn(folder: Path, state: str) -> str:
    """The page of a state of the folder; drawn once."""
    if (folder / "sweep.html").is_file() and not (folder / "metrics.jsonl").is_file():
        return (folder / "sweep.html").read_text("utf-8")
    try:
        return run_page(folder)
    except FileNotFoundError:
        begun = (folder / "config.json").is_file()
        words = "It is compiling: there are no numbers yet." if begun else f"There is no run in {folder} yet."
    except (OSError, UserError) as error:
        words = f"It cannot be drawn: {error}"
    return WAITING.format(title=_title(folder), words=_escaped(words))


def _state(folder: Path) -> str:
    """What changes when there is something new to draw."""
    paths = [folder / name for name in WATCHED]
    paths += sorted(folder.glob("eval/*.json"))
    found = []
    for path in paths:
        try:
            held = path.stat()
            found.append(f"{path.name}:{held.st_mtime_ns}:{held.st_size}")
        except OSError:
            found.append(path.name)
    return " ".join(found)


def _title(folder: Path) -> str:
    return _escaped(f"Run {folder.resolve().name}")


def _escaped(words: str) -> str:
    from jaxgpt.report.page import escaped

    return escaped(words)


class _Handler(BaseHTTPRequestHandler):
    """Three addresses: the shell, the page in it, and the state by which the shell knows of news."""

    server_version = "jaxgpt"

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer; of other hosts' names nothing, so that no web page can read it by one of its own."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in (HOME, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        state = _state(self.folder)
        if self.path == "/":
            self._send(SHELL.format(title=_title(self.folder)), "text/html")
        elif self.path == "/page":
            with _drawing:
                self._send(_drawn(self.folder, state), "text/html")
        elif self.path == "/state":
            self._send(state, "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, words: str, kind: str) -> None:
        data = words.encode()
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing of each request."""
