"""The inputs of odd_inputs.py: a small folder, what is done to it, and what a command must answer."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def nothing(folder: Path) -> None:
    """Prepare: leave the folder as it is."""


@dataclass(frozen=True)
class Seen:
    """What a command did."""

    code: int | None
    """None where it was killed at the limit."""
    out: str
    err: str
    seconds: float
    folder: Path


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
      kind: for the table.
      name: what is odd about it.
      argv: the command.
      prepare: changes the copy of the base folder first.
      refuse: words that the sentence of a refusal must hold; None where a refusal is wrong.
      right: whether what was accepted was read right; None where accepting is wrong.
      warn: words that must be on standard error when it was accepted.
    """

    kind: str
    name: str
    argv: tuple[str, ...]
    prepare: Callable[[Path], Any] = nothing
    refuse: tuple[str, ...] | None = None
    right: Callable[[Seen], bool] | None = None
    warn: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "dogs",
    "ran",
    "over",
    "green",
    "hills",
    "and",
    "far",
    "away",
]


def lines(records: list[Any]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def files() -> dict[str, bytes]:
    """Files of the base folder."""
    pick = random.Random(0)
    stories = [{"text": " ".join(pick.choices(WORDS, k=20)) + f" {i}."} for i in range(200)]
    talk = [turns(f"question {i}", f"reply {i}") for i in range(12)]
    tags = "".join(f"Ann B-PER\nsaw O\nRome B-LOC\n{w} O\n\n" for w in WORDS)
    table = "text\tlabel\n" + "".join(f"{w} is good\tyes\n{w} is bad\tno\n" for w in WORDS)
    head = (
        "from jaxgpt.config import *\n"
        "def config():\n"
        "    small = GPT(vocab_size=272, context=64, layers=1, width=16, heads=2)\n"
        "    train = Train(steps=6, batch_size=4, eval_every=2, save_every=2, log_every=1, keep=9)\n"
        "    rest = dict(optim=Optim(warmup_steps=1), train=train, compute=Compute(dtype='float32'))\n"
    )
    tagger = "model=Classifier(backbone=small, labels={labels}, pool='{pool}'), objective=Classification()"
    people = tagger.format(labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), pool="token")
    mood = tagger.format(labels=("no", "yes"), pool="last")
    named = "train=('{0}',), validation=('{0}',), test=('{0}',), tokenizer='byte'"
    return {
        "corpus.jsonl": lines(stories),
        "talk.jsonl": lines([{"messages": t} for t in talk]),
        "tags.conll": tags.encode(),
        "labels.tsv": table.encode(),
        "text.py": (
            head + "    return Run(name='text', model=small, data=Text(path='data'), **rest)\n"
        ).encode(),
        "chat.py": (
            head + "    return Run(name='chat', init_from='runs/text', model=small, "
            "data=Chat(train=('talk.jsonl',), validation=('talk.jsonl',)), **rest)\n"
        ).encode(),
        "tags.py": (
            head
            + f"    return Run(name='tags', {people}, data=Tagged({named.format('tags.conll')}), **rest)\n"
        ).encode(),
        "labels.py": (
            head
            + f"    return Run(name='labels', {mood}, data=Labelled({named.format('labels.tsv')}), **rest)\n"
        ).encode(),
    }


