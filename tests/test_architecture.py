"""What the modules of the package may know of one another, beyond the order that `lint-imports` holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import jaxgpt

ROOT = Path(jaxgpt.__file__).parent


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(source: str) -> Iterator[str]:
    """`LINE: NAME` of each private name that is imported from the package, or read from what is."""
    tree = ast.parse(source)
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "jaxgpt"):
            path = (node.module or "").split(".") if node.module else []
            for alias in node.names:
                imported.add(alias.asname or alias.name)
                if any(map(private, [*path, alias.name])):
                    yield f"{node.lineno}: {alias.name}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jaxgpt":
                    imported.add(alias.asname or "jaxgpt")
                    if any(map(private, alias.name.split("."))):
                        yield f"{node.lineno}: {alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_private_names_stay_in_their_modules() -> None:
    found = [
        f"{path.relative_to(ROOT.parent)}:{use}"
        for path in sorted(ROOT.rglob("*.py"))
        for use in private_uses(path.read_text("utf-8"))
    ]
    assert found == []


def test_every_way_to_a_private_name_is_seen() -> None:
    source = """
from jaxgpt.report.page import _a, shown as _mine
from jaxgpt import report, sweep as s
import jaxgpt.cli
import jax
def f():
    from . import _b
    report.page._c
    s._d()
    jaxgpt.cli._e
    jax._src
    self._f
    jaxgpt.__version__
"""
    uses = {use.split(": ")[1] for use in private_uses(source)}
    assert uses == {"_a", "_b", "report.page._c", "s._d", "jaxgpt.cli._e"}
