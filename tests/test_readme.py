"""README's commands, run in order on tiny inputs; and the extras that pyproject.toml declares."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from story import story

from jaxgpt.cli import COMMANDS, main
from jaxgpt.config import load, override

ROOT = Path(__file__).parents[1]

NOT_RUN = {
    "git clone REPOSITORY-URL jaxgpt && cd jaxgpt": "there is no repository to clone here",
    "pip install uv && uv run jaxgpt quickstart": "installs from the network; test_quickstart.py runs it",
    "uv run pytest": "is running",
    "uv sync --extra cuda": "installs CUDA from the network",
    "uv run --extra serve jaxgpt serve runs/mine_chat": "serves until it is stopped; tests/serve asks one",
    "uv run jaxgpt train configs/llama3_8b.py --mesh.fsdp 64": "needs 64 devices; it is parsed",
}
"""Commands that cannot run here, with the reason."""
TRAIN = (
    "--train.steps 2 --train.batch-size 8 --train.accumulate 1 --train.eval-every 2 --train.save-every 2 "
    "--train.eval-batches 1 --optim.warmup-steps 1 --compute.dtype float32 --compute.unroll 1"
)
TEXT = f"{TRAIN} --model.layers 1 --model.width 16 --model.heads 2 --model.context 64"
TAGS = f"{TRAIN} --data.length 16" + "".join(
    f" --model.backbone.{name}" for name in ("layers 1", "width 16", "heads 2")
)
SMALLER = {
    "jaxgpt tokenizer train": "--vocab-size 380",
    "jaxgpt data prepare": "--workers 1",
    "jaxgpt train configs/mine.py": f"{TEXT} --data.workers 0",
    "jaxgpt train configs/shakespeare_char.py": TEXT,
    "jaxgpt train configs/mine_chat.py": TRAIN,
    "jaxgpt train configs/mine_lora.py": TRAIN,
    "jaxgpt train configs/mine_tags.py": TAGS,
    "jaxgpt train configs/mine_dpo.py": f"{TRAIN} --data.length 64",
    "jaxgpt train configs/mine_reward.py": f"{TRAIN} --data.length 64",
    "jaxgpt train configs/gpt2_124m.py": f"{TEXT} --data.workers 0 "
    "--model.vocab-size 384 --data.path data/mine",
    "jaxgpt sweep": f"{TEXT} --only learned",
    "jaxgpt sample": "--max-new-tokens 4",
    "jaxgpt chat": "--max-new-tokens 4",
    "jaxgpt eval runs/theirs": "--limit 2 --stride 32",
}
"""What is added to commands that begin so: the same command, with less to compute."""


def blocks() -> list[list[str]]:
    """The commands of each fenced block, without their comments."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [[re.sub(r" +#.*", "", line).strip() for line in block.splitlines() if line] for block in found]