def turns(*texts: str) -> list[dict[str, str]]:
    """A user and an assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def llama_tensors(vocab: int) -> dict[str, Any]:
    """The tensors of a tiny Llama."""
    import numpy as np

    random_, D, F, K = np.random.default_rng(0), 16, 32, 8
    shapes = {
        "model.embed_tokens.weight": (vocab, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (vocab, D),
    }
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        shapes |= {at + f"self_attn.{n}_proj.weight": s for n, s in (
            ("q", (D, D)), ("k", (K, D)), ("v", (K, D)), ("o", (D, D)))}  # fmt: skip
        shapes |= {at + f"mlp.{n}_proj.weight": s for n, s in (
            ("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))}  # fmt: skip
    return {n: (random_.standard_normal(s) * 0.1).astype("float32") for n, s in shapes.items()}


def write_llama(folder: Path) -> None:
    """A tiny Llama as Hugging Face has it, with a tokenizer and a template."""
    from safetensors.numpy import save_file

    from tests.tiny_hf import LLAMA3, metaspace

    folder.mkdir()
    tokenizer = metaspace()
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    vocab = len(json.loads(tokenizer["tokenizer.json"])["model"]["vocab"])
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab}))
    save_file(llama_tensors(vocab), folder / "model.safetensors", metadata={"format": "pt"})
    assert LLAMA3


def wrote(name: str, content: bytes | str) -> Callable[[Path], Any]:
    """Prepare: write a file."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """Prepare: change a JSON file."""

    def prepare(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        value = change(value) or value
        (folder / name).write_text(json.dumps(value))

    return prepare


def shown(seen: Seen) -> list[dict[str, Any]]:
    """The rows of one epoch that `data show --json` printed."""
    rows = [json.loads(line) for line in seen.out.splitlines() if line.startswith("{")]
    packed = re.search(r"examples into (\d+) rows", " ".join(seen.err.split()))
    return rows[: int(packed[1])] if packed else rows


def maker(kind: str, argv: tuple[str, ...], right: Callable[[Seen], bool]) -> Callable[..., Case]:
    """Makes cases of one command: refused with these words, or without words, read right."""

    def case(
        name: str, prepare: Callable[[Path], Any], *refuse: str, right: Any = None, warn: tuple[str, ...] = ()
    ) -> Case:
        given = tuple(filter(None, refuse)) if refuse else None
        return Case(kind, name, argv, prepare, given, right if refuse else right or whole, warn)

    whole = right
    return case


def trained(seen: Seen) -> list[str]:
    """The trained texts, a row each."""
    return [
        bytes(t for t, w in zip(r["tokens"], r["weights"], strict=False) if w and t < 256).decode()
        for r in shown(seen)
    ]


def learns(*answers: str) -> Callable[[Seen], bool]:
    """Whether exactly these answers are trained."""
    return lambda seen: (
        sorted("".join(trained(seen))) == sorted("".join(answers))
        and all(a in "\n".join(trained(seen)) for a in answers)
    )


def numbers(kind: str, argv: tuple[str, ...], flags: dict[str, tuple[str, ...]]) -> Iterator[Case]:
    """Numbers out of bounds for flags."""
    for flag, values in flags.items():
        for value in values:
            field = flag.removeprefix("--")
            word = field.split(".")[-1].split("-")[0]
            yield Case(kind, f"{flag} {value}", (*argv, flag, value), refuse=(word,))


BIG, NEAR = "9" * 30, str(2**31)


def config_cases() -> Iterator[Case]:
    """Numbers and names in configs."""
    yield from numbers("numbers", ("info", "text.py"), {
        "--model.layers": ("-1", "0", "100000000", BIG),
        "--model.width": ("0", BIG),
        "--model.heads": ("0", "3", BIG),
        "--model.context": ("1", BIG),
        "--model.vocab-size": ("0", BIG),
        "--model.mlp-width": ("0", BIG),
        "--model.norm-eps": ("0", "-1", "nan", "inf", "1e300"),
        "--model.rope-theta": ("0", "nan", "1e300"),
        "--model.dropout": ("1", "-0.1", "nan"),
        "--model.logit-softcap": ("0", "1e300"),
        "--train.steps": ("0", "-5", NEAR, BIG),
        "--train.batch-size": ("0", BIG),
        "--train.seed": ("-1", str(2**32), BIG),
        "--train.log-every": ("0",),
        "--train.keep": ("0", BIG),
        "--train.patience": ("-1", BIG),
        "--optim.peak-lr": ("0", "-1", "nan", "1e300"),
        "--optim.b1": ("1", "-0.1"),
        "--optim.eps": ("0", "1e300"),
        "--optim.clip-norm": ("-1", "1e300"),
        "--optim.weight-decay": ("-1", "1e300"),
        "--optim.warmup-steps": ("-1", "7"),
        "--optim.decay-fraction": ("0", "1.5"),
        "--compute.loss-chunk": ("0", BIG),
        "--data.workers": ("-1", "100000"),
        "--mesh.data": ("0", "7", BIG),
    })  # fmt: skip
    for value in (".", "..", "a/b", "a b", "", "a\x00b", "a\nb", "\udc80", "x" * 300, "-x"):
        yield Case("names", f"--name {value[:8]!r}", ("info", "text.py", f"--name={value}"), refuse=("name",))
    yield from numbers("numbers", ("sample", "runs/text", "--prompt", "the"), {
        "--n": ("0", BIG), "--max-new-tokens": ("0", BIG), "--seed": ("-1", BIG), "--batch-size": ("0", BIG),
        "--temperature": ("-1", "nan", "inf"), "--top-k": ("-1", BIG), "--top-p": ("0", "2", "nan"),
        "--min-p": ("-1", "2"), "--repetition-penalty": ("0", "nan"),
    })  # fmt: skip
    yield from numbers("numbers", ("eval", "runs/text"), {
        "--limit": ("-1", BIG), "--batch-size": ("-1", BIG), "--stride": ("0", BIG)})  # fmt: skip
    prepare = ("data", "prepare", "corpus.jsonl", "--out", "d2")
    yield from numbers("numbers", prepare, {
        "--validation": ("-1", "2", "nan"), "--max-bad": ("-1", "2", "nan"), "--workers": ("-1", "1000000"),
    })  # fmt: skip
    yield from numbers("numbers", ("tokenizer", "train", "corpus.jsonl", "--out", "t2"), {
        "--vocab-size": ("0", "10", BIG), "--sample-mb": ("0", BIG), "--max-bad": ("2",)})  # fmt: skip
    for name, body in {
        "exits": "import sys; sys.exit(0)",
        "exits with 3": "raise SystemExit(3)",
        "recurses": "def f(): return f()\nf()",
        "divides by 0": "1 / 0",
        "is not Python": "def (",
        "has no config": "x = 1",
        "returns None": "def config(): return None",
        "exits in config()": "def config(): raise SystemExit(0)",
        "raises BaseException": "raise BaseException('x')",
        "holds a NUL": "x = 1\x00",
        "is Latin-1": b"# caf\xe9\n",
    }.items():
        yield Case("configs", f"a config that {name}", ("info", "odd.py"), wrote("odd.py", body), ("odd.py",))
    for name, body in {
        "empty": "",
        "a list": "[]",
        "deep": "[" * 100_000,
        "cut": '{"name": "x"',
        "latin": b'{"name": "\xe9"}',
        "of 5000 digits": '{"name": ' + "9" * 5000 + "}",
        "null": "null",
        "unknown key": '{"nam": "x"}',
    }.items():
        yield Case(
            "configs", f"config.json {name}", ("info", "odd.json"), wrote("odd.json", body), ("odd.json",)
        )
    for path in ("none.py", "text.txt", "runs", "/dev/null", ""):
        yield Case("configs", f"config {path!r}", ("info", path), refuse=())
    link = lambda folder: (folder / "loop.py").symlink_to("loop.py")
    yield Case("configs", "a link loop", ("info", "loop.py"), link, ("loop.py",))


def chat_file(name: str, content: bytes, *answers: str, refuse: tuple[str, ...] | None = None,
              warn: tuple[str, ...] = (), kind: str = "dialogues", extra: str = "") -> Case:  # fmt: skip
    """A file of dialogues and what must be trained of it."""

    def prepare(folder: Path) -> None:
        wrote(name, content)(folder)
        text = (folder / "chat.py").read_text().replace("train=('talk.jsonl',)", f"train=('{name}',){extra}")
        (folder / "chat.py").write_text(text)

    right = learns(*answers) if answers else None
    return Case(kind, name, ("data", "show", "chat.py", "--n", "50", "--json"), prepare, refuse, right, warn)


def chat_cases() -> Iterator[Case]:
    """Files of dialogues."""
    two = turns("Q?", "yes1")
    odd = Path(__file__).resolve().parents[1] / "tests" / "odd"
    for name, said in json.loads((odd / "expected.json").read_text("utf-8"))["dialogues"].items():
        extra = f", template={said['template']!r}" if "template" in said else ""
        refuse, warn = ((said[key],) if key in said else () for key in ("refused", "says"))
        content = (odd / "dialogues" / name).read_bytes()
        yield chat_file(name, content, *said.get("learns", ()), refuse=refuse or None, warn=warn, extra=extra)
    yield chat_file("deep.jsonl", b"[" * 100_000 + b"\n", refuse=("deep.jsonl",))
    yield chat_file("deep.json", b'{"a":' * 100_000, refuse=("deep.json",))

    def folder_of(extra: dict[str, bytes]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            for name, content in ({"in/a.jsonl": lines([{"messages": two}])} | extra).items():
                wrote(name, content)(folder)
            text = (folder / "chat.py").read_text().replace("train=('talk.jsonl',)", "train=('in',)")
            (folder / "chat.py").write_text(text)

        return prepare

    show = ("data", "show", "chat.py", "--n", "50", "--json")
    others = folder_of({"in/b.docx": b"x", "in/c.pdf": b"y"})
    name = "a folder with other endings"
    yield Case("dialogues", name, show, others, right=learns("yes1"), warn=(".docx",))
    twice = lambda f: (f / "chat.py").write_text((f / "chat.py").read_text().replace(
        "train=('talk.jsonl',)", "train=('talk.jsonl', './talk.jsonl')"))  # fmt: skip
    yield Case("dialogues", "one file twice", show, twice, refuse=("talk.jsonl",),
               right=lambda s: len("".join(trained(s))) == sum(len(f"reply {i}") for i in range(12)),
               warn=("talk.jsonl",))  # fmt: skip
    fifo = lambda f: (os.mkfifo(f / "pipe.jsonl"), (f / "chat.py").write_text(
        (f / "chat.py").read_text().replace("train=('talk.jsonl',)", "train=('pipe.jsonl',)")))  # fmt: skip
    yield Case("dialogues", "a FIFO", show, fifo, refuse=("pipe.jsonl",))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template_cases() -> Iterator[Case]:
    """Templates of a tokenizer: what they do, or what they do to the machine."""

    def with_template(source: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            from tests.tiny_hf import byte_level

            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            for name, content in byte_level(special, source).items():
                wrote(f"hf/{name}", content)(folder)
            text = (folder / "chat.py").read_text().replace("init_from='runs/text', ", "")
            text = text.replace("vocab_size=272", "vocab_size=512").replace("Chat(", "Chat(tokenizer='hf', ")
            (folder / "chat.py").write_text(text)

        return prepare

    show = ("data", "show", "chat.py", "--n", "50", "--json")

    def weight_sum(each: int) -> Callable[[Seen], bool]:
        def right(seen: Seen) -> bool:
            return sum(sum(r["weights"]) for r in shown(seen)) == each

        return right

    # 12 dialogues, "reply N": r,e,p,l,y,space,digits and the end: 12 * (6 + 1) + 14 digits.
    good = weight_sum(12 * 7 + 14)
    yield Case("templates", "ChatML", show, with_template(CHATML), right=good)
    always = CHATML.replace("{% if add_generation_prompt %}", "").replace(
        "assistant\n{% endif %}", "assistant{{ '\n' }}"
    )
    yield Case("templates", "always writes the header", show, with_template(always), ("template",), good)
    never = CHATML.split("{% if add")[0]
    yield Case("templates", "never writes the header", show, with_template(never), ("template",), good)
    no_end = CHATML.replace("<|im_end|>", "")
    yield Case("templates", "no end of turn", show, with_template(no_end), ("template",),
               weight_sum(12 * 6 + 14), ())  # fmt: skip
    for name, source in {
        "loops without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "multiplies a text": "{{ 'a' * 5000000000 }}",
        "doubles": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s*2 %}{% endfor %}",
        "pads": "{{ 'a' | center(5000000000) }}",
        "formats": "{{ '%5000000000d' % 1 }}",
        "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "powers": "{{ 9 ** 9 ** 9 }}",
        "writes 100 MB": "{% for i in range(10000) %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}",
        "reads attributes": "{{ ''.__class__.__mro__ }}",
        "divides by 0": "{{ 1 / 0 }}",
        "is not valid": "{% for %}",
        "includes a file": "{% include '/etc/passwd' %}",
        "raises": "{{ raise_exception('no') }}",
        "is empty": "",
        "writes nothing of it": "hello",
    }.items():
        yield Case("templates", name, show, with_template(source), refuse=("template",))


def flip(path: str, seed: int) -> Callable[[Path], None]:
    """Prepare: flip one bit of a file among those that match."""

    def prepare(folder: Path) -> None:
        found = sorted(p for p in folder.glob(path) if p.is_file() and p.stat().st_size)
        pick = random.Random(seed)
        file = pick.choice(found)
        data = bytearray(file.read_bytes())
        data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        file.write_bytes(data)

    return prepare


SAMPLE = (
    "sample",
    "runs/text",
    "--prompt",
    "the cat",
    "--max-new-tokens",
    "16",
    "--temperature",
    "0",
    "--json",
)
RESUME = ("train", "text.py")
"""Goes on from step 4 to step 6: the base folder lost the checkpoint of its end."""
NEW = ("train", "text.py", "--name", "new")
JUNK = {
    "empty": "", "a list": "[]", "deep": "[" * 99_999, "of 5,000 digits": "9" * 5000, "wrong": '{"loop": 3}',
}  # fmt: skip


def finished(seen: Seen) -> bool:
    """Whether training went to its end."""
    return "finished" in seen.out


def every(pattern: str, act: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Prepare: do something to each file that matches."""

    def prepare(folder: Path) -> None:
        for path in [p for p in sorted(folder.glob(pattern)) if p.is_file()]:
            act(path)

    return prepare


