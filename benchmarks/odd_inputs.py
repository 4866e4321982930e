"""Counts how many wrong, odd and hostile inputs are answered as promised, over all commands.

    python -m benchmarks.odd_inputs --tree . --json results.json
    python -m benchmarks.odd_inputs --tree ../before        # the same inputs, given to another checkout

An input is answered as promised when it is read right, or refused in one sentence that names the field or
file, with exit code 2 (3 where training could not go on). Anything else is a traceback, silence (a wrong
input accepted without a word, or a right one read wrong) or a hang (over `LIMIT` seconds).

The commands run in children of one process that has imported jax and started nothing, so that an input
costs about a second. Every input gets its own copy of a small folder with a corpus, a tokenizer, trained
runs and Hugging Face folders, made by the checkout that is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.odd_cases import Case, Seen, all_cases, files, write_llama

LIMIT = 60
"""Seconds after which a command hangs; the machine may be busy, so this is no promise about speed."""


def judge(case: Case, seen: Seen) -> str:
    """`promised`, or what went wrong instead."""
    if seen.code is None:
        return "hung"
    if "Traceback (most recent call last)" in seen.err or seen.code not in (0, 2, 3):
        return "traceback"
    if seen.code:
        said = [line for line in seen.err.splitlines() if line.startswith("jaxgpt: ")]
        usage = (
            "Parsing error" in seen.err
            or "usage: jaxgpt" in seen.err
            or "unrecognized" in seen.err.lower()
            or "invalid" in seen.err
        )
        if case.refuse is None:
            return "refused wrongly"
        if not said and not usage:
            return "unclear"
        flat = " ".join(seen.err.split())
        return "promised" if all(word in flat for word in case.refuse) else "unclear"
    if case.right is None or not case.right(seen):
        return "silent"
    flat = " ".join(seen.err.split())
    return "promised" if all(word in flat for word in case.warn) else "silent"


# ------------------------------------------------------------------------------------- running them


def call(argv: tuple[str, ...], folder: Path, env: dict[str, str], limit: float = LIMIT) -> Seen:
    """Run a command in a child of this process."""
    out, err, start = folder / ".out", folder / ".err", time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        for path, target in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ.update({"COLUMNS": "400", **env})
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        if env:  # jax reads the environment once
            os.environ["PYTHONPATH"] = sys.path[0]
            os.execv(sys.executable, [sys.executable, "-m", "jaxgpt.cli", *argv])
        code = 1
        try:
            from jaxgpt.cli import main

            code = main(list(argv))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    status = None
    while status is None and time.monotonic() - start < limit:
        done, state = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(state) if done else None
        time.sleep(0.02)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = [path.read_text("utf-8", "replace") for path in (out, err)]
    return Seen(status, *text, time.monotonic() - start, folder)


def build(base: Path) -> None:
    """The folder that every input starts from."""
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    for name, content in files().items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    write_llama(base / "llama")
    for argv in (
        ("data", "prepare", "corpus.jsonl", "--out", "data", "--workers", "1"),
        ("train", "text.py"),
        ("train", "chat.py"),
        ("train", "tags.py"),
        ("train", "labels.py"),
        ("import", "llama", "runs/llama"),
        ("export", "runs/text", "exported", "--checkpoint", "4"),
        ("tokenizer", "train", "corpus.jsonl", "--out", "tok", "--vocab-size", "300"),
    ):
        seen = call(argv, base, {}, 300)
        if seen.code != 0:
            print(f"building: {' '.join(argv)} gave {seen.code}: {seen.err[-800:]}", file=sys.stderr)
            raise SystemExit(1)
    shutil.rmtree(base / "runs/text/checkpoints/6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", default=".", help="the checkout whose commands are tried")
    parser.add_argument("--json", default="", help="a file for what each input was answered")
    parser.add_argument("--only", default="", help="cases whose kind or name holds this")
    parser.add_argument("--show", action="store_true", help="print what was said about each that failed")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(options.tree).resolve()))
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import jaxgpt.cli
    import jaxgpt.evals.command
    import jaxgpt.train.loop

    assert jaxgpt.__file__ and Path(jaxgpt.__file__).is_relative_to(Path(options.tree).resolve())
    root = Path(tempfile.mkdtemp(prefix="odd-"))
    try:
        (root / "base").mkdir()
        build(root / "base")
        cases = [c for c in all_cases() if options.only in f"{c.kind} {c.name}"]
        found: list[dict[str, Any]] = []
        for number, case in enumerate(cases):
            folder = root / "case"
            shutil.copytree(root / "base", folder, symlinks=True)
            case.prepare(folder)
            seen = call(case.argv, folder, dict(case.env))
            try:
                verdict = judge(case, seen)
            except Exception as error:
                verdict = f"silent ({type(error).__name__})"
            said = (seen.err.strip().splitlines() or [""])[-1]
            found.append({"kind": case.kind, "name": case.name, "verdict": verdict, "code": seen.code,
                          "seconds": round(seen.seconds, 1), "said": said[:300]})  # fmt: skip
            if verdict != "promised" and options.show:
                print(f"[{verdict}] {case.kind}: {case.name} (code {seen.code}): {said[:200]}", flush=True)
                if verdict == "traceback":
                    print("    " + "\n    ".join(seen.err.strip().splitlines()[-12:]), flush=True)
            elif number % 25 == 0:
                print(f"{number} of {len(cases)}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        report(found)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def report(found: list[dict[str, Any]]) -> None:
    """A table of kinds and verdicts."""
    verdicts = sorted({f["verdict"] for f in found}, key=lambda v: (v != "promised", v))
    print("| kind | inputs | " + " | ".join(verdicts) + " |\n|---|---|" + "---|" * len(verdicts))
    for kind in [*dict.fromkeys(f["kind"] for f in found), "all"]:
        of = [f for f in found if kind in (f["kind"], "all")]
        counts = Counter(f["verdict"] for f in of)
        print(f"| {kind} | {len(of)} | " + " | ".join(str(counts[v]) for v in verdicts) + " |")


if __name__ == "__main__":
    main()
