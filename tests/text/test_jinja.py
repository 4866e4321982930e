"""Hostile templates are stopped in time and memory by the process that renders them."""

# ruff: noqa: E501  (templates are easier to read unbroken)
from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time

import pytest
import tiny_hf

from jaxgpt.errors import UserError
from jaxgpt.text import jinja
from jaxgpt.text.chat import render
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.jinja import Jinja

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "cat"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}"
HOSTILE = {
    "loops": (LOOP, "took longer than 2 s"),
    "a number without end": ("{% set x = 10 ** (messages | length) %}{{ 7 ** x ** x ** x }}", "took longer|memory|Exceeds"),
    "multiplies": ("{{ messages[0].content * 10 ** 9 }}", "memory"),
    "multiplies while it is read": ("{{ 'a' * 10 ** 9 }}", "memory"),
    "multiplies lists": ("{% set x = [1] * 10 ** 9 %}", "memory"),
    "joins its own text": (DOUBLE, "memory"),
    "formats": ("{{ '%1000000000d' % 1 }}", "memory"),
    "pads": ("{{ 'a' | center(10 ** 9) }}", "memory"),
    "indents": ("{{ messages | tojson(indent=10 ** 9) }}", "memory"),
    "captures": ("{% set x %}" + "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}", "memory"),
    "writes": ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", r"wrote more than 105\d{4} bytes"),
    "writes other letters": ("{{ '\u4e00' * 360000 }}", r"wrote more than 105\d{4} bytes"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "is a block of itself": ("{% block a %}{{ self.a() }}{% endblock %}", "calls itself without end"),
    "branches": ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(40) }}", "took longer"),
    "nests": ("{{ " + "[" * 9999 + "]" * 9999 + " }}", "nested too deeply"),
    "nests loops": ("{% for a in '' %}" * 40 + "{% endfor %}" * 40, "too many statically nested"),
    "reads a file": ("{% include '/etc/passwd' %}", "refuses a dialogue"),
    "looks for objects": ("{{ raise_exception.__globals__.os.getpid() }}", "refuses a dialogue"),
    "refuses at length": ("{{ raise_exception('x' * 10 ** 6) }}", r"refuses a dialogue of user, assistant \(x{300}\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_one_sentence_and_little_time(name: str) -> None:
    source, why = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(UserError, match=why) as caught:
        render(TURNS, HFTokenizer(tiny_hf.byte_level(template=source), "a model"))
    assert time.monotonic() - start < 20  # 2 s of processor time, on a machine that others use too
    assert "chat template" in str(caught.value)
    assert "a model" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert Jinja("{{ messages[0].content }}", {}, "").render([(TURNS, False)]) == ["hello"]


def test_a_template_may_write_a_mebibyte_and_twenty_times_its_input() -> None:
    long = [{"role": "user", "content": "h" * 500_000}]
    template = Jinja(
        "{{ 'x' * 1000000 }}{% for i in range(20) %}{{ messages[0].content }}{% endfor %}", {}, "x"
    )
    (text,) = template.render([(long, False)])
    assert len(text) == 1_000_000 + 20 * 500_000
    (refused,) = Jinja("{{ messages[0].content * 24 }}", {}, "x").render([(long, False)])
    assert "wrote more than" in str(refused)


def test_a_template_that_keeps_failing_is_not_tried_for_every_dialogue() -> None:
    template = Jinja("{{ messages[0].content * 10 ** 9 }}", {}, "x")
    for _ in range(3):
        with pytest.raises(UserError, match="memory"):
            template.render([(TURNS, False)])
    start = time.monotonic()
    for _ in range(10_000):
        with pytest.raises(UserError, match="memory"):
            template.render([(TURNS, False)])
    assert time.monotonic() - start < 1


def test_one_process_serves_all_templates_and_threads_and_is_started_again() -> None:
    templates = [Jinja(f"{{{{ messages[0].content ~ '{i}' }}}}", {}, "x") for i in range(70)]
    first = jinja._worker.process.pid
    found = dict[int, list[str]]()

    def work(k: int) -> None:
        found[k] = [t.render([([{"role": "user", "content": str(k)}], False)])[0] for t in templates]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [f"{k}{i}" for i in range(70)] for k in range(4)}
    assert jinja._worker.process.pid == first
    jinja._worker.process.kill()
    jinja._worker.process.wait()
    assert templates[3].render([(TURNS, False)]) == ["hello3"]
    assert pickle.loads(pickle.dumps(templates[5])).render([(TURNS, False)]) == ["hello5"]


FEW_FILES = """
import resource
from jaxgpt.errors import UserError
from jaxgpt.text.jinja import Jinja
held = [open("/dev/null") for _ in range(50)]
resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1].fileno() + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    Jinja("", {}, "x")
except UserError as error:
    print(error)
"""


def test_a_process_that_cannot_be_started_is_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", FEW_FILES], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "the process that renders chat templates cannot be started (Too many open files"
    )
    assert done.stderr == ""


def test_a_tokenizer_with_its_template_travels_to_other_processes() -> None:
    tokenizer = HFTokenizer(tiny_hf.TOKENIZERS["chatml"])
    expected = render(TURNS, tokenizer)
    assert render(TURNS, pickle.loads(pickle.dumps(tokenizer))) == expected
    assert pickle.loads(pickle.dumps(tokenizer.template)).example(TURNS) == (
        expected.tokens,
        expected.weights,
    )


FORKS = """
import os, sys
from jaxgpt.text.jinja import Jinja
import jaxgpt.text.jinja as jinja
template = Jinja("{{ messages[0].content }}", {}, "x")
ask = lambda text: template.render([([{"role": "user", "content": text}], False)])[0]
assert ask("a") == "a"
child = os.fork()
for i in range(200):
    assert ask(f"{child > 0}{i}") == f"{child > 0}{i}"
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert "jinja2" not in sys.modules and "jax" not in sys.modules
    print(jinja._worker.process.pid)
"""


def test_a_forked_child_has_a_process_of_its_own_and_none_outlives_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