def inputs(folder: Path) -> None:
    """What README's commands read, and copies of configs changed as it says."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "texts").mkdir()
    for i in range(80):
        (folder / "texts" / f"{i}.txt").write_text(story(i, 60))
    for name in ("book.txt", "wiki.txt"):
        (folder / name).write_text(story(7, 600))
    (folder / "new.txt").write_text("Ada lives in Paris.\n")
    (folder / "tags.conll").write_text("Ada B-PER\nlives O\nin O\nParis B-LOC\n\n" * 30)
    sums = [{"prompt": f"{i} + 2 =", "completion": str(i + 2)} for i in range(60)]
    (folder / "dialogues.jsonl").write_text("\n".join(map(json.dumps, sums)))
    for old, new in (("instruct_alpaca", "mine_chat"), ("lora_alpaca", "mine_lora")):
        change(
            folder / "configs" / f"{new}.py",
            folder / "configs" / f"{old}.py",
            (f'"{old}"', f'"{new}"'),
            ('"runs/gpt2_124m"', '"runs/mine"'),
            (r" *model=GPT\(.*?\),\n", ""),
            (r"data=Chat\(.*?\),\n", "data=Chat(train=('dialogues.jsonl',)),\n"),
        )
    pairs = [{"prompt": f"{i} + 2 =", "chosen": str(i + 2), "rejected": str(i)} for i in range(160)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for mine, theirs in (("mine_dpo", "dpo"), ("mine_reward", "reward_model")):
        change(
            folder / "configs" / f"{mine}.py",
            folder / "configs" / f"{theirs}.py",
            (f'name="{theirs}"', f'name="{mine}"'),
            ('"runs/instruct_alpaca"', '"runs/mine_chat"'),
            (r" *model=GPT\(.*?\),\n" if theirs == "dpo" else r"backbone=GPT\(.*?\)", ""),
            (r"data=Pairs\(.*?\),\n", "data=Pairs(train=('pairs.jsonl',)),\n"),
            (r"epochs=1.0", "steps=40"),
        )
    change(
        folder / "configs" / "mine_tags.py",
        folder / "configs" / "ner_resume.py",
        ('"ner_resume"', '"mine_tags"'),
        (r'"data/resume/\w+.char.bmes"', '"tags.conll"'),
        (r"TYPES = \(.*?\)", 'TYPES = ("LOC", "PER")'),
        ("tokenizers/zh_char", "tokenizers/mine"),
        (r'\n *joiner="",', ""),
    )


def change(new: Path, old: Path, *changes: tuple[str, str]) -> None:
    """A copy of a config, each of whose changes has something to change."""
    text = old.read_text("utf-8")
    for pattern, other in changes:
        text, count = re.subn(pattern, other, text)
        assert count, pattern
    new.write_text(text)


def run(command: str) -> int:
    """A command of README in this process."""
    words = shlex.split(command.removeprefix("uv run "))
    if words[0] == "cp":  # and edit: name and vocab_size first
        change(Path(words[2]), Path(words[1]), ('"gpt2_124m"', '"mine"'), ("50_304", "384"))
        return 0
    assert words[0] == "jaxgpt", command
    more = next((flags for start, flags in SMALLER.items() if shlex.join(words).startswith(start)), "")
    if words[1] == "import":
        assert main(["export", "runs/mine_chat", words[2]]) == 0  # the folder that the reader has
    return main([*words[1:], *more.split()])


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one command compiles, the next ones need not."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: None) -> None:
    inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = [command for block in blocks() for command in block]
    assert NOT_RUN.keys() <= set(commands)
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        if command in NOT_RUN:
            words = shlex.split(command.removeprefix("uv run "))
            if words[:2] == ["jaxgpt", "train"]:
                override(load(words[2]), words[3:])
            continue
        assert run(command) == 0, command
    assert (tmp_path / "hf-mine" / "config.json").is_file()


def test_every_command_is_in_the_table() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for name in COMMANDS:
        assert f"`jaxgpt {name} " in text, name


MODULES = {
    "pyarrow": "pyarrow",
    "backports.zstd": "backports.zstd",
    "seqeval": "seqeval",
    "scikit-learn": "sklearn",
    "lm-eval": "lm_eval",
    "tensorboardX": "tensorboardX",
    "wandb": "wandb",
    "qwix": "qwix",
    "sacrebleu": "sacrebleu",
    "rouge-score": "rouge_score",
    "bm25s": "bm25s",
    "llguidance": "llguidance",
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus-client": "prometheus_client",
    "redis": "redis",
    "opentelemetry-sdk": "opentelemetry.sdk",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    "gguf": "gguf",
    "ray": "ray",
    "datasketch": "datasketch",
    "py3langid": "py3langid",
    "presidio-analyzer": "presidio_analyzer",
    "alt-profanity-check": "profanity_check",
}
"""What is imported of a package that an extra declares."""
NO_IMPORT = {
    "jax": "the extras cuda and tpu install jax's own plugins",
    "flatbuffers": "jax.export writes and reads programs with it",
    "protobuf": "sentencepiece's schema of its own files needs it",
    "tensorboard": "shows the events that tensorboardX writes",
}


def test_what_an_extra_declares_is_used() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    files = [*(ROOT / "jaxgpt").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in files)
    for extra, packages in extras.items():
        for package in packages:
            name = re.split(r"[\[<>=; ]", package)[0]
            if name not in NO_IMPORT:
                assert re.search(rf"""(import|from) {MODULES[name]}\b|["']{MODULES[name]}\b""", code), (
                    extra,
                    name,
                )
    for extra in re.findall(r"jaxgpt\[(\w+)\]", code + (ROOT / "README.md").read_text("utf-8")):
        assert extra in extras, extra
