"""Renders chat templates in a process of its own, within bounds: a script that jinja.py starts.

A template is a program that came with a model. Jinja's sandbox keeps it from Python's objects, not from
looping, multiplying or calling itself without end, be it while Jinja compiles it (constants are folded
then). So this process bounds itself: the kernel ends it after `SECONDS` of processor time per rendering
(a busy machine does not count, and no C code can put it off), its memory is limited, and its output is
counted while it is written. It imports nothing but Jinja and the standard library.

Requests and replies are lines of JSON. A request names a template (with its source, the first time) and
lists turns, and renderings as numbers of turns with `add_generation_prompt`; the reply has one
`[kind, text]` per rendering, kind being "text", "error" (the template's own) or "limit", or one such pair
alone where the template does not compile.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # jinja.py takes the numbers of this file, and needs no Jinja
    import jinja2
    from jinja2.parser import Parser

SECONDS = 2.0
"""Of processor time, per rendering."""
OUTPUT, TIMES = 2**20, 20
"""A rendering has at most `OUTPUT` bytes and `TIMES` those of its dialogue as JSON."""
MEMORY = 2**28
"""Bytes of address space beyond those at the start, and `TIMES` those of a request."""
OUT_OF_MEMORY = 77
"""The exit code that says so."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Stand around what `{% generation %}` marks."""
_TEMPLATES = 64  # compiled ones that are kept


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _compiled(source: str, names: dict[str, str], now: float) -> jinja2.Template:
    """The template as transformers compiles it; `names` are the special tokens that it may name."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`: the text between, put between two marks."""

        tags = {"generation"}  # noqa: RUF012  (jinja's own attribute)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # jinja's own escapes HTML
    moment = datetime.datetime.fromtimestamp(now)
    given = {"raise_exception": refuse, "strftime_now": moment.strftime, **names}
    return environment.from_string(source, globals=given)


def _size(turn: dict[str, Any]) -> int:
    return len(json.dumps(turn, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _rendered(
    template: jinja2.Template,
    tools: list[dict[str, Any]],
    turns: list[tuple[dict[str, Any], int]],
    prompt: bool,
) -> list[str]:
    given = sum(size for _, size in turns) + sum(map(_size, tools))
    messages, most = [dict(turn) for turn, _ in turns], OUTPUT + TIMES * given
    parts, size = [], 0
    for part in template.generate(
        messages=messages, add_generation_prompt=prompt, tools=tools or None, documents=None
    ):
        parts.append(part)
        size += len(part)  # of characters, each a byte at least
        if size > most:
            break
    text = "".join(parts)
    if size > most or len(text.encode("utf-8", "surrogatepass")) > most:
        return ["limit", f"wrote more than {most} bytes"]
    return ["text", text]


def _bounded(work: Any, *args: Any) -> Any:
    """What `work` returns, or the error it raises, as a pair; the process ends where it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return work(*args)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except RecursionError:
        return ["limit", "is nested too deeply or calls itself without end"]
    except Exception as error:  # whatever its expressions raise
        return ["error", f"{error}"[:300] or type(error).__name__]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _address_space() -> int | None:
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux, where no such limit holds either
        return None


def _limit(size: int | None) -> None:
    if size is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def main() -> None:
    """Answer requests until standard input ends."""
    import jinja2.sandbox  # before the limits, which are on top of it

    assert jinja2
    templates: dict[str, Any] = {}
    base = _address_space()
    for line in sys.stdin.buffer:
        _limit(None if base is None else base + MEMORY + TIMES * len(line))
        try:
            request = json.loads(line)
            key = request["template"]
            if "source" in request:
                if len(templates) >= _TEMPLATES:
                    templates.clear()
                templates[key] = _bounded(_compiled, request["source"], request["names"], request["now"])
            template = templates.get(key)
            if template is None:
                reply = ["unknown", ""]
            elif isinstance(template, list):
                reply = template
            else:
                turns = [(turn, _size(turn)) for turn in request["turns"]]
                calls = [([turns[i] for i in places], prompt) for places, prompt in request["renderings"]]
                tools = request.get("tools", [])
                reply = [_bounded(_rendered, template, tools, *call) for call in calls]
            sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
            sys.stdout.buffer.flush()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