def same_weights(seen: Seen) -> bool:
    """Whether the export has the weights of the undamaged run, or was made of a checkpoint that is said."""
    made, whole = (seen.folder / name / "model.safetensors" for name in ("again", "exported"))
    return made.read_bytes() == whole.read_bytes() or "damaged" in seen.err


def run_cases() -> Iterator[Case]:
    """Damaged runs and checkpoints."""
    at, same = "runs/text/checkpoints/4/", same_weights
    arrays = maker("checkpoints", ("export", "runs/text", "again", "--checkpoint", "4"), same)
    for seed in range(40):
        yield arrays(f"bit {seed} of the arrays", flip(at + "params/**/d/*", seed), "", right=same)
    ended = lambda s: "step 6" in s.out and finished(s)
    resumed = maker("checkpoints", RESUME, ended)
    said = lambda s: ended(s) and ("damaged" in s.err or "resuming" in s.err)
    for seed in range(20):
        yield resumed(f"bit {seed} of the rest", flip(at + "rest/**/*", seed), "", right=said)
    for part in ("params", "rest", "host"):
        gone = every(at + part + "/**/*", Path.unlink)
        yield resumed(f"no files of {part}", gone, "4", right=ended, warn=("damaged",))
    for name, flag, value, word in (
        ("optimizer", "--optim.name", "muon", "optim"),
        ("width", "--model.width", "32", "model.width"),
        ("vocabulary", "--model.vocab-size", "288", "vocab_size"),
    ):
        yield Case("checkpoints", f"another {name}", (*RESUME, flag, value), refuse=(word,))
    sample, train = maker("runs", SAMPLE, finished), maker("runs", NEW, finished)
    for name, body in JUNK.items():
        write = lambda p, b=body: p.write_text(b)
        append = lambda p, b=body: p.write_text(p.read_text() + b + "\n")
        host = every(at + "host/*", write)
        yield resumed(f"host state {name}", host, "", right=ended, warn=("damaged",))
        yield sample(f"config.json {name}", wrote("runs/text/config.json", body), "config.json")
        yield sample(
            f"tokenizer {name}", wrote("runs/text/tokenizer/tokenizer_config.json", body), "tokenizer"
        )
        yield train(f"manifest {name}", wrote("data/manifest.json", body), "manifest.json")
        record = every("runs/text/metrics.jsonl", append)
        yield Case("runs", f"metrics.jsonl {name}", RESUME, record, ("metrics",), ended)
    for which in ("7", "last", "-1", "", "../4"):
        yield Case(
            "runs", f"--checkpoint {which!r}", (*SAMPLE, "--checkpoint", which), refuse=("checkpoint",)
        )
    for path in ("none", "runs", "data", "corpus.jsonl", "/dev/null", ""):
        yield Case("runs", f"RUN {path!r}", ("sample", path), refuse=())
    wild = ("--optim.peak-lr", "1e6", "--optim.schedule", "constant", "--optim.clip-norm", "0")
    argv = ("train", "text.py", "--name", "nan", "--train.steps", "12", *wild)
    yield Case("runs", "a rate that makes NaN", argv, refuse=("finite",), right=lambda s: "nan" not in s.out)


def data_cases() -> Iterator[Case]:
    """Files for `data prepare`, and shards for training."""
    prepare = ("data", "prepare", "in.jsonl", "--out", "d2", "--workers", "1")
    good = lines([{"text": f"a story {i}"} for i in range(200)])
    made = lambda seen: (seen.folder / "d2" / "manifest.json").is_file()
    for name, content, refuse, warn in (
        ("empty", b"", ("in.jsonl",), ()),
        ("no field", lines([{"body": "x"}]), ("text",), ()),
        ("latin", b'{"text": "caf\xe9"}\n', ("in.jsonl",), ()),
        ("deep line", b"[" * 99_999 + b"\n", ("in.jsonl",), ()),
        ("a deep line among good ones", good + b"[" * 99_999 + b"\n", None, ("in.jsonl",)),
        ("digits among good ones", good + b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", None, ()),
        ("a surrogate among good ones", good + b'{"text": "\\ud800"}\n', None, ("in.jsonl",)),
        ("a NUL", good + b'{"text": "a\\u0000b"}\n', None, ()),
        ("binary", bytes(range(256)) * 40, ("in.jsonl",), ()),
        ("null text", good + b'{"text": null}\n', None, ()),
        ("a number", lines([{"text": 3}]), ("in.jsonl",), ()),
        ("an array file", json.dumps([{"text": "x"}]).encode(), ("in.jsonl",), ()),
    ):
        yield Case("data", name, prepare, wrote("in.jsonl", content), refuse, None if refuse else made, warn)
    nested = wrote("in.jsonl", lines([{"a": {"text": f"story {i}"}} for i in range(50)]))
    yield Case("data", "a nested field", (*prepare, "--field", "a.text"), nested, right=made)
    acts = {
        "loop.jsonl": lambda f: (f / "loop.jsonl").symlink_to("loop.jsonl"),
        "pipe.jsonl": lambda f: os.mkfifo(f / "pipe.jsonl"),
    }
    for path in ("none.jsonl", "none/*", "runs/text/config.json", "loop.jsonl", "pipe.jsonl", ""):
        argv = ("data", "prepare", path, "--out", "d2")
        yield Case("data", f"source {path!r}", argv, acts.get(path, nothing), (path[:4],) if path else ())
    argv = ("data", "prepare", "corpus.jsonl", "./corpus.jsonl", "--out", "d2", "--workers", "1")

    def once(seen: Seen) -> bool:
        splits = json.loads((seen.folder / "d2" / "manifest.json").read_text())["splits"]
        return sum(split["documents"] for split in splits.values()) == 200

    yield Case("data", "one file twice", argv, right=once)
    for out in ("/proc/x", "corpus.jsonl", "data"):
        argv = ("data", "prepare", "corpus.jsonl", "--out", out, "--split", "tail")
        yield Case("data", f"--out {out}", argv, refuse=(out.strip("/"),))
    train = maker("data", NEW, finished)
    for seed in range(8):
        yield train(f"bit {seed} of a shard", flip("data/*/*.*", seed), "data", right=finished)
    for name, act in {
        "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "emptied": lambda p: p.write_bytes(b""),
        "removed": Path.unlink,
        "made folders": lambda p: (p.unlink(), p.mkdir()),
    }.items():
        for pattern in ("data/*/*.npy", "data/*/*.arrayrecord"):
            yield train(f"{pattern} {name}", every(pattern, act), "data")
    for key in ("version", "tokenizer", "dtype", "record_tokens", "splits"):
        for value in ("x", -1, None, [[]], 10**400):
            change = edited("data/manifest.json", lambda m, k=key, v=value: m.__setitem__(k, v))
            yield train(f"manifest {key}={str(value)[:6]}", change, "manifest.json")


def hf_cases() -> Iterator[Case]:
    """Hugging Face folders."""
    made = lambda seen: (seen.folder / "runs/new/config.json").is_file()
    case = maker("hf", ("import", "llama", "runs/new"), made)
    set_to = lambda key, value: edited("llama/config.json", lambda c: c.__setitem__(key, value))
    for key, values in {
        "hidden_size": (0, -1, "16", 10**12, 10**400, 17, None, 1.5, []),
        "num_hidden_layers": (0, 1, 3, 10**9, "2", None),
        "vocab_size": (10**12, "x"),
        "num_attention_heads": (0, 3, 10**6),
        "num_key_value_heads": (0, 2, "1"),
        "intermediate_size": (31, 10**15),
        "rms_norm_eps": ("a", -1, 0, [1]),
        "rope_theta": ("x", -1, 0),
        "rope_scaling": ("x", [], {"type": "none-such", "factor": 2}, {"type": "linear", "factor": "x"}),
        "hidden_act": ("none-such", 3),
        "model_type": ("none-such", 3, None),
        "max_position_embeddings": (0, "x", 10**30),
        "eos_token_id": ("x", -5, {"a": 1}),
    }.items():
        for value in values:
            yield case(f"{key}={str(value)[:12]}", set_to(key, value), "")
    for value in ([2, 3], 2, None):
        yield case(f"eos_token_id={value}", set_to("eos_token_id", value))
    junk = {
        "empty": b"",
        "deep": b"[" * 99_999,
        "a list": b"[]",
        "binary": bytes(range(256)),
        "null": b"null",
    }
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        for what, content in junk.items():
            yield case(f"{name} {what}", wrote(f"llama/{name}", content), name.split(".")[0])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        yield case(f"no {name}", lambda f, n=name: (f / "llama" / n).unlink(), "")
    for name in ("config.json", "model.safetensors"):
        replace = lambda f, n=name: ((f / "llama" / n).unlink(), (f / "llama" / n).mkdir())
        yield case(f"{name} is a folder", replace, "")
    cut = lambda f: os.truncate(f / "llama/model.safetensors", 5000)
    yield case("half the weights", cut, "model.safetensors")
    head, norm = "lm_head.weight", "model.norm.weight"
    yield case("a NaN", tensors(lambda t: t[norm].__setitem__(3, math.nan)), norm)
    yield case("an infinity", tensors(lambda t: t[head].__setitem__((0, 0), math.inf)), head)
    yield case("a missing tensor", tensors(lambda t: t.pop(norm) is None or None), "norm")
    yield case("an unknown tensor", tensors(lambda t: t.__setitem__("model.extra", t[norm])), "model.extra")
    yield case("no model. prefix", tensors(lambda t: {k.removeprefix("model."): v for k, v in t.items()}))
    yield case("_orig_mod.", tensors(lambda t: {"_orig_mod." + k: v for k, v in t.items()}))
    yield case("a wrong shape", tensors(lambda t: t.__setitem__(norm, t[head])), "norm")
    copied = tensors(lambda t: t.__setitem__(head, t["model.embed_tokens.weight"].copy()))
    tied = lambda f: (set_to("tie_word_embeddings", True)(f), copied(f))
    yield case("a head that is a copy", tied)
    yield case("shards", sharded(lambda p, w: None))
    out = sharded(lambda p, w: w.__setitem__(head, "../x.safetensors"))
    yield case("an index out of its folder", out, "..")
    yield case("an absolute path", sharded(lambda p, w: w.__setitem__(head, "/etc/passwd")), "/etc/passwd")
    yield case("a missing shard", sharded(lambda p, w: (p / SHARDS[1]).unlink()), SHARDS[1])
    yield case("an index of other tensors", sharded(lambda p, w: w.pop(head) and None), "lm_head")
    yield case("an index that is a list", sharded(lambda p, w: [1]), "index")
    yield case("a map of numbers", sharded(lambda p, w: {"weight_map": {head: 3}}), "index")
    extra = sharded(lambda p, w: shutil.copy(p / SHARDS[0], p / "extra.safetensors") and None)
    yield case("a file that no index names", extra)
    stale = json.dumps({"weight_map": {head: "gone.safetensors"}})
    beside = wrote("llama/model.safetensors.index.json", stale)
    yield case("a stale index", beside, "index", right=made, warn=("index",))
    for target in ("runs/text", "corpus.jsonl", "/proc/x", "a/../runs/chat"):
        yield Case("hf", f"into {target}", ("import", "llama", target), refuse=())
        yield Case("hf", f"export into {target}", ("export", "runs/llama", target), refuse=())
    for value in (
        {"temperature": "x"},
        {"top_k": -4},
        {"eos_token_id": "a"},
        [],
        {"eos_token_id": [2, 10**9]},
    ):
        prepare, name = wrote("llama/generation_config.json", json.dumps(value)), "generation_config"
        yield case(f"{name} {value}"[:40], prepare, name, right=made, warn=(name,))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Prepare: change the weights; what `change` returns takes their place."""

    def prepare(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        path = folder / "llama/model.safetensors"
        found = load_file(path)
        save_file(change(found) or found, path, metadata={"format": "pt"})

    return prepare


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Prepare: two files and an index; what `change` returns takes the index's place."""

    def prepare(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = load_file(folder / "llama/model.safetensors")
        (folder / "llama/model.safetensors").unlink()
        where = {name: SHARDS[i >= 8] for i, name in enumerate(sorted(found))}
        for file in SHARDS:
            held = {name: found[name] for name, at in where.items() if at == file}
            save_file(held, folder / "llama" / file, metadata={"format": "pt"})
        index = change(folder / "llama", where)
        index = {"metadata": {}, "weight_map": where} if index is None else index
        wrote("llama/model.safetensors.index.json", json.dumps(index))(folder)

    return prepare


def label_cases() -> Iterator[Case]:
    """Taggers and classifiers."""
    tags = maker("labels", ("train", "tags.py", "--name", "new"), finished)
    texts = maker("labels", ("train", "labels.py", "--name", "new"), finished)
    for name, content, refuse in (
        ("BILOU", b"Ann U-PER\nsaw O\nNew B-LOC\nold I-LOC\nYork L-LOC\n\n", ()),
        ("one column", b"Ann\nsaw\n\n", ("tags.conll",)),
        ("an unknown tag", b"Ann B-XYZ\n\n", ("XYZ",)),
        ("an empty table", b"", ("tags.conll",)),
        ("Latin 1", b"caf\xe9 O\n\n", ("tags.conll",)),
        ("a lone I", b"Ann I-PER\nsaw O\n\n", ()),
        ("three columns", b"Ann NNP B-PER\nsaw VB O\n\n", ()),
        ("ragged columns", b"Ann NNP B-PER\nsaw O\n\n", ("tags.conll",)),
        ("a start of documents", b"-DOCSTART- O\n\nAnn B-PER\nsaw O\n\n", ()),
        ("a number for a tag", b"Ann 3\n\n", ("3",)),
    ):
        yield tags(name, wrote("tags.conll", content if refuse else content * 60), *refuse)

    def test(folder: Path) -> None:
        wrote("test.conll", "Ann B-XYZ\nsaw O\n\n")(folder)
        source = (folder / "tags.py").read_text().replace("test=('tags.conll'", "test=('test.conll'")
        wrote("tags.py", source)(folder)

    yield tags("a label of the test file alone", test, "XYZ", right=finished, warn=("XYZ",))
    for name, content, word in (
        ("one row", b"hello\tyes\n", ""),
        ("an unknown label", b"text\tlabel\nhello\tmaybe\n", "maybe"),
        ("a short row", b"text\tlabel\nhello\n", "labels.tsv"),
        ("no rows", b"", "labels.tsv"),
        ("Latin 1 in a table", b"text\tlabel\ncaf\xe9\tyes\n", "labels.tsv"),
        ("an empty label", b"text\tlabel\nhello\t\n", "labels.tsv"),
    ):
        yield texts(name, wrote("labels.tsv", content), word)
    yield texts("a quote", wrote("labels.tsv", b"text\tlabel\n" + b'"hello\tyes\n' * 60))


def other_cases() -> Iterator[Case]:
    """Tasks, machines and the command line itself."""
    task = maker("tasks", ("eval", "runs/text", "--tasks", "task.jsonl"), lambda s: "nan" not in s.out)
    pair = {"context": "a", "choices": ["b", "c"]}
    for name, content, word in (
        ("empty", b"", "task.jsonl"),
        ("unknown fields", lines([{"a": 1}]), "task.jsonl"),
        ("a label out of range", lines([pair | {"label": 7}]), "label"),
        ("one choice", lines([{"context": "a", "choices": ["b"], "label": 0}]), "choices"),
        ("a text label", lines([pair | {"label": "b"}]), "label"),
        ("deep", b"[" * 99_999, "task.jsonl"),
        ("not JSON", b"hello\n", "task.jsonl"),
        ("an empty choice", lines([{"context": "a", "choices": ["", "c"], "label": 0}]), "task.jsonl"),
    ):
        yield task(name, wrote("task.jsonl", content), word)
    yield task("a very long text", wrote("task.jsonl", lines([{"text": "word " * 5000}])))
    for argv in (("--tasks", "helaswag"), ("--text", "none.txt"), ("--text", "empty.txt")):
        yield Case("tasks", " ".join(argv), ("eval", "runs/text", *argv), wrote("empty.txt", ""), (argv[1],))
    argv = ("eval", "runs/tags", "--text", "corpus.jsonl")
    yield Case("tasks", "a text for a tagger", argv, refuse=())
    few = ("sample", "runs/text", "--prompt", "a", "--max-new-tokens", "2")
    for key, value in (
        ("JAX_PLATFORMS", "gpux"),
        ("JAXGPT_LOG", "LOUD"),
        ("JAX_NUM_PROCESSES", "x"),
        ("JAX_PROCESS_ID", "-3"),
    ):
        yield Case("machine", f"{key}={value}", few, refuse=(key,), env=((key, value),))
    ascii_ = (("PYTHONIOENCODING", "ascii"), ("LC_ALL", "C"))
    unicode = ("sample", "runs/text", "--prompt", "\u00e9", "--max-new-tokens", "8")
    yield Case("machine", "an ASCII terminal", unicode, right=lambda s: True, env=ascii_)
    for argv in (
        "trian", "data", "data prepar", "train", "sample", "chat none", "--bogus", "info", "serve",
        "train text.py --train.step 3", "train text.py --bogus 1", "sample runs/text --lora",
        "export runs/text", "export none x", "import none x", "sweep text.py", "eval none",
        "sample runs/tags", "sample runs/chat", "sample runs/text --prompt-file none", "chat runs/tags",
        "sample runs/text --system x", "export runs/tags x", f"sample runs/text --prompt {'a' * 100}",
        "sample runs/text --prompt \udc80",
    ):  # fmt: skip
        yield Case("command line", ascii(argv)[:40], tuple(argv.split()), refuse=())
    stop = ("--prompt", "the", "--max-new-tokens", "8", "--stop", "e", "--json")
    shown_stop = lambda s: "e" not in json.loads(s.out)["text"]
    yield Case("text out", "a stop string", ("sample", "runs/text", *stop), right=shown_stop)


def all_cases() -> Iterator[Case]:
    """Every input."""
    for cases in (
        chat_cases, template_cases, run_cases, config_cases, data_cases, hf_cases, label_cases, other_cases,
    ):  # fmt: skip
        yield from cases()
